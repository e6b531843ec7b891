"""What bounds the disk: caps on output, retention of finished jobs, floors for new ones, and a disk that is full."""

from __future__ import annotations

import asyncio
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support import programs
from tests.support.filesystems import mounted
from tests.support.output_files import pattern
from tests.support.waiting import eventually_sync
from tests.support.workers import PATIENCE_S, ROOT, SupervisorProcess, Worker, start_fields
from worker_svc.client import WorkerClient
from worker_svc.ipc import frames
from worker_svc.job import (
    InvalidArgument,
    JobState,
    Outcome,
    OutputPolicy,
    OutputVia,
    ResourceExhausted,
)
from worker_svc.pb.jobscheduler import OutputChunk, OutputStream
from worker_svc.pb.jobscheduler import OutputPolicy as Policy
from worker_svc.record.store import output_path, stderr_path

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("holes")]
MIB: Final = 1 << 20

# Writes argv[1] bytes of `pattern` to the fd argv[2] as fast as it can, touching the file argv[3] (if given) after the
# first MiB and waiting for argv[4] (if given) at the end.
PATTERN: Final = """
import os, sys, time
total, fd = int(sys.argv[1]), int(sys.argv[2])
begun, go = sys.argv[3:5] if len(sys.argv) > 3 else ("", "")
for at in range(0, total, 1 << 20):
    data = memoryview(b"".join(b"%015d\\n" % n for n in range(at // 16, min(total, at + (1 << 20)) // 16 + 1)))
    data = data[: min(total - at, 1 << 20)]
    while data: data = data[os.write(fd, data):]
    if begun: open(begun, "w").close(); begun = ""
while go and not os.path.exists(go): time.sleep(0.01)
"""
# At full speed: blocks of a MiB of a line that is always the same.
FLOOD: Final = """
import os, sys
block = b"0123456789abcde\\n" * 65536
for _ in range(int(sys.argv[1]) >> 20): os.write(1, block)
"""
ENDLESS: Final = "import os\nblock = b'0123456789abcde\\n' * 4096\nwhile True: os.write(1, block)"
ENDLESS_DEAF: Final = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + ENDLESS


def writes(total: int, fd: int = 1, begun: Path | str = "", go: Path | str = "") -> list[str]:
    return programs.python(PATTERN, str(total), str(fd), str(begun), str(go))


def size_of(path: str) -> int:
    return Path(path).stat().st_size


def stored(path: str) -> int:
    return Path(path).stat().st_blocks * 512


def _may_hurry() -> bool:
    """Whether a supervisor run by us may give its guard a priority."""
    code = "import os; os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


# What a cap may be exceeded by on disk, as promised; without a priority it depends on who else wants the CPUs.
SLACK: Final = (16 if _may_hurry() else 256) * MIB


