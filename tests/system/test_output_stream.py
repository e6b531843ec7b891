"""Streams of output as clients see them: the real worker, the real client, over gRPC."""

from __future__ import annotations

import asyncio
import hashlib
import json
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final

import pytest
from grpclib.client import Channel
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from tests.support import programs
from tests.support.waiting import eventually, eventually_sync
from tests.support.workers import PATIENCE_S, ROOT, Worker
from worker_svc.client import WorkerClient
from worker_svc.job import InvalidArgument, JobNotFound, JobState, Outcome, OutOfRange, PreconditionFailed, Unavailable
from worker_svc.pb.jobscheduler import OutputChunk, OutputStream, OutputVia, StreamJobReq, WorkerStub
from worker_svc.record.store import output_path, stderr_path

pytestmark = pytest.mark.timeout(180)
MIB: Final = 1 << 20


@pytest.fixture(scope="module")
def shared_keys() -> dict[str, Any]:
    return {"JOBS_SLOTS": "100"}


async def start(client: WorkerClient, argv: list[str], **options: Any) -> str:
    return (await client.start(argv[0], args=argv[1:], **options)).job_id


async def run(client: WorkerClient, argv: list[str], **options: Any) -> str:
    job_id = await start(client, argv, **options)
    await client.wait(job_id, PATIENCE_S)
    return job_id


async def collect(client: WorkerClient, job_id: str, **options: Any) -> list[OutputChunk]:
    async with asyncio.timeout(60):
        return [chunk async for chunk in client.output(job_id, **options)]


def joined(chunks: list[OutputChunk], at: int = 0) -> bytes:
    """The data of chunks that follow one on another."""
    for chunk in chunks:
        assert chunk.offset == at
        assert bool(chunk.data) != bool(chunk.gap_bytes)
        at += len(chunk.data) or chunk.gap_bytes
    return b"".join(chunk.data for chunk in chunks)


def gaps(chunks: list[OutputChunk]) -> list[tuple[int, int]]:
    return [(chunk.offset, chunk.gap_bytes) for chunk in chunks if chunk.gap_bytes]


class Following:
    """A stream that is read as it comes, in a task of its own."""

    def __init__(self, client: WorkerClient, job_id: str, **options: Any) -> None:
        self.chunks: list[OutputChunk] = []
        self._task = asyncio.create_task(self._read(client.output(job_id, follow=True, **options)))

    async def _read(self, chunks: Any) -> None:
        async with aclosing(chunks):
            async for chunk in chunks:
                self.chunks.append(chunk)

    @property
    def data(self) -> bytes:
        return b"".join(chunk.data for chunk in self.chunks)

    async def until(self, data: bytes) -> None:
        await eventually(lambda: self._task.done() or self.data == data, PATIENCE_S)
        assert self.data == data
        assert not self._task.done()

    async def end(self) -> list[OutputChunk]:
        async with asyncio.timeout(PATIENCE_S):
            await self._task
        return self.chunks

    async def leave(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])


def held(worker: Worker, path: str) -> tuple[int, int]:
    """How often the worker has this file open, and how many inotify watches it has in all."""
    files = watches = 0
    for fd in Path(f"/proc/{worker.pid}/fd").iterdir():
        try:
            link = str(fd.readlink())
            files += link.removesuffix(" (deleted)") == path
            if "inotify" in link:
                watches += Path(f"/proc/{worker.pid}/fdinfo/{fd.name}").read_text().count("inotify wd:")
        except FileNotFoundError:
            continue
    return files, watches


