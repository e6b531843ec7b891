"""A store that cannot be read (any more): callers are told so, and all goes on when it can be read again."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from tests.support.waiting import eventually
from tests.support.workers import PATIENCE_S, Worker
from worker_svc.client import WorkerClient
from worker_svc.feed import Feed
from worker_svc.job import JobError, JobSpec, ResourceExhausted, Transition, Unavailable
from worker_svc.job import JobState as State
from worker_svc.reading import LongReads
from worker_svc.record.paths import STORE_NAME
from worker_svc.record.reader import StoreReader
from worker_svc.record.writer import JobStore
from worker_svc.supervisor.ledger import Ledger
from worker_svc.supervisor.life.job import Job

_REASON = "the store cannot be read now: "


@contextmanager
def emptied(state: Path) -> Iterator[None]:
    """What was there, as if the disk had lost it; what of it is in memory is there still."""
    files = [state / STORE_NAME, state / f"{STORE_NAME}-wal"]
    kept = [file.read_bytes() for file in files]
    for file in files:
        os.truncate(file, 0)
    try:
        yield
    finally:
        for file, content in zip(files, kept, strict=True):
            with file.open("r+b") as opened:
                opened.write(content)


CALLS: dict[str, Callable[[WorkerClient], Coroutine[Any, Any, Any]]] = {
    "query": lambda client: client.job("job-0"),
    "wait": lambda client: client.wait("job-1"),
    "list": lambda client: anext(client.list()),
}


async def test_every_call_that_needs_it(shared_client: WorkerClient, shared: Worker) -> None:
    # As much as no cache holds.
    for number in range(64):
        await shared_client.start("true", args=["x" * 20_000], job_id=f"job-{number}")
    await shared_client.wait("job-63")
    with emptied(shared.path):
        for name, call in CALLS.items():
            with pytest.raises(Unavailable) as caught:
                await call(shared_client)
            assert _REASON in str(caught.value), name
    assert shared.wait_log("library.log")["message"].startswith(("QueryJob: ", "WaitJob: "))
    await shared_client.start("true")  # what was read of it is not trusted any longer
    assert (await shared_client.job("job-0")).outcome


@pytest.fixture
def one_job(tmp_path: Path) -> Iterator[JobStore]:
    store = JobStore(str(tmp_path))
    store.begin()
    ordinal = store.add_job("j", JobSpec("true"), "", 1, b"")
    store.add_transition(ordinal, Transition(0, "j", 5, State.NEW, State.FINISHED), {})
    store.commit()
    yield store
    store.close()


@pytest.mark.parametrize("pragma, refused", [("query_only=ON", Unavailable), ("max_page_count=1", ResourceExhausted)])
def test_a_job_that_cannot_be_recorded(one_job: JobStore, pragma: str, refused: type[JobError]) -> None:
    """A full disk is told from one that fails."""
    ledger = Ledger(one_job)
    one_job._db.execute(f"PRAGMA {pragma}")
    ledger.add(Job("k", "", 1, ""), JobSpec("true", "x" * 100_000), b"")
    assert not ledger.commit(Mock())
    assert type(ledger.refusal()) is refused
    assert ledger.failure in str(ledger.refusal())


async def test_who_waits_is_told(one_job: JobStore, tmp_path: Path) -> None:
    """Those who watch, and those who wait for the end of a job; the feed reads on as soon as it can."""
    told: list[str] = []
    read: list[Transition] = []
    reader = StoreReader(str(tmp_path))
    feed = Feed(reader, LongReads(str(tmp_path)), 0, read.extend, lambda event, **fields: told.append(event))
    end = feed.end_of("j")
    watching = asyncio.ensure_future(anext(feed.since(1, "client", lambda moved: True)))
    await asyncio.sleep(0)
    with emptied(tmp_path):
        feed.ring(1)
        reading = asyncio.create_task(feed.run())
        for waiting in (end, watching):
            with pytest.raises(Unavailable, match=_REASON):
                await asyncio.wait_for(waiting, PATIENCE_S)
    await asyncio.wait_for(feed.end_of("j"), PATIENCE_S)
    await eventually(lambda: told == ["store.unreadable", "store.readable_again"])
    assert [moved.sequence for moved in read] == [1]
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    reader.close()
