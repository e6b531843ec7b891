"""Streams of output as clients see them: the real worker, the real client, over gRPC."""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import aclosing
from pathlib import Path

import pytest
from grpclib.client import Channel
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from tests.support import programs
from tests.support.streams import MIB, Following, Teller, collect, held, joined, run, start
from tests.support.waiting import eventually
from tests.support.workers import PATIENCE_S, Worker
from worker_svc.client import WorkerClient
from worker_svc.job import InvalidArgument, JobNotFound, JobState, Outcome, OutOfRange, PreconditionFailed
from worker_svc.pb.jobscheduler import OutputStream, StreamJobReq, WorkerStub
from worker_svc.record.paths import output_path

pytestmark = pytest.mark.timeout(180)


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