# A job says what it is told to: each line of a fifo that the test writes.
class Teller:
    """A job whose every word is the test's: `tell` has it write, `end` has it exit."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / f"{name}.fifo"
        os.mkfifo(self.path)
        self.argv = ["sh", "-c", 'exec cat "$1"', "sh", str(self.path)]
        self._fd = -1

    def open(self) -> None:
        self._fd = os.open(self.path, os.O_RDWR)  # not to wait for the job

    def tell(self, data: bytes) -> None:
        os.write(self._fd, data)

    def end(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Teller:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.end()
        except OSError:
            return


@pytest.fixture
def teller(tmp_path: Path) -> Iterator[Teller]:
    with Teller(tmp_path, "teller") as one:
        yield one


# The end of a stream


async def test_a_job_is_done_when_its_process_is(shared_client: WorkerClient, shared: Worker) -> None:
    """And its stream: nobody waits for the child that has the output open still."""
    job_id = await start(shared_client, ["sh", "-c", "echo out; sleep 999 & exit 3"])
    assert joined(await collect(shared_client, job_id, follow=True)) == b"out\n"
    job = await shared_client.wait(job_id, PATIENCE_S)
    assert (job.outcome, job.exit_code, job.error_text) == (Outcome.FAILED, 3, "exit status 3")
    assert job.wall_time is not None
    assert job.wall_time.total_seconds() < PATIENCE_S / 2
    assert job.output_size_bytes == 4


@pytest.mark.parametrize(
    "options",
    [{}, {"tail_lines": 5}, {"tail_bytes": 5}, {"offset": 0}, {"tail_lines": 0}, {"tail_bytes": 0}],
    ids=str,
)
@pytest.mark.parametrize("follow", [False, True])
async def test_no_output(shared_client: WorkerClient, follow: bool, options: dict[str, int]) -> None:
    job_id = await start(shared_client, programs.TRUE)
    assert await collect(shared_client, job_id, follow=follow, **options) == []
    await shared_client.wait(job_id, PATIENCE_S)
    assert await collect(shared_client, job_id, follow=follow, **options) == []


async def test_binary_without_a_final_newline(shared_client: WorkerClient, tmp_path: Path) -> None:
    data = bytes(range(256)) * 4096 + b"\0" * 300_000 + b"\xff\xfe\r\n\n\x1b[0m" + b"\0" * 5
    source = tmp_path / "source"
    source.write_bytes(data)
    job_id = await start(shared_client, ["cat", str(source)])
    assert joined(await collect(shared_client, job_id, follow=True)) == data
    assert joined(await collect(shared_client, job_id)) == data
    assert joined(await collect(shared_client, job_id, tail_bytes=7), len(data) - 7) == data[-7:]
    assert joined(await collect(shared_client, job_id, offset=1000), 1000) == data[1000:]
    assert joined(await collect(shared_client, job_id, tail_lines=1), len(data) - 9) == data[-9:]


async def test_a_line_of_a_hundred_megabytes(shared_client: WorkerClient) -> None:
    size = 100 * 1_000_000
    code = f"import os\nfor _ in range(100): os.write(1, b'x' * 1_000_000)\nos.write(1, b'{'END'}')"
    job_id = await run(shared_client, programs.python(code))
    counted = hashlib.sha256()
    at = 0
    async for chunk in shared_client.output(job_id, tail_lines=1):
        assert chunk.offset == at
        counted.update(chunk.data)
        at += len(chunk.data)
    assert at == size + 3
    assert counted.digest() == hashlib.sha256(b"x" * size + b"END").digest()
    await shared_client.delete(job_id)


async def test_last_lines(shared_client: WorkerClient) -> None:
    job_id = await run(shared_client, programs.echo("one\ntwo\nthree"))
    assert joined(await collect(shared_client, job_id, tail_lines=1), 8) == b"three"
    assert joined(await collect(shared_client, job_id, tail_lines=2), 4) == b"two\nthree"
    assert joined(await collect(shared_client, job_id, tail_lines=9)) == b"one\ntwo\nthree"
    assert await collect(shared_client, job_id, tail_lines=0) == []


async def test_what_is_there_and_what_follows(shared_client: WorkerClient, teller: Teller) -> None:
    job_id = await start(shared_client, teller.argv)
    followers = [Following(shared_client, job_id), Following(shared_client, job_id)]
    teller.tell(b"one\ntwo\n")
    for follower in followers:
        await follower.until(b"one\ntwo\n")
    assert joined(await collect(shared_client, job_id)) == b"one\ntwo\n"
    last, later = Following(shared_client, job_id, tail_lines=1), Following(shared_client, job_id, tail_bytes=0)
    await last.until(b"two\n")
    assert (await shared_client.job(job_id)).output_size_bytes == 8
    teller.tell(b"three")
    await last.until(b"two\nthree")
    teller.end()
    for follower in followers:
        assert joined(await follower.end()) == b"one\ntwo\nthree"
    assert joined(await last.end(), 4) == b"two\nthree"
    assert b"three".endswith(joined(await later.end(), later.chunks[0].offset if later.chunks else 0))


# What is asked for wrongly


async def test_offset_beyond_the_end(shared_client: WorkerClient, teller: Teller) -> None:
    job_id = await start(shared_client, teller.argv)
    teller.tell(b"12345")
    first = Following(shared_client, job_id)
    await first.until(b"12345")
    for follow in (False, True):
        with pytest.raises(OutOfRange) as caught:
            await collect(shared_client, job_id, offset=6, follow=follow)
        assert "offset 6 " in caught.value.message
        assert "5 bytes" in caught.value.message
    assert await collect(shared_client, job_id, offset=5) == []
    resumed = Following(shared_client, job_id, offset=5)
    teller.tell(b"6")
    await resumed.until(b"6")
    teller.end()
    assert joined(await resumed.end(), 5) == b"6"
    await first.end()
    for follow in (False, True):
        with pytest.raises(OutOfRange, match=r"offset 7 .*6 bytes"):
            await collect(shared_client, job_id, offset=7, follow=follow)
        assert await collect(shared_client, job_id, offset=6, follow=follow) == []
    with pytest.raises(OutOfRange, match=str(2**64 - 1)):
        await collect(shared_client, job_id, offset=2**64 - 1)


async def test_unknown_jobs_and_streams(shared_client: WorkerClient, shared: Worker) -> None:
    with pytest.raises(JobNotFound, match="job not found"):
        await collect(shared_client, "nobody", follow=True)
    with pytest.raises(InvalidArgument):
        await collect(shared_client, "../../etc/passwd")
    job_id = await run(shared_client, programs.echo("x"))
    for stream in (OutputStream.STDERR, OutputStream.STDOUT):
        with pytest.raises(PreconditionFailed, match=r"stream: .*MERGED"):
            await collect(shared_client, job_id, stream=stream)
    with pytest.raises(InvalidArgument, match="offset and tail_lines"):
        await collect(shared_client, job_id, offset=0, tail_lines=1)
    host, _, port = shared.address.rpartition(":")
    channel = Channel(host, int(port))
    try:
        with pytest.raises(GRPCError) as caught:
            async for _ in WorkerStub(channel).stream_job(StreamJobReq(job_id=job_id, stream=9)):  # type: ignore[arg-type]
                pass
    finally:
        channel.close()
    assert caught.value.status is Status.INVALID_ARGUMENT
    assert "stream" in (caught.value.message or "")


# Both streams, and jobs that do not run


async def test_separate_standard_error(shared_client: WorkerClient) -> None:
    code = "import os\nfor i in range(20000):\n  os.write(1, b'o%07d' % i); os.write(2, b'e%011d' % i)"
    job_id = await start(shared_client, programs.python(code), separate_stderr=True)
    out, err = await asyncio.gather(
        collect(shared_client, job_id, stream=OutputStream.STDOUT, follow=True),
        collect(shared_client, job_id, stream=OutputStream.STDERR, follow=True),
    )
    assert joined(out) == b"".join(b"o%07d" % i for i in range(20000))
    assert joined(err) == b"".join(b"e%011d" % i for i in range(20000))
    job = await shared_client.job(job_id)
    assert (job.output_size_bytes, job.stderr_size_bytes) == (160_000, 240_000)
    assert joined(await collect(shared_client, job_id)) == joined(out)
    with pytest.raises(OutOfRange, match=r"offset 240001 .*240000 bytes"):
        await collect(shared_client, job_id, stream=OutputStream.STDERR, offset=240_001)
    with pytest.raises(PreconditionFailed, match="STDOUT or STDERR"):
        await collect(shared_client, job_id, stream=OutputStream.MERGED)


async def test_followed_while_it_waits_for_a_slot(tmp_path: Path) -> None:
    with Worker(tmp_path, JOBS_SLOTS="1") as worker:
        async with worker.client() as client:
            go = tmp_path / "go"
            first = await start(client, programs.until_exists(go))
            queued = await start(client, programs.echo("at last"))
            unlucky = await start(client, programs.echo("never"))
            assert (await client.job(queued)).state == JobState.QUEUED
            follower, other = Following(client, queued), Following(client, unlucky)
            await eventually(lambda: held(worker, "")[1] >= 1, PATIENCE_S, "nobody waits for the file")
            assert await collect(client, queued) == []
            await client.stop(unlucky)
            assert await other.end() == []
            go.touch()
            assert joined(await follower.end()) == b"at last"
            await client.wait(first, PATIENCE_S)
            assert held(worker, "")[1] == 0


async def test_that_could_not_start(shared_client: WorkerClient) -> None:
    with pytest.raises(PreconditionFailed):
        await start(shared_client, ["/nowhere/nothing"], job_id="no-such-program")
    assert (await shared_client.job("no-such-program")).outcome == Outcome.START_FAILED
    assert await collect(shared_client, "no-such-program", follow=True) == []


async def test_of_a_deleted_job(shared_client: WorkerClient, shared: Worker) -> None:
    job_id = await run(shared_client, programs.flood(20 * MIB))
    path = output_path(str(shared.path), job_id)
    # A connection of its own, which what is not read yet may fill.
    async with shared.client() as other, aclosing(other.output(job_id, follow=True)) as chunks:
        received = len((await anext(chunks)).data)
        await shared_client.delete(job_id)
        for follow in (False, True):
            with pytest.raises(JobNotFound):
                await collect(shared_client, job_id, follow=follow)
        # Who began in time has it to the end.
        async for chunk in chunks:
            assert chunk.offset == received
            received += len(chunk.data)
    assert received == 20 * MIB
    await eventually(lambda: not Path(path).exists(), PATIENCE_S)
    await eventually(lambda: held(shared, path)[0] == 0, PATIENCE_S, "the deleted file is held open")


# An operator at work


@pytest.mark.parametrize("via", [OutputVia.PIPE, OutputVia.FILE])
async def test_output_removed_while_it_runs(
    shared_client: WorkerClient, shared: Worker, teller: Teller, via: OutputVia
) -> None:
    """Who follows already gets all there is; nobody hangs."""
    job_id = await start(shared_client, teller.argv, output_via=via)
    before = Following(shared_client, job_id)
    teller.tell(b"before ")
    await before.until(b"before ")
    Path(output_path(str(shared.path), job_id)).unlink()
    late = Following(shared_client, job_id)
    teller.tell(b"after")
    await before.until(b"before after")
    assert await collect(shared_client, job_id) == []
    teller.tell(b" last words")
    teller.end()
    assert joined(await before.end()) == b"before after last words"
    assert joined(await late.end()) == b""
    assert (await shared_client.wait(job_id, PATIENCE_S)).outcome == Outcome.SUCCEEDED
    known = [(0, len(b"before after last words"))] if via == OutputVia.PIPE else []
    assert gaps(await collect(shared_client, job_id, follow=True)) == known


@pytest.mark.parametrize("via", [OutputVia.PIPE, OutputVia.FILE])
async def test_output_truncated_while_it_runs(
    shared_client: WorkerClient, shared: Worker, teller: Teller, via: OutputVia
) -> None:
    """Offsets are places in the file: it goes on at the next block, and all before is a gap."""
    job_id = await start(shared_client, teller.argv, output_via=via)
    follower = Following(shared_client, job_id)
    teller.tell(b"0123456789")
    await follower.until(b"0123456789")
    path = output_path(str(shared.path), job_id)
    os.truncate(path, 0)
    teller.tell(b"abc")
    await follower.until(b"0123456789abc")
    new = Following(shared_client, job_id)
    await new.until(b"abc")
    teller.tell(b"def")
    teller.end()
    assert joined(await follower.end()) == b"0123456789abcdef"
    assert gaps(follower.chunks) == [(10, 4086)]
    assert joined(await new.end()) == b"abcdef"
    assert gaps(new.chunks) == [(0, 4096)]
    job = await shared_client.job(job_id)
    assert (job.output_size_bytes, job.output_loss) == (4102, "10 bytes were truncated")


@pytest.mark.parametrize("follow", [False, True])
async def test_output_of_a_finished_job_cut_short(shared_client: WorkerClient, shared: Worker, follow: bool) -> None:
    """What the record says was there and is not is told as a gap."""
    job_id = await run(shared_client, programs.echo("0123456789"))
    path = Path(output_path(str(shared.path), job_id))
    os.truncate(path, 4)
    chunks = await collect(shared_client, job_id, follow=follow)
    assert (joined(chunks), gaps(chunks)) == (b"0123", [(4, 6)])
    with path.open("ab") as file:
        file.write(b"rather more than there was")
    chunks = await collect(shared_client, job_id, follow=follow)
    assert (joined(chunks), gaps(chunks)) == (b"0123rather", [])
    path.unlink()
    for options, expected in (({}, (0, 10)), ({"offset": 3}, (3, 7)), ({"tail_bytes": 2}, (8, 2))):
        assert gaps(await collect(shared_client, job_id, follow=follow, **options)) == [expected]
    path.mkdir()
    try:
        with pytest.raises(Unavailable, match="cannot open"):
            await collect(shared_client, job_id, follow=follow)
    finally:
        path.rmdir()


# What a follower holds


async def test_who_leaves_frees_everything_at_once(shared_client: WorkerClient, shared: Worker, teller: Teller) -> None:
    job_id = await start(shared_client, teller.argv, separate_stderr=True)
    paths = [output_path(str(shared.path), job_id), stderr_path(str(shared.path), job_id)]
    await eventually(lambda: held(shared, "")[1] == 0, PATIENCE_S, "watches of other tests")

    def holds(files: int, watches: int) -> None:
        def as_expected() -> bool:
            found = [held(shared, path) for path in paths]
            return [one for one, _ in found] == [files, files] and found[0][1] == watches

        eventually_sync(as_expected, PATIENCE_S, f"not {files} files and {watches} watches")

    followers = [
        Following(shared_client, job_id, stream=stream)
        for stream in (OutputStream.STDOUT, OutputStream.STDERR)
        for _ in range(5)
    ]
    teller.tell(b"x")
    for follower in followers[:5]:
        await follower.until(b"x")
    await asyncio.to_thread(holds, 1, 2)  # shared
    for follower in followers[1:5] + followers[6:]:
        await follower.leave()
    await asyncio.to_thread(holds, 1, 2)
    for follower in (followers[0], followers[5]):
        await follower.leave()
    await asyncio.to_thread(holds, 0, 0)

    # A client that hangs up, and one that dies.
    async with shared.client() as other:
        hangs_up = Following(other, job_id)
        await hangs_up.until(b"x")
        await asyncio.to_thread(eventually_sync, lambda: held(shared, paths[0]) == (1, 1), PATIENCE_S)
    await asyncio.wait([hangs_up._task])
    with pytest.raises(Unavailable):
        hangs_up._task.result()
    await asyncio.to_thread(holds, 0, 0)
    dies = cli(shared, "logs", "-f", job_id, stdout=subprocess.PIPE)
    await asyncio.to_thread(eventually_sync, lambda: held(shared, paths[0]) == (1, 1), PATIENCE_S)
    dies.kill()
    dies.communicate()
    await asyncio.to_thread(holds, 0, 0)
    teller.end()
    await shared_client.wait(job_id, PATIENCE_S)


async def test_a_stream_that_is_not_read_delays_nothing_else(shared_client: WorkerClient) -> None:
    job_id = await run(shared_client, programs.flood(16 * MIB))
    async with aclosing(shared_client.output(job_id)) as unread:
        await anext(unread)
        async with asyncio.timeout(PATIENCE_S):
            read = sum([len(chunk.data) async for chunk in shared_client.output(job_id)])
        assert read == 16 * MIB


def cli(worker: Worker, *arguments: str, stdout: int = subprocess.PIPE) -> subprocess.Popen[bytes]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest may run with it ignored
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "worker_svc", arguments[0], "--addr", worker.address, *arguments[1:]],
            cwd=worker.tmp_path,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
        )
    finally:
        signal.signal(signal.SIGINT, before)


async def test_ctrl_c(shared_client: WorkerClient, shared: Worker, teller: Teller) -> None:
    """In `logs -f` it leaves the job alone, in `run` it asks the job to stop."""
    job_id = await start(shared_client, teller.argv)
    teller.tell(b"x\n")
    shown = cli(shared, "logs", "-f", job_id)
    assert shown.stdout is not None
    assert await asyncio.to_thread(shown.stdout.readline) == b"x\n"
    shown.send_signal(signal.SIGINT)
    await asyncio.to_thread(shown.communicate)
    assert shown.returncode == 130
    assert (await shared_client.job(job_id)).state == JobState.RUNNING
    teller.end()
    await shared_client.wait(job_id, PATIENCE_S)

    attached = cli(shared, "run", "--", "sh", "-c", "echo $WORKER_JOB_ID; exec sleep 999")
    assert attached.stdout is not None
    job_id = (await asyncio.to_thread(attached.stdout.readline)).decode().strip()
    attached.send_signal(signal.SIGINT)
    await asyncio.to_thread(attached.communicate)
    assert attached.returncode not in (0, None)
    assert (await shared_client.job(job_id)).outcome == Outcome.STOPPED


async def test_logs(shared_client: WorkerClient, shared: Worker) -> None:
    job_id = await run(shared_client, ["sh", "-c", "printf '1\\n2\\n3\\n'; echo e >&2"], separate_stderr=True)

    async def logs(*arguments: str) -> bytes:
        out, err = await asyncio.to_thread(cli(shared, "logs", *arguments, job_id).communicate)
        assert err == b""
        return out

    assert await logs() == b"1\n2\n3\n"
    assert await logs("-f", "--tail", "2") == b"2\n3\n"
    assert await logs("--since-offset", "3") == b"\n3\n"
    assert await logs("--stderr") == b"e\n"


# A worker that comes and goes


async def test_a_worker_that_leaves_sends_its_followers_on(tmp_path: Path) -> None:
    with Worker(tmp_path, GRPC_SERVER_ADDR=f"unix:{tmp_path}/w") as worker, Teller(tmp_path, "t") as teller:
        async with worker.client() as client:
            job_id = await start(client, teller.argv)
            teller.tell(b"one ")
            follower = Following(client, job_id)
            await follower.until(b"one ")
            assert await asyncio.to_thread(worker.terminate) == 0
            with pytest.raises(Unavailable):
                await follower.end()
            teller.tell(b"two ")
            await asyncio.to_thread(worker.start)
            resumed = Following(client, job_id, offset=4)
            await resumed.until(b"two ")
            await asyncio.to_thread(worker.kill)
            with pytest.raises(Unavailable):
                await resumed.end()
            teller.tell(b"three")
            teller.end()  # it ends while no worker is there
            await asyncio.to_thread(eventually_sync, lambda: not programs.is_alive(worker.record(job_id).pid))
            await asyncio.to_thread(worker.start)
            assert joined(await collect(client, job_id, offset=8, follow=True), 8) == b"three"


# So many, and a worker killed under them

# Writes all but the last argv[2] bytes of argv[1], then waits for the file argv[3]: blocks of 64 KiB that differ.
_WRITER: Final = """
import os, random, sys, time
total, last, go = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
block = random.Random(1).randbytes(65528)
for at in range(0, total, 65536):
    while at >= total - last and not os.path.exists(go): time.sleep(0.005)
    data = at.to_bytes(8, "little") + block
    while data: data = data[os.write(1, data):]
