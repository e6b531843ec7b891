"""The worker's log where things go wrong: a reader that stands still or is gone, a full disk, files moved away,
kills at any point, callers who write what they like."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.waiting import eventually, eventually_sync
from tests.support.workers import PATIENCE_S, Worker
from worker_svc import Unavailable, WorkerClient
from worker_svc.job import JobState
from worker_svc.linux.failpoints import WORKER_FILE_NAME


@contextmanager
def serving(worker: Worker) -> Iterator[Worker]:
    """One whose log cannot be read for when it serves."""
    path = worker.tmp_path / "w.sock"
    worker.keys["GRPC_SERVER_ADDR"] = worker.address = f"unix:{path}"
    worker.spawn()
    try:
        eventually_sync(path.is_socket, PATIENCE_S, "it does not serve")
        yield worker
    finally:
        worker.__exit__(None, None, None)


def transitions(text: bytes) -> list[int]:
    lines = [json.loads(line) for line in text.splitlines() if line]
    return [line["sequence"] for line in lines if line["event"] == "job.transition"]


class Pipe:
    """The worker's standard error, which is read only when the test likes."""

    def __init__(self, worker: Worker) -> None:
        path = worker.tmp_path / "pipe"
        if not path.exists():
            os.mkfifo(path)
        self._reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self.text = b""
        worker.run_as = ["bash", "-c", f'exec "$@" 2>{path}', "bash"]

    def read(self) -> bytes:
        """All that is there, and what was read before."""
        with suppress(BlockingIOError):
            while data := os.read(self._reader, 65536):
                self.text += data
        return self.text

    def close(self) -> None:
        os.close(self._reader)


async def fill_pipe(client: WorkerClient) -> None:
    while "stands still" not in (await client.worker()).log.problem:
        await client.start("true")


async def test_a_reader_that_stands_still_holds_up_nothing(tmp_path: Path) -> None:
    worker = Worker(tmp_path, LOG_FILE="")
    pipe = Pipe(worker)
    with serving(worker):
        async with worker.client() as client:
            await fill_pipe(client)
            last = await client.start("true")
            assert (await client.wait(last.job_id, PATIENCE_S)).exit_code == 0
            log = (await client.worker()).log
            assert (log.held_lines > 0, log.lost_lines) == (True, 0)
            await eventually(lambda: all_are_finished(worker), PATIENCE_S)
            latest = len(worker.events())
            await asyncio.sleep(1.1)  # held back for less would not be told of
            await eventually(lambda: len(transitions(complete(pipe.read()))) == latest, PATIENCE_S)
            await eventually(lambda: b"log.held_back" in pipe.read(), PATIENCE_S)
        assert worker.terminate() == 0
    lines = [json.loads(line) for line in pipe.read().splitlines()]
    assert transitions(pipe.text) == list(range(1, latest + 1))
    assert len([line for line in lines if line["event"] == "audit"]) == latest / 3
    told = [line for line in lines if line["event"] == "log.held_back"]
    assert told
    assert told[0]["lines"] > 0
    pipe.close()


def all_are_finished(worker: Worker) -> bool:
    events = worker.events()
    return len({moved.job_id for moved in events}) == sum(moved.to_state is JobState.FINISHED for moved in events)


def complete(text: bytes) -> bytes:
    return text[: text.rfind(b"\n") + 1]


async def test_it_ends_by_a_signal_while_its_reader_stands_still(tmp_path: Path) -> None:
    """What was not logged of transitions the next worker logs."""
    worker = Worker(tmp_path, LOG_FILE="")
    pipe = Pipe(worker)
    with serving(worker):
        async with worker.client() as client:
            await fill_pipe(client)
        assert worker.terminate() == 0
        first = transitions(complete(pipe.read()))
        worker.run_as, worker.keys["LOG_FILE"] = [], str(worker.log_path)
        (tmp_path / "w.sock").unlink(missing_ok=True)
        worker.start()

        def logged() -> list[int]:
            return first + [line["sequence"] for line in worker.log_events("job.transition")]

        assert worker.wait_log("log.lines_lost")["lines"] > 0
        eventually_sync(lambda: len(logged()) >= len(worker.events()), PATIENCE_S)
        assert logged() == list(range(1, len(logged()) + 1))
    pipe.close()


async def test_a_reader_that_is_gone(tmp_path: Path) -> None:
    """And another one that comes is told how many lines are lost; transitions are not."""
    worker = Worker(tmp_path, LOG_FILE="")
    pipe = Pipe(worker)
    with serving(worker):
        pipe.close()
        async with worker.client() as client:
            for _ in range(10):
                await client.start("true")
            again = Pipe(worker)
            await client.start("true")
            await eventually(lambda: len(transitions(complete(again.read()))) >= 30, PATIENCE_S)
        lines = [json.loads(line) for line in complete(again.read()).splitlines()]
        [lost] = [line["lines"] for line in lines if line["event"] == "log.lines_lost"]
        assert lost >= 10
        assert transitions(complete(again.text))[:30] == list(range(1, 31))
        again.close()