class Sampler:
    """The most that a file took on disk, looked at without pause until `until`."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.peak = 0

    def look(self) -> None:
        with suppress(FileNotFoundError):
            self.peak = max(self.peak, stored(self._path))

    def until(self, condition: Callable[[], object], timeout_s: float = PATIENCE_S) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            self.look()
            assert time.monotonic() < deadline_s, "it does not come to pass"
            time.sleep(0.0005)


async def collect(client: WorkerClient, job_id: str, **options: Any) -> list[OutputChunk]:
    async with asyncio.timeout(60):
        return [chunk async for chunk in client.output(job_id, **options)]


def capped(cap: int, policy: OutputPolicy = OutputPolicy.DROP_HEAD, via: OutputVia = OutputVia.FILE) -> dict[str, Any]:
    return {"output_max_bytes": cap, "output_policy": int(policy), "output_via": int(via)}


@pytest.fixture(params=OutputVia, ids=lambda via: via.name)
def via(request: pytest.FixtureRequest) -> OutputVia:
    return OutputVia(request.param)


# drop_head


def test_the_newest_bytes_are_kept(tmp_path: Path, state: Path) -> None:
    """Offsets stay, the gap is told exactly, and what is left is what the job wrote there."""
    total, cap = 40 * MIB + 12345, 8 * MIB

    async def check(worker: Worker) -> None:
        async with worker.client() as client:
            argv = writes(total)
            job_id = (await client.start(argv[0], args=argv[1:], output_max_bytes=cap)).job_id
            job = await client.wait(job_id, PATIENCE_S)
            assert (job.outcome, job.output_size_bytes) == (Outcome.SUCCEEDED, total)
            path = output_path(str(worker.path), job_id)
            eventually_sync(lambda: stored(path) <= cap + 8192, PATIENCE_S, "the head is not dropped at the end")
            for follow in (False, True):
                first, *rest = await collect(client, job_id, follow=follow)
                assert first.offset == 0
                assert first.gap_bytes % 4096 == 0
                assert total - cap - 4096 <= first.gap_bytes <= total - cap
                at = first.gap_bytes
                for chunk in rest:
                    assert (chunk.offset, chunk.gap_bytes) == (at, 0)
                    assert chunk.data == pattern(at, len(chunk.data))
                    at += len(chunk.data)
                assert at == total
            # Before, at and behind the edge.
            edge = (await collect(client, job_id))[0].gap_bytes
            for offset, gap in ((0, edge), (edge - 1, 1), (edge - 4096, 4096), (edge, 0), (edge + 1, 0)):
                head = (await collect(client, job_id, offset=offset))[0]
                assert (head.offset, head.gap_bytes) == (offset, gap)
            lines = await collect(client, job_id, tail_lines=3)
            assert b"".join(chunk.data for chunk in lines) == pattern(total - 64, 64)[-(total % 16) - 32 :]

    with Worker(tmp_path) as worker:
        asyncio.run(check(worker))


def test_a_follower_of_a_job_under_its_cap(tmp_path: Path, state: Path) -> None:
    """It is slower than the job: what it misses is told, what it gets is right, and it ends where the job did."""
    total, cap = 60 * MIB, MIB

    async def check(worker: Worker) -> None:
        async with worker.client() as client:
            argv = writes(total)
            job_id = (await client.start(argv[0], args=argv[1:], output_max_bytes=cap)).job_id
            at = 0
            async for chunk in client.output(job_id, follow=True):
                assert chunk.offset == at
                if chunk.data:
                    assert chunk.data == pattern(at, len(chunk.data)), f"at {at}"
                at += len(chunk.data) or chunk.gap_bytes
            assert at == total
            assert (await client.wait(job_id, PATIENCE_S)).output_size_bytes == total

    with Worker(tmp_path) as worker:
        asyncio.run(check(worker))


@pytest.mark.parametrize("cap", [MIB, 64 * MIB])
def test_disk_use_at_full_speed(supervisor: SupervisorProcess, state: Path, cap: int, via: OutputVia) -> None:
    total = 2048 * MIB
    path = output_path(str(state), "j")
    supervisor.run("j", programs.python(FLOOD, str(total)), **capped(cap, via=via))
    sampler = Sampler(path)
    sampler.until(lambda: supervisor.record("j").state is JobState.FINISHED, 100)
    record = supervisor.record("j")
    assert (record.outcome, record.output_size_bytes) == (Outcome.SUCCEEDED, total)
    assert cap < sampler.peak <= cap + SLACK, f"{(sampler.peak - cap) / MIB:.1f} MiB more than the cap"
    with open(path, "rb") as file:
        file.seek(total - cap)
        assert file.read() == b"0123456789abcde\n" * (cap // 16)


def test_separate_standard_error_has_a_cap_of_its_own(tmp_path: Path, state: Path) -> None:
    cap = 2 * MIB

    async def check(worker: Worker) -> None:
        async with worker.client() as client:
            out, err = writes(12 * MIB, 1), writes(20 * MIB, 2)
            script = f"{shlex.join(out)} & {shlex.join(err)}; wait"
            started = await client.start("sh", args=["-c", script], separate_stderr=True, output_max_bytes=cap)
            job_id = started.job_id
            await client.wait(job_id, PATIENCE_S)
            for stream, total in ((OutputStream.STDOUT, 12 * MIB), (OutputStream.STDERR, 20 * MIB)):
                which = output_path if stream == OutputStream.STDOUT else stderr_path
                file = which(str(worker.path), job_id)
                eventually_sync(lambda file=file: stored(file) <= cap + 8192, PATIENCE_S)  # type: ignore[misc]
                first, *rest = await collect(client, job_id, stream=stream)
                assert first.gap_bytes == total - cap
                assert b"".join(chunk.data for chunk in rest) == pattern(total - cap, cap)

    with Worker(tmp_path) as worker:
        asyncio.run(check(worker))


def test_while_no_worker_runs_and_by_the_supervisor_that_adopted_it(state: Path, via: OutputVia) -> None:
    cap = 4 * MIB
    path = output_path(str(state), "j")
    with SupervisorProcess(state) as supervisor:
        supervisor.run("j", programs.python(ENDLESS), **capped(cap, via=via))
        supervisor.hang_up()
        sampler = Sampler(path)
        size = 10 * cap
        sampler.until(lambda: size_of(path) > size)
        supervisor.kill()
        # Nobody holds it now: that is what a dead supervisor means; the job is made to wait, so that the disk is not
        # filled if a new one takes its time.
        pid = supervisor.record("j").pid
        os.kill(pid, 19)
        supervisor.start()
        eventually_sync(lambda: stored(path) <= cap + SLACK, PATIENCE_S, "the new supervisor does not hold it")
        os.kill(pid, 18)
        size = size_of(path) + 100 * MIB
        sampler.peak = 0
        sampler.until(lambda: size_of(path) > size)
        assert sampler.peak <= cap + SLACK
        supervisor.client.ask("stop", id="j", grace_s=0.0)
        record = supervisor.wait_finished("j")
        assert record.outcome in (Outcome.STOPPED, Outcome.LOST)


def test_an_operator_who_removes_or_truncates_it_does_not_lift_the_cap(state: Path) -> None:
    cap = 4 * MIB
    with SupervisorProcess(state) as supervisor:
        for job_id, meddle in (("removed", os.unlink), ("truncated", lambda path: os.truncate(path, 0))):
            path = output_path(str(state), job_id)
            supervisor.run(job_id, programs.python(ENDLESS), **capped(cap))
            eventually_sync(lambda path=path: size_of(path) > 100 * MIB, PATIENCE_S)  # type: ignore[misc]
            meddle(path)
            opened = f"/proc/{supervisor.record(job_id).pid}/fd/1"
            sampler = Sampler(opened)
            size = size_of(opened) + 100 * MIB
            sampler.until(lambda opened=opened, size=size: size_of(opened) > size)  # type: ignore[misc]
            assert sampler.peak <= cap + SLACK
            supervisor.client.ask("stop", id=job_id, grace_s=0.0)
            assert supervisor.wait_finished(job_id).outcome is Outcome.STOPPED


def test_a_file_in_the_place_of_the_output_is_not_touched(state: Path) -> None:
    """The job's own is held to its cap where it was moved to."""
    cap = MIB
    path = output_path(str(state), "j")
    with SupervisorProcess(state) as supervisor:
        supervisor.run("j", programs.python(ENDLESS), **capped(cap))
        eventually_sync(lambda: size_of(path) > 10 * cap, PATIENCE_S)
        aside = f"{state}/aside"
        other = os.urandom(8 * MIB)
        Path(f"{state}/other").write_bytes(other)
        Path(path).rename(aside)
        Path(f"{state}/other").rename(path)
        sampler = Sampler(aside)
        size = size_of(aside) + 50 * MIB
        sampler.until(lambda: size_of(aside) > size)
        assert sampler.peak <= cap + SLACK
        supervisor.client.ask("stop", id="j", grace_s=0.0)
        supervisor.wait_finished("j")
        assert Path(path).read_bytes() == other
        assert stored(path) >= len(other)