"""


def expected_digest(total: int) -> bytes:
    import random

    block = random.Random(1).randbytes(65528)
    digest = hashlib.sha256()
    for at in range(0, total, 65536):
        digest.update(at.to_bytes(8, "little"))
        digest.update(block)
    return digest.digest()


# Kinds of followers: "whole" reads all of it; "live" begins just before the end as it is; "slow" is as "whole", but
# after its first chunk reads nothing until the others of its process have ended; "leaver" goes after its first chunk.
def follower_process(given: dict[str, Any]) -> None:
    """The body of a client process: follows the job as told, over as many connections as that takes, and says how it
    went, one line for each follower."""
    with open(given["file"], "rb") as file:
        asyncio.run(_Followers(given, file.fileno()).run())


class _Followers:
    def __init__(self, given: dict[str, Any], fd: int) -> None:
        self._given = given
        self._fd = fd
        self._busy = sum(kind in ("whole", "live") for kind in given["kinds"])
        self._others_done = asyncio.Event()
        self._unready = len(given["kinds"])

    async def run(self) -> None:
        kinds: list[str] = self._given["kinds"]
        groups = [[kind] for kind in kinds if kind == "slow"]
        rest = [kind for kind in kinds if kind != "slow"]
        groups += [rest[at : at + 90] for at in range(0, len(rest), 90)]
        async with asyncio.TaskGroup() as tasks:
            for group in groups:
                tasks.create_task(self._over_one_connection(group))

    async def _over_one_connection(self, kinds: list[str]) -> None:
        async with WorkerClient(self._given["address"]) as client, asyncio.TaskGroup() as tasks:
            for kind in kinds:
                tasks.create_task(self._follow(client, kind))

    async def _follow(self, client: WorkerClient, kind: str) -> None:
        begin = at = self._given["live_from"] if kind == "live" else 0
        resumed = 0
        while True:
            try:
                async with aclosing(client.output(self._given["job"], offset=at, follow=True)) as chunks:
                    async for chunk in chunks:
                        assert chunk.offset == at, f"{chunk.offset} after {at}"
                        assert not chunk.gap_bytes
                        assert chunk.data == os.pread(self._fd, len(chunk.data), at), f"at {at}"
                        is_first = at == begin
                        at += len(chunk.data)
                        if is_first:
                            self._on_first()
                            if kind == "leaver":
                                break
                            if kind == "slow":
                                await self._others_done.wait()
                break
            except Unavailable:
                resumed += 1
                await asyncio.sleep(0.05)  # the worker is away
        if kind in ("whole", "live"):
            self._busy -= 1
            if not self._busy:
                self._others_done.set()
        print(json.dumps({"kind": kind, "begin": begin, "end": at, "resumed": resumed}), flush=True)

    def _on_first(self) -> None:
        self._unready -= 1
        if not self._unready:
            print(json.dumps("ready"), flush=True)


class _ClientProcess:
    def __init__(self, given: dict[str, Any]) -> None:
        code = (
            "import json, sys\n"
            f"from {__name__.removeprefix('main.')} import follower_process\n"
            "follower_process(json.loads(sys.argv[1]))"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(given)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> _ClientProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def wait_ready(self) -> list[dict[str, Any]]:
        """Every follower has had something. Returns the reports of those that left already."""
        assert self._process.stdout is not None
        reports: list[dict[str, Any]] = []
        while True:
            line = self._process.stdout.readline()
            assert line, f"a client process ended with {self._process.wait()}"
            if (said := json.loads(line)) == "ready":
                return reports
            reports.append(said)

    def wait_reports(self) -> list[dict[str, Any]]:
        with self._process:
            out, _ = self._process.communicate()
        assert self._process.returncode == 0
        return [json.loads(line) for line in out.splitlines()]


@pytest.mark.parametrize(
    "followers",
    [pytest.param(100, id="100"), pytest.param(1000, id="1000", marks=pytest.mark.long)],
)
def test_many_followers_and_a_worker_killed_under_them(tmp_path: Path, followers: int) -> None:
    """200 MB; a thousand that read all of it would be 200 GB, so most of them follow its last part, live.

    WHOLE_FOLLOWERS=N has N of them read all.
    """
    whole = int(os.environ.get("WHOLE_FOLLOWERS", "4"))
    total, last, go = 200 * MIB, MIB // 2, tmp_path / "go"
    with Worker(tmp_path, GRPC_SERVER_ADDR=f"unix:{tmp_path}/w", OUTPUT_MAX_BYTES="0") as worker:
        argv = programs.python(_WRITER, str(total), str(last), str(go))
        asyncio.run(_start(worker, argv))
        path = Path(output_path(str(worker.path), "written"))
        eventually_sync(lambda: path.stat().st_size == total - last, 60, "the job does not write")
        common = {"address": worker.address, "job": "written", "file": str(path), "live_from": total - last - 65536}
        kinds = ["whole"] * whole + ["slow"] * 2 + ["leaver"] * (followers // 20)
        kinds += ["live"] * (followers - len(kinds))
        with (
            _ClientProcess({**common, "kinds": kinds[::2]}) as one,
            _ClientProcess({**common, "kinds": kinds[1::2]}) as two,
        ):
            reports = one.wait_ready() + two.wait_ready()
            worker.kill()
            go.touch()  # the job writes on with no worker there
            worker.start()
            reports += one.wait_reports() + two.wait_reports()
        record = worker.wait_finished("written")
        assert (record.outcome, record.output_size_bytes) == (Outcome.SUCCEEDED, total)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            assert hashlib.sha256(content).digest() == expected_digest(total)
        assert len(reports) == followers
        for report in reports:
            if report["kind"] == "leaver":
                assert report["end"] > 0
            else:
                assert report["end"] == total, report
        # They were under way when it was killed.
        assert sum(report["resumed"] > 0 for report in reports) >= followers * 0.9
        eventually_sync(lambda: held(worker, str(path)) == (0, 0), PATIENCE_S, "something is still held")


async def _start(worker: Worker, argv: list[str]) -> None:
    async with worker.client() as client:
        await start(client, argv, job_id="written")
