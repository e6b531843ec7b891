"""Long reads in turn, and history that watchers share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest

from tests.support.waiting import eventually
from worker_svc.access.guard import Call
from worker_svc.access.roles import RPCS, Caller, Role
from worker_svc.feed import Feed
from worker_svc.job import JobSpec, JobState, Transition
from worker_svc.listing import Listing
from worker_svc.pb import jobscheduler as pb
from worker_svc.reading import LongReads
from worker_svc.record.reader import StoreReader
from worker_svc.record.writer import JobStore
from worker_svc.wire.messages import OutputFiles

T = TypeVar("T")
EVENTS = 6000


class CountedReads(LongReads):
    reads = 0

    async def read(self, query: Callable[[StoreReader], T]) -> T:
        self.reads += 1
        return await super().read(query)


class Room:
    """For answers, as much as there may be."""

    async def take_room(self, size_bytes: int) -> None:
        return


@pytest.fixture
async def reads(tmp_path: Path) -> AsyncIterator[CountedReads]:
    reads = CountedReads(str(tmp_path))
    yield reads
    reads.close()


async def test_a_client_with_many_steps_does_not_hold_up_another(reads: LongReads) -> None:
    done: list[str] = []

    async def step(client: str) -> None:
        async with reads.step(client):
            await asyncio.sleep(0)
            done.append(client)

    tasks = [asyncio.create_task(step("greedy")) for _ in range(100)]
    await asyncio.sleep(0)
    tasks += [asyncio.create_task(step("modest")) for _ in range(2)]
    await asyncio.gather(*tasks)
    assert len(done) == 102
    assert "modest" not in done[6:], done[:10]


async def test_who_leaves_is_not_waited_for(reads: LongReads) -> None:
    order: list[int] = []
    release = asyncio.Event()

    async def step(number: int) -> None:
        async with reads.step("client"):
            order.append(number)
            await release.wait()

    tasks = [asyncio.create_task(step(number)) for number in range(5)]
    await asyncio.sleep(0)
    tasks[1].cancel()  # while it waits
    tasks[0].cancel()  # while it works
    await asyncio.sleep(0)
    tasks[2].cancel()  # when it is its turn, and it does not know yet
    release.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == [0, 3, 4]
    async with reads.step("another"):
        pass


def filled(path: Path, last: JobState = JobState.RUNNING) -> None:
    store = JobStore(str(path))
    store.begin()
    ordinal = store.add_job("j", JobSpec("true"), "", 1, b"")
    for number in range(1, EVENTS + 1):
        to_state = last if number == EVENTS else JobState.RUNNING
        store.add_transition(ordinal, Transition(0, "j", 5, JobState.RUNNING, to_state), {})
    store.commit()
    store.close()


async def test_history_is_read_once_for_all_who_watch_it(tmp_path: Path, reads: CountedReads) -> None:
    filled(tmp_path)
    reader = StoreReader(str(tmp_path))
    feed = Feed(reader, reads, EVENTS, lambda batch: None)

    async def watch(client: str, first: int) -> list[int]:
        seen: list[int] = []
        async for batch in feed.since(first, client, lambda moved: True):
            seen += [moved.sequence for moved in batch]
            if seen[-1] == EVENTS:
                return seen
        raise AssertionError("it ended")

    seen = await asyncio.gather(*(watch(f"client {n % 3}", 1 + n % 5) for n in range(50)))
    assert all(numbers == list(range(1 + n % 5, EVENTS + 1)) for n, numbers in enumerate(seen))
    # Not each for itself, which were 50 times as often as one.
    assert reads.reads < 10 * EVENTS / 256, reads.reads
    reader.close()


async def test_who_waits_for_one_job_is_told_some_at_a_time(tmp_path: Path, reads: CountedReads) -> None:
    """A thousand answers in one turn of the loop would hold up all others."""
    filled(tmp_path, JobState.FINISHED)
    reader = StoreReader(str(tmp_path))
    feed = Feed(reader, reads, EVENTS - 1, lambda batch: None)
    ends = [feed.end_of("j") for _ in range(1000)]
    for end in ends[::3]:
        feed.forget("j", end)
    waiting = [end for number, end in enumerate(ends) if number % 3]
    feed.ring(EVENTS)
    running = asyncio.create_task(feed.run())
    most = before = 0
    while before < len(waiting):
        await asyncio.sleep(0)
        told = sum(end.done() for end in waiting)
        most, before = max(most, told - before), told
    assert most <= 32
    assert not any(end.done() for end in ends[::3])
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    reader.close()


async def test_a_watch_that_wants_nothing_gives_way(tmp_path: Path, reads: CountedReads) -> None:
    """It reads all there is, and others have many turns meanwhile."""
    filled(tmp_path)
    reader = StoreReader(str(tmp_path))
    feed = Feed(reader, reads, EVENTS, lambda batch: None)
    looked = 0

    def is_wanted(moved: Transition) -> bool:
        nonlocal looked
        looked += 1
        return False

    async def watch() -> Sequence[Transition]:
        return await anext(feed.since(1, "client", is_wanted))

    watching = asyncio.create_task(watch())
    most = before = 0
    while looked < EVENTS:
        await asyncio.sleep(0)
        most, before = max(most, looked - before), looked
    assert most <= 256
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    reader.close()


async def test_a_listing_whose_caller_leaves_reads_no_further(tmp_path: Path, reads: CountedReads) -> None:
    store = JobStore(str(tmp_path))
    store.begin()
    for number in range(1000):
        ordinal = store.add_job(f"j{number}", JobSpec("true"), "", 1, b"")
        store.add_transition(ordinal, Transition(0, f"j{number}", 5, JobState.NEW, JobState.QUEUED), {})
    store.commit()
    store.close()
    listing = Listing(reads, lambda record: OutputFiles("", "", 0, 0))
    call = Call("ListJobs", RPCS["ListJobs"], Caller("uid:0", Role.ADMIN, ""), cast(Any, None), cast(Any, Room()))
    whole = await listing.page(call, pb.ListJobsReq(page_size=1000))
    assert len(pb.ListJobsRes().parse(whole.data).jobs) == 1000
    steps = reads.reads
    leaving = asyncio.create_task(listing.page(call, pb.ListJobsReq(page_size=1000)))
    await eventually(lambda: reads.reads > steps + 1)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    read = reads.reads
    async with reads.step("another"):
        await reads.read(lambda reader: reader.sequence())
    assert reads.reads == read + 1 < 2 * steps