# The other policies


def test_stop(supervisor: SupervisorProcess, state: Path, via: OutputVia) -> None:
    cap = 2 * MIB
    path = output_path(str(state), "j")
    supervisor.run("j", programs.python(ENDLESS), **capped(cap, OutputPolicy.STOP, via))
    record = supervisor.wait_finished("j")
    assert (record.outcome, record.output_size_bytes) == (Outcome.OUTPUT_LIMIT, size_of(path))
    assert str(cap) in record.reason
    assert cap < size_of(path)
    reasons = [event.reason for event in supervisor.events() if event.to_state is JobState.STOPPING]
    assert reasons == ["output limit"]


def test_one_that_does_not_stop_cannot_fill_the_disk(
    supervisor: SupervisorProcess, state: Path, via: OutputVia
) -> None:
    """It is given its time, and writes on: the newest bytes are kept."""
    cap = 2 * MIB
    path = output_path(str(state), "j")
    supervisor.run("j", programs.python(ENDLESS_DEAF), stop_grace_s=1.0, **capped(cap, OutputPolicy.STOP, via))
    sampler = Sampler(path)
    sampler.until(lambda: supervisor.record("j").state is JobState.FINISHED)
    assert supervisor.record("j").outcome is Outcome.OUTPUT_LIMIT
    assert size_of(path) > 4 * SLACK
    assert sampler.peak <= cap + SLACK


