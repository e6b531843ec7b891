"""The service: worker and supervisor as they are, called by the real client."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.support import programs
from tests.support.calls import start, wait
from tests.support.programs import group_of, is_alive
from tests.support.waiting import eventually
from tests.support.workers import PATIENCE_S, Worker, until
from worker_svc import (
    DeadlineExceeded,
    JobExists,
    JobNotFound,
    JobState,
    Outcome,
    PreconditionFailed,
    ResourceExhausted,
    WorkerClient,
    __version__,
)
from worker_svc.pb import jobscheduler as pb

Moves = list[tuple[str, str]]


async def test_start_tells_the_state(shared_client: WorkerClient) -> None:
    started = await shared_client.start("sleep", args=["999"])
    assert (started.state, started.existed) == (JobState.RUNNING, False)
    await shared_client.stop(started.job_id, wait=True)
    assert (await shared_client.job(started.job_id)).state == JobState.FINISHED


async def test_the_same_start_again(shared_client: WorkerClient) -> None:
    first = await shared_client.start("sleep", args=["999"], job_id="again", timeout_s=60)
    again = await shared_client.start("sleep", args=["999"], job_id="again", timeout_s=60)
    assert (first.existed, again.existed, again.job_id) == (False, True, "again")
    with pytest.raises(JobExists, match="job_id"):
        await shared_client.start("sleep", args=["999"], job_id="again", timeout_s=61)
    await shared_client.stop("again", wait=True)
    last = await shared_client.start("sleep", args=["999"], job_id="again", timeout_s=60)
    assert (last.existed, last.state) == (True, JobState.FINISHED)


async def test_many_of_the_same_start_at_once(shared_client: WorkerClient) -> None:
    answers = await asyncio.gather(*(shared_client.start("sleep", args=["999"], job_id="at-once") for _ in range(20)))
    assert [answer.existed for answer in answers].count(False) == 1
    assert {answer.state for answer in answers} == {JobState.RUNNING}
    await shared_client.stop("at-once", wait=True)


async def test_a_start_that_fails_is_on_record(shared_client: WorkerClient) -> None:
    for _ in range(2):
        with pytest.raises(PreconditionFailed, match=r"^command: 'no-such-command' was not found"):
            await shared_client.start("no-such-command", job_id="failed")
    answer = await shared_client.query("failed")
    assert (answer.done, answer.error) == (True, True)
    assert answer.job.outcome == Outcome.START_FAILED
    assert answer.error_text.startswith("command: 'no-such-command' was not found")
    assert answer.job.started_at is None


# Waiting


async def test_wait(shared_client: WorkerClient, tmp_path: Path) -> None:
    job_id = await start(shared_client, programs.until_exists(tmp_path / "go", 3))
    waiting = [asyncio.create_task(shared_client.wait(job_id)) for _ in range(5)]
    with pytest.raises(DeadlineExceeded, match=r"the job is RUNNING after 0\.05 s"):
        await shared_client.wait(job_id, 0.05)
    assert not any(task.done() for task in waiting)
    (tmp_path / "go").touch()
    for job in await asyncio.gather(*waiting):
        assert (job.outcome, job.exit_code) == (Outcome.FAILED, 3)
    assert (await shared_client.wait(job_id, 0)).exit_code == 3


async def test_stop_and_wait_until_the_callers_deadline(shared_client: WorkerClient) -> None:
    job_id = await start(shared_client, programs.IGNORE_TERM)
    await until(lambda: output_of(shared_client, job_id))
    with pytest.raises(DeadlineExceeded):
        await shared_client.stop(job_id, grace_s=600, wait=True, deadline_s=0.2)
    assert (await shared_client.job(job_id)).state == JobState.STOPPING  # that was done all the same
    await shared_client.stop(job_id, grace_s=0, wait=True)


async def test_stop_and_wait(shared_client: WorkerClient) -> None:
    """Answers when the whole job is gone, not as soon as it was asked."""
    job_id = await start(
        shared_client, ["sh", "-c", "trap '' TERM; sleep 999 & echo ready; while :; do sleep 999; done"]
    )
    pid = (await shared_client.job(job_id)).pid
    await until(lambda: output_of(shared_client, job_id))
    await shared_client.stop(job_id, grace_s=0.2, wait=True)
    job = await shared_client.job(job_id)
    assert (job.state, job.outcome, job.signal) == (JobState.FINISHED, Outcome.STOPPED, "SIGKILL")
    await eventually(lambda: not group_of(pid))


async def output_of(client: WorkerClient, job_id: str) -> bytes:
    return b"".join([chunk.data async for chunk in client.output(job_id)])


async def test_stop_without_waiting(shared_client: WorkerClient) -> None:
    job_id = await start(shared_client, programs.IGNORE_TERM)
    await until(lambda: output_of(shared_client, job_id))
    await shared_client.stop(job_id, grace_s=600)
    assert (await shared_client.job(job_id)).state == JobState.STOPPING
    await shared_client.stop(job_id, signal="KILL", wait=True)
    assert (await shared_client.job(job_id)).signal == "SIGKILL"
    await shared_client.stop(job_id)
    await shared_client.stop(job_id, wait=True)


async def test_unknown_jobs(shared_client: WorkerClient) -> None:
    calls: list[Awaitable[object]] = [
        shared_client.stop("unknown"),
        shared_client.query("unknown"),
        shared_client.wait("unknown", 1.0),
        shared_client.delete("unknown"),
    ]
    calls += [
        shared_client.signal("unknown", "TERM"),
        output_of(shared_client, "unknown"),
        shared_client.stop("unknown", wait=True),
    ]
    for call in calls:
        with pytest.raises(JobNotFound, match=r"^job not found$"):
            await call


# Signals, deleting


async def test_signal(shared_client: WorkerClient) -> None:
    job_id = await start(shared_client, programs.EXIT_ON_USR1)
    await until(lambda: output_of(shared_client, job_id))
    await shared_client.signal(job_id, "usr1")
    job = await wait(shared_client, job_id)
    assert (job.outcome, job.exit_code) == (Outcome.FAILED, 7)  # nobody asked it to stop
    with pytest.raises(PreconditionFailed, match="the job is FINISHED"):
        await shared_client.signal(job_id, "USR1")


async def test_a_deadly_signal_is_no_stop(shared_client: WorkerClient) -> None:
    job_id = await start(shared_client, programs.SLEEP)
    await shared_client.signal(job_id, "9")
    job = await wait(shared_client, job_id)
    assert (job.outcome, job.signal, job.error_text) == (Outcome.SIGNALED, "SIGKILL", "signal: killed")


async def test_delete(shared_client: WorkerClient) -> None:
    job_id = await start(shared_client, programs.SLEEP)
    with pytest.raises(PreconditionFailed, match="the job is RUNNING: stop it first"):
        await shared_client.delete(job_id)
    await shared_client.stop(job_id, wait=True)
    file = Path((await shared_client.job(job_id)).output_file)
    assert file.exists()
    await shared_client.delete(job_id)
    with pytest.raises(JobNotFound):
        await shared_client.job(job_id)
    await eventually(lambda: not file.exists())


# Listing


async def listed(client: WorkerClient, **filters: Any) -> list[str]:
    return [job.job_id async for job in client.list(**filters)]


async def test_list(shared_client: WorkerClient, tmp_path: Path) -> None:
    before = datetime.now(UTC)
    for number in range(7):
        labels = {"test": "list", "parity": str(number % 2)}
        await start(shared_client, programs.TRUE, job_id=f"list-{number}", labels=labels)
    await start(shared_client, programs.until_exists(tmp_path / "go"), job_id="list-r", labels={"test": "list"})
    for number in range(7):
        await wait(shared_client, f"list-{number}")
    mine = {"test": "list"}
    newest_first = ["list-r", *(f"list-{number}" for number in range(6, -1, -1))]
    assert await listed(shared_client, labels=mine) == newest_first
    for size in (1, 2, 3, 7, 8, 9):
        assert await listed(shared_client, labels=mine, page_size=size) == newest_first
    assert await listed(shared_client, labels={"test": "list", "parity": "1"}) == ["list-5", "list-3", "list-1"]
    assert await listed(shared_client, labels=mine, states=[JobState.RUNNING]) == ["list-r"]
    assert await listed(shared_client, labels=mine, states=[JobState.FINISHED]) == newest_first[1:]
    assert await listed(shared_client, labels=mine, states=[JobState.QUEUED]) == []
    assert await listed(shared_client, labels=mine, accepted_since=before) == newest_first
    assert await listed(shared_client, labels=mine, accepted_before=before) == []
    third = (await shared_client.job("list-3")).accepted_at
    assert third is not None
    since = await listed(shared_client, labels=mine, accepted_since=third)
    assert since == newest_first[:5]
    assert await listed(shared_client, labels=mine, accepted_before=third) == newest_first[5:]
    (tmp_path / "go").touch()


async def test_pages_hold_still_while_jobs_come_and_go(shared_client: WorkerClient) -> None:
    for number in range(5):
        await start(shared_client, programs.TRUE, job_id=f"page-{number}", labels={"test": "page"})
        await wait(shared_client, f"page-{number}")
    found = []
    async for job in shared_client.list(labels={"test": "page"}, page_size=2):
        found.append(job.job_id)
        if len(found) == 2:
            await shared_client.delete("page-2")
            await start(shared_client, programs.TRUE, job_id="page-new", labels={"test": "page"})
    assert found == ["page-4", "page-3", "page-1", "page-0"]


# The worker itself


async def test_what_the_worker_tells_of_itself(shared_client: WorkerClient, shared: Worker) -> None:
    job_id = await start(shared_client, programs.SLEEP)
    told = await shared_client.worker()
    assert (told.version, told.slots, told.queue_length) == (__version__, 100, 10_000)
    assert told.advertise_address == shared.address
    assert told.scheduler_worker_id == ""
    assert told.host == os.uname().nodename
    assert told.running >= 1
    assert told.queued == 0
    assert not told.draining
    assert told.containment
    assert told.supervisor_pid == shared.supervisor_pid()
    assert is_alive(told.supervisor_pid)
    for uptime in (told.uptime, told.supervisor_uptime):
        assert uptime is not None
        assert timedelta(0) < uptime < timedelta(minutes=10)
    assert told.last_sequence >= (await shared_client.job(job_id)).last_sequence
    await shared_client.stop(job_id, wait=True)


async def test_slots_and_queue(tmp_path: Path) -> None:
    with Worker(tmp_path, JOBS_SLOTS="1", JOBS_QUEUE_LENGTH="1") as worker:
        async with worker.client() as client:
            first = await client.start("sleep", args=["999"])
            second = await client.start("sleep", args=["999"])
            assert (first.state, second.state) == (JobState.RUNNING, JobState.QUEUED)
            with pytest.raises(ResourceExhausted, match="queue_length"):
                await client.start("true")
            told = await client.worker()
            assert (told.running, told.queued, told.slots, told.queue_length) == (1, 1, 1, 1)
            await client.stop(second.job_id, wait=True)
            job = await client.job(second.job_id)
            assert (job.outcome, job.pid, job.error_text) == (Outcome.STOPPED, 0, "stopped before it started")
            await client.stop(first.job_id, wait=True)


# Output


async def test_output_as_it_comes(shared_client: WorkerClient, tmp_path: Path) -> None:
    argv = ["sh", "-c", 'echo one; until [ -e "$1" ]; do sleep 0.02; done; echo two >&2', "sh", str(tmp_path / "go")]
    job_id = await start(shared_client, argv)
    received = b""
    async with asyncio.timeout(PATIENCE_S):
        async for chunk in shared_client.output(job_id, follow=True):
            assert chunk.offset == len(received)
            received += chunk.data
            if received == b"one\n":
                (tmp_path / "go").touch()
    assert received == b"one\ntwo\n"
    job = await shared_client.job(job_id)
    assert (job.state, job.output_size_bytes) == (JobState.FINISHED, 8)


async def test_output_of_a_queued_job_is_followed_to_its_end(tmp_path: Path) -> None:
    with Worker(tmp_path, JOBS_SLOTS="1") as worker:
        async with worker.client() as client:
            await start(client, programs.until_exists(tmp_path / "go"))
            job_id = await start(client, programs.echo("late"))

            async def follow() -> bytes:
                return b"".join([chunk.data async for chunk in client.output(job_id, follow=True)])

            following = asyncio.create_task(follow())
            (tmp_path / "go").touch()
            async with asyncio.timeout(PATIENCE_S):
                assert await following == b"late"


async def test_output_streams_by_name(shared_client: WorkerClient) -> None:
    merged = await start(shared_client, programs.BOTH_OUTPUTS)
    apart = await start(shared_client, programs.BOTH_OUTPUTS, separate_stderr=True)
    await wait(shared_client, merged)
    await wait(shared_client, apart)

    async def read(job_id: str, stream: int) -> bytes:
        return b"".join([chunk.data async for chunk in shared_client.output(job_id, stream=stream)])

    assert await read(merged, pb.OutputStream.MERGED) == b"to stdout\nto stderr\n"
    assert await read(apart, pb.OutputStream.STDOUT) == b"to stdout\n"
    assert await read(apart, pb.OutputStream.STDERR) == b"to stderr\n"
    for job_id, stream in ((merged, pb.OutputStream.STDERR), (merged, pb.OutputStream.STDOUT), (apart, 1)):
        with pytest.raises(PreconditionFailed, match=r"^stream: "):
            await read(job_id, stream)
    assert await read(apart, 0) == b"to stdout\n"
