"""Streams of output while an operator is at work on the files, and what a follower holds."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import aclosing
from pathlib import Path

import pytest

from tests.support import programs
from tests.support.streams import MIB, Following, Teller, collect, held, joined, run, start
from tests.support.waiting import eventually, eventually_sync
from tests.support.workers import PATIENCE_S, ROOT, Worker
from worker_svc.client import WorkerClient
from worker_svc.job import JobState, Outcome, Unavailable
from worker_svc.pb.jobscheduler import OutputChunk, OutputStream, OutputVia
from worker_svc.record.paths import output_path, stderr_path

pytestmark = pytest.mark.timeout(180)


def gaps(chunks: list[OutputChunk]) -> list[tuple[int, int]]:
    return [(chunk.offset, chunk.gap_bytes) for chunk in chunks if chunk.gap_bytes]


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