def test_none(supervisor: SupervisorProcess, state: Path, via: OutputVia) -> None:
    total = 10 * MIB
    for policy, cap in ((OutputPolicy.NONE, MIB), (OutputPolicy.DROP_HEAD, 0)):
        job_id = policy.name
        record = supervisor.finish(job_id, writes(total), **capped(cap, policy, via))
        assert (record.outcome, record.output_size_bytes) == (Outcome.SUCCEEDED, total)
        assert supervisor.output(job_id) == pattern(0, total)


def test_no_more_than_the_cap_is_left_alone(supervisor: SupervisorProcess, state: Path, via: OutputVia) -> None:
    for policy in (OutputPolicy.DROP_HEAD, OutputPolicy.STOP):
        record = supervisor.finish(policy.name, writes(4 * MIB), **capped(4 * MIB, policy, via))
        assert record.outcome is Outcome.SUCCEEDED
        assert supervisor.output(policy.name) == pattern(0, 4 * MIB)


def test_what_a_request_may_ask_for(tmp_path: Path) -> None:
    async def check(worker: Worker) -> None:
        async with worker.client() as client:
            for asked in (10 * MIB + 1, 2**64 - 1, 0):
                with pytest.raises(InvalidArgument, match=r"output_max_bytes: must be from 1 to 10485760"):
                    await client.start("true", output_max_bytes=asked)
            with pytest.raises(InvalidArgument, match="output_policy"):
                await client.start("true", output_policy=Policy.NONE)
            allowed = await client.start("true", output_max_bytes=10 * MIB)
            assert (await client.job(allowed.job_id)).spec.output_max_bytes == 10 * MIB
            default = await client.start("true")
            spec = (await client.job(default.job_id)).spec
            assert (spec.output_max_bytes, spec.output_policy) == (MIB, Policy.STOP)

    limits: dict[str, Any] = {
        "OUTPUT_MAX_BYTES": str(MIB),
        "OUTPUT_MAX_BYTES_LIMIT": str(10 * MIB),
        "OUTPUT_POLICY": "stop",
    }
    with Worker(tmp_path, **limits) as worker:
        asyncio.run(check(worker))


def test_a_file_system_that_cannot_give_back(tmp_path: Path) -> None:
    """The worker says so when it starts, and to clients; drop_head is stop there."""

    async def check(worker: Worker) -> None:
        async with worker.client() as client:
            assert not (await client.worker()).can_drop_head
            argv = programs.python(ENDLESS)
            job_id = (await client.start(argv[0], args=argv[1:], output_max_bytes=MIB)).job_id
            assert (await client.wait(job_id, PATIENCE_S)).outcome == Outcome.OUTPUT_LIMIT
            await client.delete(job_id)
            allowed = (await client.start("head", args=["-c", str(MIB), "/dev/zero"], output_max_bytes=MIB)).job_id
            assert (await client.wait(allowed, PATIENCE_S)).outcome == Outcome.SUCCEEDED

    with (
        mounted(tmp_path / "ramfs", "ramfs", "mode=700") as folder,
        Worker(tmp_path, state_dir=folder / "state") as worker,
    ):
        warning = worker.wait_log("output.cannot_drop_head")
        assert warning["level"] == "warning"
        assert str(folder) in warning["folder"]
        asyncio.run(check(worker))