async def test_a_fifo_that_nobody_reads_yet(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    worker = Worker(tmp_path, LOG_FILE=str(tmp_path / "fifo"))
    with serving(worker):
        async with worker.client() as client:
            await client.start("true")
        reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
        text = b""
        while b"worker.serving" not in text:
            text += os.read(reader, 65536)
        os.close(reader)


@pytest.mark.parametrize("with_signal", [True, False])
async def test_a_log_that_is_moved_away(tmp_path: Path, with_signal: bool) -> None:
    with Worker(tmp_path) as worker:
        async with worker.client() as client:
            for number in range(1, 4):
                await client.wait((await client.start("true")).job_id, PATIENCE_S)
                await eventually(lambda: len(all_logged(tmp_path)) == 3 * number, PATIENCE_S)  # noqa: B023
                worker.log_path.rename(tmp_path / f"worker.log.{number}")
                if with_signal:
                    os.kill(worker.pid, signal.SIGHUP)
                    await eventually(worker.log_path.exists, PATIENCE_S)
            await client.wait((await client.start("true")).job_id, PATIENCE_S)
        await eventually(lambda: len(all_logged(tmp_path)) == 12, PATIENCE_S)
    assert sorted(all_logged(tmp_path)) == list(range(1, 13))
    assert worker.log_path.stat().st_mode & 0o777 == 0o600


def all_logged(folder: Path) -> list[int]:
    return [number for path in folder.glob("worker.log*") for number in transitions(complete(path.read_bytes()))]


async def test_a_log_whose_folder_is_gone_is_written_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    with Worker(tmp_path, log="logs/worker.log") as worker:
        (tmp_path / "logs").rename(tmp_path / "gone")
        worker.log_path = tmp_path / "gone" / "worker.log"
        async with worker.client() as client:
            await client.wait((await client.start("true")).job_id, PATIENCE_S)
        assert "what was open stays in use" in worker.wait_log("log.not_reopened")["reason"]
        assert worker.wait_log("job.transition", 3)["sequence"] == 3


@pytest.mark.parametrize("point", ["line-announced", "line-written"])
@pytest.mark.parametrize("is_moved", [False, True])
async def test_killed_between_the_note_and_the_line(tmp_path: Path, point: str, is_moved: bool) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "state" / WORKER_FILE_NAME).write_text(json.dumps({point: 2}))
    worker = Worker(tmp_path)
    worker.start()
    assert worker.process is not None
    try:
        with suppress(Unavailable):
            async with worker.client() as client:
                for _ in range(3):
                    await client.start("true")
        worker.process.wait(PATIENCE_S)
        if is_moved:
            worker.log_path.rename(tmp_path / "worker.log.1")
        worker.start()
        latest = len(worker.events())
        await eventually(lambda: len(all_logged(tmp_path)) >= latest, PATIENCE_S)
        assert sorted(all_logged(tmp_path)) == list(range(1, latest + 1))
    finally:
        worker.__exit__(None, None, None)


async def test_what_a_viewer_writes_is_not_taken_for_the_log(tmp_path: Path) -> None:
    with Worker(tmp_path, ACCESS_ANONYMOUS="viewer") as worker:
        async with worker.client() as client:
            worker_id = (await client.worker()).worker_id
            for text in (f"job.transition worker={worker_id} sequence=4000000000", "\x1b[2J\n\u2028", "x" * 300):
                with pytest.raises(Exception, match="not for role viewer"):
                    await client.stop(text)
        assert b"4000000000" not in worker.log_path.read_bytes()
        worker.keys["ACCESS_ANONYMOUS"] = "admin"
        worker.restart()
        async with worker.client() as client:
            for text in (f"job.transition worker={worker_id} sequence=4000000000", "\x1b[2J\n\u2028", "x" * 300):
                with pytest.raises(Exception, match="jobID: must be"):
                    await client.stop(text)
            job_id = (await client.start("true")).job_id
            assert (await client.wait(job_id, PATIENCE_S)).exit_code == 0
        worker.restart()
        worker.wait_log("job.transition", 3)
    assert {line["job_id"] for line in worker.log_events("audit")} <= {"", "(malformed)", job_id}


async def test_a_poisoned_cursor(tmp_path: Path) -> None:
    with Worker(tmp_path) as worker:
        async with worker.client() as client:
            await client.wait((await client.start("true")).job_id, PATIENCE_S)
        worker.wait_log("job.transition", 3)
        worker.kill()
        cursor = worker.path / "worker.cursor"
        cursor.write_bytes((4_000_000_000).to_bytes(8, "little") + cursor.read_bytes()[8:])
        worker.start()
        async with worker.client() as client:
            job_id = (await client.start("sleep", args=["0.1"])).job_id
            assert (await client.wait(job_id, PATIENCE_S)).exit_code == 0
        assert worker.wait_log("log.cursor_repaired")["cursor"] == 4_000_000_000
        worker.wait_log("job.transition", 6)
        assert [line["sequence"] for line in worker.log_events("job.transition")] == list(range(1, 7))


