"""What clients can ask of a worker, by our own client: the real worker, and real jobs."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest

from tests.support import programs
from tests.support.programs import group_of, is_alive
from tests.support.waiting import eventually
from tests.support.workers import PATIENCE_S, Worker, until
from worker_svc import (
    DeadlineExceeded,
    InvalidArgument,
    JobExists,
    JobNotFound,
    JobState,
    Outcome,
    OutOfRange,
    PreconditionFailed,
    ResourceExhausted,
    Unavailable,
    WorkerClient,
    __version__,
)
from worker_svc.access.guard import CALL, Call, Gate
from worker_svc.access.roles import RPCS, Caller, Role
from worker_svc.feed import Feed
from worker_svc.job import JobSpec, Transition
from worker_svc.job import JobState as State
from worker_svc.masking import Masker
from worker_svc.pb import jobscheduler as pb
from worker_svc.reading import LongReads
from worker_svc.record.store import JobStore, StoreReader
from worker_svc.service import WorkerService

Moves = list[tuple[str, str]]


@pytest.fixture(scope="module")
def shared_keys() -> dict[str, Any]:
    return {"JOBS_SLOTS": "50"}


async def start(client: WorkerClient, argv: list[str], **options: Any) -> str:
    return (await client.start(argv[0], args=argv[1:], **options)).job_id


async def wait(client: WorkerClient, job_id: str) -> pb.Job:
    return await client.wait(job_id, PATIENCE_S)


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


# Watching


async def watched(client: WorkerClient, count: int, from_sequence: int = 1, **options: Any) -> list[pb.JobTransition]:
    found: list[pb.JobTransition] = []
    async with asyncio.timeout(PATIENCE_S):
        async with contextlib.aclosing(client.watch(from_sequence, **options)) as moves:
            async for moved in moves:
                found.append(moved)
                if len(found) >= count:
                    break
    return found


async def test_watch_one_job_from_the_beginning(shared_client: WorkerClient) -> None:
    job_id = await start(shared_client, programs.exits(3))
    await wait(shared_client, job_id)
    moves = await watched(shared_client, 3, job_ids=[job_id])
    assert [(moved.from_state, moved.to_state) for moved in moves] == [
        (JobState.UNSPECIFIED, JobState.STARTING),
        (JobState.STARTING, JobState.RUNNING),
        (JobState.RUNNING, JobState.FINISHED),
    ]
    assert (moves[2].outcome, moves[2].exit_code, moves[2].reason) == (Outcome.FAILED, 3, "exit status 3")
    assert moves[1].pid == moves[2].pid > 0


async def test_watch_all_without_gaps(shared_client: WorkerClient) -> None:
    last = (await shared_client.worker()).last_sequence
    moves = asyncio.create_task(watched(shared_client, last + 30))
    for number in range(10):
        await start(shared_client, programs.exits(number))
    assert [moved.sequence for moved in await moves] == list(range(1, last + 31))


async def test_watch_goes_on_where_it_was(shared_client: WorkerClient) -> None:
    first = (await shared_client.worker()).last_sequence + 1
    for number in range(5):
        await wait(shared_client, await start(shared_client, programs.exits(number)))
    seen: list[pb.JobTransition] = []
    while len(seen) < 15:
        seen += (
            await watched(shared_client, 4, first + len(seen))
            if len(seen) < 12
            else await watched(shared_client, 3, first + 12)
        )
    assert [moved.sequence for moved in seen] == list(range(first, first + 15))


async def test_watch_only_from_now_on(shared_client: WorkerClient) -> None:
    await wait(shared_client, await start(shared_client, programs.TRUE))
    last = (await shared_client.worker()).last_sequence
    moves = asyncio.create_task(watched(shared_client, 1, 0))
    job_ids = []
    while not moves.done():
        job_ids.append(await start(shared_client, programs.TRUE))
        await wait(shared_client, job_ids[-1])
    (moved,) = moves.result()
    assert moved.sequence > last
    assert moved.job_id in job_ids


async def test_watch_beyond_the_latest(shared_client: WorkerClient) -> None:
    last = (await shared_client.worker()).last_sequence
    with pytest.raises(OutOfRange, match=rf"^from_sequence: {last + 2} is beyond the latest, {last}"):
        await watched(shared_client, 1, last + 2)
    with pytest.raises(InvalidArgument, match=r"^job_ids: "):
        await watched(shared_client, 1, job_ids=["fine", "a/b"])


async def test_watch_from_what_an_answer_told(shared_client: WorkerClient) -> None:
    """Whatever sequence number a client knows, it can watch from the next one."""
    for number in range(30):
        job_id = await start(shared_client, programs.SLEEP)
        last = (await shared_client.job(job_id)).last_sequence
        moves = asyncio.create_task(watched(shared_client, 1, last + 1, job_ids=[job_id]))
        await shared_client.stop(job_id)
        assert (await moves)[0].to_state == JobState.STOPPING, number


async def test_a_feed_that_lags_behind_the_store(tmp_path: Path) -> None:
    """A client may know a sequence number before the feed has read so far."""
    store = JobStore(str(tmp_path))
    reader = StoreReader(str(tmp_path))
    reads = LongReads(str(tmp_path))
    feed = Feed(reader, reads, 0, lambda batch: None)
    store.begin()
    ordinal = store.add_job("j", JobSpec("true"), "", 1, b"")
    for _ in range(3):
        store.add_transition(ordinal, Transition(0, "j", 5, State.NEW, State.QUEUED), {})
    store.commit()
    nothing = cast(Any, None)
    service = WorkerService(tmp_path, nothing, reader, reads, feed, nothing, nothing, nothing, nothing, nothing)
    gate = Gate(nothing, Masker(), nothing)
    CALL.set(Call("WatchJobs", RPCS["WatchJobs"], Caller("uid:0", Role.ADMIN, ""), gate, cast(Any, None)))
    waiting = asyncio.ensure_future(anext(service.watch_jobs(pb.WatchJobsReq(from_sequence=4))))
    now = asyncio.ensure_future(anext(service.watch_jobs(pb.WatchJobsReq())))
    with pytest.raises(OutOfRange, match="beyond the latest, 3"):
        await anext(service.watch_jobs(pb.WatchJobsReq(from_sequence=5)))
    feed.ring(3)
    reading = asyncio.create_task(feed.run())
    await eventually(lambda: feed.sequence == 3)
    assert not waiting.done()
    store.begin()
    store.add_transition(ordinal, Transition(0, "j", 5, State.QUEUED, State.STARTING), {})
    store.commit()
    feed.ring(4)
    assert (await waiting).sequence == (await now).sequence == 4
    service.is_draining = True
    with pytest.raises(Unavailable, match="shutting down"):
        await anext(service.watch_jobs(pb.WatchJobsReq()))
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    reads.close()
    reader.close()
    store.close()


# The worker itself


async def test_what_the_worker_tells_of_itself(shared_client: WorkerClient, shared: Worker) -> None:
    job_id = await start(shared_client, programs.SLEEP)
    told = await shared_client.worker()
    assert (told.version, told.slots, told.queue_length) == (__version__, 50, 10_000)
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