def test_a_file_system_that_can_is_not_warned_of(tmp_path: Path, state: Path) -> None:
    async def check(worker: Worker) -> None:
        async with worker.client() as client:
            assert (await client.worker()).can_drop_head

    with Worker(tmp_path) as worker:
        asyncio.run(check(worker))
        assert worker.log_events("output.cannot_drop_head") == []


# Retention


def files(state: Path) -> set[str]:
    return {path.name for path in (state / "output").iterdir()}


def finished(supervisor: SupervisorProcess) -> list[str]:
    with supervisor.reader() as reader:
        return [row.job_id for row in reader.oldest_finished(100_000, None)]


def run_some(supervisor: SupervisorProcess, count: int, argv: list[str] = programs.TRUE) -> list[str]:
    """One after the other, so that it is clear which is older; with one that runs before them, and one among them."""
    supervisor.run("running-first", programs.SLEEP)
    job_ids = []
    for number in range(count):
        if number == count // 2:
            supervisor.run("running", programs.SLEEP)
        job_ids.append(f"j{number}")
        supervisor.finish(job_ids[-1], argv)
    return job_ids


def assert_kept(supervisor: SupervisorProcess, state: Path, expected: list[str]) -> None:
    eventually_sync(lambda: finished(supervisor) == expected, PATIENCE_S, f"not {expected} are kept")
    names = {f"{job_id}.out" for job_id in [*expected, "running", "running-first"]}
    eventually_sync(lambda: files(state) == names, PATIENCE_S, "files do not match records")
    assert supervisor.record("running").state is JobState.RUNNING


def test_by_count(supervisor: SupervisorProcess, state: Path) -> None:
    job_ids = run_some(supervisor, 6)
    supervisor.client.hello(keep_jobs=2)
    assert_kept(supervisor, state, job_ids[4:])
    supervisor.client.hello(keep_jobs=1)
    assert_kept(supervisor, state, job_ids[5:])
    assert [event.sequence for event in supervisor.events()] == list(range(1, len(supervisor.events()) + 1))


def test_by_bytes(supervisor: SupervisorProcess, state: Path) -> None:
    job_ids = run_some(supervisor, 5, programs.flood(MIB))
    supervisor.client.hello(keep_bytes=3 * MIB + 4096)
    assert_kept(supervisor, state, job_ids[2:])


def test_by_age(supervisor: SupervisorProcess, state: Path) -> None:
    job_ids = run_some(supervisor, 3)
    first, second, third = (supervisor.record(job_id) for job_id in job_ids)
    assert first.finished_ns is not None
    assert second.finished_ns is not None
    assert third.finished_ns is not None
    supervisor.client.hello(keep_age_s=3600.0)
    assert_kept(supervisor, state, job_ids)
    # So that the first two are too old, and the third will not be for a while.
    eventually_sync(lambda: time.time_ns() - third.finished_ns > 20_000_000, PATIENCE_S)  # type: ignore[operator]
    supervisor.client.hello(keep_age_s=0.001)
    assert_kept(supervisor, state, [])


def test_many_go_in_small_steps(supervisor: SupervisorProcess, state: Path) -> None:
    """Meanwhile the supervisor answers as ever, and jobs run."""
    client = supervisor.client
    count = 400
    numbers = [client.send("start", **_start(f"j{number}")) for number in range(count)]
    for number in numbers:
        client.answer(number)
    eventually_sync(lambda: len(finished(supervisor)) == count, 60)
    other = supervisor.connect()
    client.hello(keep_jobs=1)
    rounds = 0
    while len(finished(supervisor)) > 1:
        other.ask("status")
        rounds += 1
    assert rounds > 3
    other.close()
    eventually_sync(lambda: len(files(state)) == 1, PATIENCE_S)