# A full disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m,mode=700", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(65536))
    with filler.open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler


def with_log_on(disk: Path, when_unwritable: str) -> Worker:
    return Worker(disk.parent, log=f"{disk.name}/worker.log", LOG_WHEN_UNWRITABLE=when_unwritable)


async def use_up_the_log(client: WorkerClient, job_id: str) -> int:
    """Until a call is refused; how many were not."""
    for count in range(10_000):
        try:
            await client.signal(job_id, "SIGCONT")
        except Unavailable as error:
            if "No space left on device" in str(error) and "log.when_unwritable" in str(error):
                return count
            raise
    raise AssertionError("the log never was full")


def audit_of(worker: Worker, rpc: str, decision: str = "allowed") -> list[dict[str, Any]]:
    return [line for line in worker.log_events("audit") if (line["rpc"], line["decision"]) == (rpc, decision)]


async def test_what_cannot_be_logged_is_not_done(disk: Path) -> None:
    """But what makes room is, and stands in the log at once."""
    with with_log_on(disk, "refuse") as worker:
        async with worker.client() as client:
            job_id = (await client.start("sleep", args=["999"])).job_id
            filler = fill(disk)
            count = await use_up_the_log(client, job_id)
            with pytest.raises(Unavailable):
                await client.start("true", job_id="refused")
            assert (await client.job(job_id)).pid
            assert len(audit_of(worker, "SignalJob")) == count
            await client.stop(job_id, wait=True)
            assert [line["job_id"] for line in audit_of(worker, "StopJob")] == [job_id]
            filler.unlink()
            await eventually(lambda: b"log.held_back" in worker.log_path.read_bytes(), PATIENCE_S)
            assert (await client.start("true", job_id="later")).job_id
        worker.wait_log("job.transition", 6)
        assert len(audit_of(worker, "SignalJob")) == count + len(audit_of(worker, "SignalJob", "failed"))
        assert [line["sequence"] for line in worker.log_events("job.transition")][:4] == [1, 2, 3, 4]


async def test_calls_can_wait_for_the_log(disk: Path) -> None:
    with with_log_on(disk, "hold") as worker:
        async with worker.client() as client:
            job_id = (await client.start("sleep", args=["999"])).job_id
            filler = fill(disk)
            waiting: list[asyncio.Task[None]] = []
            while not [task for task in waiting if not task.done()]:
                waiting = [asyncio.create_task(client.signal(job_id, "SIGCONT")) for _ in range(50)]
                await asyncio.wait(waiting, timeout=1)
            filler.unlink()
            await asyncio.gather(*waiting)


async def test_calls_can_be_done_all_the_same(disk: Path) -> None:
    """Their lines come later."""
    with with_log_on(disk, "serve") as worker:
        async with worker.client() as client:
            job_id = (await client.start("sleep", args=["999"])).job_id
            filler = fill(disk)
            for _ in range(1000):
                await client.signal(job_id, "SIGCONT")
            filler.unlink()
        await eventually(lambda: len(audit_of(worker, "SignalJob")) == 1000, PATIENCE_S)


async def test_a_start_on_a_full_disk(disk: Path, tmp_path: Path) -> None:
    """With the state of worker and supervisor on that disk too: jobs can be stopped and pruned."""
    keys = {"STATE_MIN_FREE_BYTES": "0", "STATE_MIN_FREE_INODES": "0"}
    with Worker(tmp_path, log="disk/worker.log", state_dir=disk / "state", **keys) as worker:
        async with worker.client() as client:
            job_id = (await client.start("sleep", args=["999"])).job_id
            await client.wait((await client.start("true")).job_id, PATIENCE_S)
        worker.terminate()
        os.kill(worker.supervisor_pid(), signal.SIGKILL)
        fill(disk)
        worker.spawn()
        worker.address = await eventually(lambda: served_at(worker), PATIENCE_S)
        async with worker.client() as client:
            await client.stop(job_id, wait=True)
            assert (await client.prune(max_count=0)).jobs == 2
        assert {line["rpc"] for line in worker.log_events("audit")} >= {"StopJob", "PruneJobs"}


def served_at(worker: Worker) -> str:
    """By /proc, as the log may say nothing."""
    for line in Path(f"/proc/{worker.pid}/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in links(worker.pid):
            return f"127.0.0.1:{int(fields[1].rpartition(':')[2], 16)}"
    return ""


def links(pid: int) -> set[str]:
    found = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            found.add(str(fd.readlink()))
    return found


# Callers without a role


async def test_lines_of_strangers_are_bounded_and_counted(tmp_path: Path) -> None:
    with Worker(tmp_path, ACCESS_ANONYMOUS="none") as worker:
        async with worker.client() as client:
            for _ in range(300):
                with pytest.raises(Exception, match="has no role"):
                    await client.query("x")
        left_out = worker.wait_log("audit.left_out")["lines"]
        shown = len(worker.log_events("audit"))
        assert 100 <= shown < 300
        assert shown + left_out == 300
