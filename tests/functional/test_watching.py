"""Watching jobs."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.support import programs
from tests.support.calls import start, wait
from tests.support.waiting import eventually
from tests.support.workers import PATIENCE_S
from worker_svc import (
    InvalidArgument,
    JobState,
    Outcome,
    OutOfRange,
    Unavailable,
    WorkerClient,
)
from worker_svc.access.guard import CALL, Call, Gate
from worker_svc.access.roles import RPCS, Caller, Role
from worker_svc.feed import Feed
from worker_svc.job import JobSpec, Transition
from worker_svc.job import JobState as State
from worker_svc.masking import Masker
from worker_svc.pb import jobscheduler as pb
from worker_svc.reading import LongReads
from worker_svc.record.reader import StoreReader
from worker_svc.record.writer import JobStore
from worker_svc.service import WorkerService

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
    facts = cast(Any, SimpleNamespace(slots=1, queue_length=1))
    service = WorkerService(tmp_path, nothing, reader, reads, feed, nothing, nothing, facts, nothing, nothing)
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