def _start(job_id: str) -> dict[str, Any]:
    return start_fields(job_id, programs.TRUE)


def test_it_goes_on_while_jobs_come_without_pause(supervisor: SupervisorProcess) -> None:
    client = supervisor.client
    client.hello(keep_jobs=10)
    outstanding: list[int] = []
    for number in range(1500):
        outstanding.append(client.send("start", **_start(f"j{number}")))
        if len(outstanding) > 30:
            client.answer(outstanding.pop(0))
        if number % 100 == 99:
            client.hello(keep_jobs=10 + number // 100 % 2)  # a look now, not in half a minute
    for number in outstanding:
        client.answer(number)
    assert len(finished(supervisor)) < 1200
    client.hello(keep_jobs=5)
    eventually_sync(lambda: len(finished(supervisor)) == 5, PATIENCE_S)


def test_events_are_dropped_only_when_logged(state: Path) -> None:
    with SupervisorProcess(state) as supervisor:
        for number in range(10):
            supervisor.finish(f"j{number}", programs.TRUE)
        latest = supervisor.events()[-1].sequence
        assert latest == 30
        supervisor.client.hello(keep_events=5)
        supervisor.client.ask("status")
        assert len(supervisor.events()) == 30  # no worker has logged any
        (state / frames.CURSOR_NAME).write_bytes((12).to_bytes(8, "little"))
        supervisor.client.hello(keep_events=6)
        eventually_sync(lambda: supervisor.events()[0].sequence == 13, PATIENCE_S, "those that are logged stay")
        (state / frames.CURSOR_NAME).write_bytes((30).to_bytes(8, "little"))
        supervisor.client.hello(keep_events=5)
        eventually_sync(lambda: supervisor.events()[0].sequence == 26, PATIENCE_S)
        supervisor.finish("more", programs.TRUE)
        sequences = [event.sequence for event in supervisor.events()]
        assert sequences == list(range(sequences[0], 34))
        assert 26 <= sequences[0] <= 29
        assert len(finished(supervisor)) == 11


def test_watching_from_before_the_record_begins(tmp_path: Path) -> None:
    """Skipped is what is gone: the first one received shows where the record begins, and from there no gap."""

    async def check(worker: Worker) -> None:
        async with worker.client() as client:
            received = []
            async for moved in client.watch(from_sequence=1):
                received.append(moved.sequence)
                if moved.sequence == 33:
                    break
            assert received == list(range(26, 34))

    state = tmp_path / "state"
    with SupervisorProcess(state) as supervisor:
        for number in range(11):
            supervisor.finish(f"j{number}", programs.TRUE)
        (state / frames.CURSOR_NAME).write_bytes((30).to_bytes(8, "little"))
        supervisor.client.hello(keep_events=8)
        eventually_sync(lambda: supervisor.events()[0].sequence == 26, PATIENCE_S)
        supervisor.hang_up()
        with Worker(tmp_path, state_dir=state) as worker:
            asyncio.run(check(worker))


def test_prune_by_hand(tmp_path: Path) -> None:
    async def run(worker: Worker) -> list[str]:
        async with worker.client() as client:
            job_ids = []
            for _ in range(4):
                job_ids.append((await client.start("head", args=["-c", "100000", "/dev/zero"])).job_id)
                await client.wait(job_ids[-1], PATIENCE_S)
            job_ids.append((await client.start("sleep", args=["999"])).job_id)
            return job_ids

    def prune(*arguments: str) -> list[str]:
        done: subprocess.CompletedProcess[str] = subprocess.run(
            [sys.executable, "-m", "worker_svc", "prune", "--addr", worker.address, *arguments],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.splitlines()

    with Worker(tmp_path) as worker:
        *job_ids, running = asyncio.run(run(worker))
        names = {f"{job_id}.out" for job_id in [*job_ids, running]}
        *listed, said = prune("--keep", "1", "--dry-run")
        assert listed == job_ids[:3]
        assert said.startswith("3 finished jobs would be removed, ")
        assert files(worker.path) == names
        *listed, said = prune("--keep", "1")
        assert listed == job_ids[:3]
        assert said.startswith("3 finished jobs removed, ")
        kept = {f"{job_id}.out" for job_id in (job_ids[3], running)}
        eventually_sync(lambda: files(worker.path) == kept, PATIENCE_S)
        assert prune("--older-than", "3600")[-1].startswith("0 finished jobs removed")
        assert prune("--max-bytes", "0")[:-1] == job_ids[3:]
        assert prune("--older-than", "0", "--keep", "0")[-1].startswith("0 finished jobs removed")
        assert worker.record(running).state is JobState.RUNNING


def test_files_left_by_a_supervisor_that_died_are_removed(state: Path) -> None:
    """Between the commit of a deletion and the unlinking. Never the files of a job, whatever its state."""
    with SupervisorProcess(state, slots=1) as supervisor:
        supervisor.finish("done", programs.BOTH_OUTPUTS, separate_stderr=True)
        supervisor.run("running", programs.SLEEP)
        supervisor.run("queued", programs.TRUE)
        supervisor.kill()
        keep = files(state) | {"notes.txt", ".hidden", "queued.out"}
        for name in ("notes.txt", ".hidden", "queued.out"):
            (state / "output" / name).write_text("x")
        for number in range(1000):
            (state / "output" / f"orphan-{number}.out").write_text("x")
        for name in ("orphan.err", "done.out.123-4.gone", "x.out.1.gone"):
            (state / "output" / name).write_text("x")
        supervisor.start()
        eventually_sync(lambda: files(state) == keep, PATIENCE_S, "orphans are left, or more is gone")
        supervisor.client.ask("status")
        supervisor.client.ask("stop", id="running", grace_s=0.0)
        assert supervisor.wait_finished("queued").outcome is Outcome.SUCCEEDED


def test_files_are_not_removed_for_want_of_the_store(state: Path) -> None:
    """Who loses the store shall not lose the output with it."""
    (state / "output").mkdir(parents=True)
    (state / "output" / "precious.out").write_text("x")
    process, said = SupervisorProcess(state).spawn()
    assert process.wait(PATIENCE_S) == 1
    assert "is missing, though there were jobs here (output/)" in said
    assert files(state) == {"precious.out"}


# Floors


def test_floors(tmp_path: Path) -> None:
    """Below them no new job is taken, and the answer says which, where, and what to do."""

    async def check(worker: Worker, folder: Path) -> None:
        async with worker.client() as client:
            before = await client.start("sleep", args=["999"])
            filler = folder / "filler"
            filler.write_bytes(bytes(6 * MIB))
            with pytest.raises(ResourceExhausted) as caught:
                await client.start("true")
            text = caught.value.message
            assert str(4 * MIB) in text
            assert "state.min_free_bytes" in text
            assert str(worker.path) in text
            assert (await client.job(before.job_id)).state == JobState.RUNNING
            filler.unlink()
            await client.wait((await client.start("true")).job_id, PATIENCE_S)

            many = [folder / f"f{number}" for number in range(os.statvfs(folder).f_favail - 20)]
            for path in many:
                path.touch()
            with pytest.raises(ResourceExhausted) as caught:
                await client.start("true")
            text = caught.value.message
            assert "inodes" in text
            assert " 50 " in text
            assert "state.min_free_inodes" in text
            assert str(worker.path) in text
            for path in many:
                path.unlink()
            await client.wait((await client.start("true")).job_id, PATIENCE_S)

    floors: dict[str, Any] = {"STATE_MIN_FREE_BYTES": str(4 * MIB), "STATE_MIN_FREE_INODES": "50"}
    with (
        mounted(tmp_path / "small", "tmpfs", "size=8m,nr_inodes=300,mode=700") as folder,
        Worker(tmp_path, state_dir=folder / "state", **floors) as worker,
    ):
        asyncio.run(check(worker, folder))


# A disk that is full


def fill(folder: Path) -> Path:
    """Leaves not a byte free; returns the file to remove to have space again."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert os.statvfs(folder).f_bavail == 0
    return filler


def test_a_full_disk(tmp_path: Path) -> None:
    """Filled by jobs, with the worker's log on it too: nothing recorded is lost, and neither process dies."""

    async def check(worker: Worker, folder: Path) -> None:
        supervisor = worker.supervisor_pid()
        async with worker.client() as client:
            go = tmp_path / "go"
            argv = programs.until_exists(go, 3)
            exits = (await client.start(argv[0], args=argv[1:])).job_id
            sleeps = (await client.start("sleep", args=["999"])).job_id
            before = worker.events()
            # A job fills the disk: its writes fail, which is its own affair.
            # Once it is on record as running: before, the answer to its start would wait for space too.
            fill_now = tmp_path / "fill"
            script = 'until [ -e "$1" ]; do sleep 0.02; done; cat /dev/zero; exec sleep 999'
            hog = (await client.start("sh", args=["-c", script, "sh", str(fill_now)])).job_id
            fill_now.touch()
            eventually_sync(lambda: os.statvfs(folder).f_bavail == 0, PATIENCE_S)
            filler = fill(folder)

            with pytest.raises(ResourceExhausted) as caught:
                await client.start("true", job_id="refused")
            assert "full" in caught.value.message or "free" in caught.value.message
            go.touch()
            pid = worker.record(exits).pid
            eventually_sync(lambda: not programs.state_of(pid), PATIENCE_S, "it was not reaped")
            pid = worker.record(sleeps).pid
            stopping = asyncio.create_task(client.stop(sleeps, grace_s=0.0))
            await asyncio.to_thread(eventually_sync, lambda: not programs.state_of(pid), PATIENCE_S, "not stopped")
            assert (await client.job(sleeps)).state in (JobState.RUNNING, JobState.STOPPING)
            with pytest.raises(ResourceExhausted):
                await client.start("true", job_id="refused")
            # The supervisor has nothing to do but to try again, a few times a second.
            await asyncio.to_thread(eventually_sync, lambda: programs.sleeps_for(supervisor, 0.05), message="it spins")

            hog_pid = worker.record(hog).pid
            os.kill(hog_pid, 9)
            filler.unlink()
            os.truncate(output_path(str(worker.path), hog), 0)
            await asyncio.wait_for(stopping, PATIENCE_S)
            assert (await client.wait(exits, PATIENCE_S)).exit_code == 3
            assert (await client.wait(sleeps, PATIENCE_S)).outcome == Outcome.STOPPED
            assert (await client.wait(hog, PATIENCE_S)).outcome == Outcome.SIGNALED
            started = await client.start("true", job_id="refused")
            assert not started.existed
            assert (await client.wait("refused", PATIENCE_S)).outcome == Outcome.SUCCEEDED
        events = worker.events()
        assert events[: len(before)] == before
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        assert worker.supervisor_pid() == supervisor
        assert worker.process is not None
        assert worker.process.poll() is None

    with (
        mounted(tmp_path / "small", "tmpfs", "size=3m,mode=700") as folder,
        Worker(tmp_path, state_dir=folder / "state", STATE_MIN_FREE_BYTES="0", STATE_MIN_FREE_INODES="0") as worker,
    ):
        asyncio.run(check(worker, folder))


def test_a_supervisor_that_starts_on_a_full_disk_still_drops_heads(tmp_path: Path) -> None:
    """What it cannot find out by writing it does not hold against jobs, which it would have to stop."""
    with (
        mounted(tmp_path / "small", "tmpfs", "size=16m,mode=700") as folder,
        SupervisorProcess(folder / "state") as supervisor,
    ):
        supervisor.run("j", writes(5 * MIB, 1, tmp_path / "begun", tmp_path / "go"), **capped(MIB))
        eventually_sync((tmp_path / "begun").exists, PATIENCE_S)
        filler = fill(folder)
        supervisor.kill()
        supervisor.start()
        assert supervisor.client.ask("status")["can_drop_head"]
        filler.unlink()
        (tmp_path / "go").touch()
        assert supervisor.wait_finished("j").outcome in (Outcome.SUCCEEDED, Outcome.LOST, Outcome.FAILED)
