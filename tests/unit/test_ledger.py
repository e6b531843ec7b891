"""What is put on disk together, of many jobs, when something of one of them cannot be."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from tests.support.stages import in_state
from worker_svc.job import Event, JobSpec, JobState, Outcome, Transition
from worker_svc.record.reader import StoreReader
from worker_svc.record.writer import JobStore
from worker_svc.supervisor.ledger import Ledger
from worker_svc.supervisor.life.job import FINISHED, Job
from worker_svc.supervisor.life.moves import Moves


class Book:
    """A ledger on a real store, with what `give_up` was told."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = JobStore(str(path))
        self.ledger = Ledger(self.store)
        self.moves = Moves(self.ledger)
        self.given_up: dict[str, tuple[Exception, bool]] = {}

    def add(self, job_id: str) -> Job:
        job = Job(job_id, "", 1)
        self.ledger.add(job, JobSpec("true"), b"")
        self.moves.move(job, Event.LAUNCH, in_state(JobState.STARTING))
        return job

    def commit(self) -> bool:
        return self.ledger.commit(self._give_up)

    def _give_up(self, job: Job, error: Exception, is_new: bool) -> None:
        self.given_up[job.job_id] = error, is_new
        if not is_new:
            self.moves.end_otherwise(job, "lost: it cannot be recorded")


@pytest.fixture
def book(tmp_path: Path) -> Book:
    return Book(tmp_path)


# Neither of them comes from a request: JSON and the checks before leave nothing of the kind through.
@pytest.mark.parametrize("value", [object(), [1], {"a": 1}])
def test_what_can_never_be_written_of_one_job_ends_that_job_alone(book: Book, value: Any) -> None:
    good, bad = book.add("good"), book.add("bad")
    assert book.commit()
    book.moves.move(bad, Event.SPAWNED, in_state(JobState.RUNNING), changes={"pid": value})
    book.moves.move(good, Event.SPAWNED, in_state(JobState.RUNNING), changes={"pid": 7})
    assert book.commit()
    assert not book.ledger.is_behind
    assert list(book.given_up) == ["bad"]
    kept = book.store.get("good"), book.store.get("bad")
    assert kept[0] is not None
    assert (kept[0].state, kept[0].pid) == (JobState.RUNNING, 7)
    assert kept[1] is not None
    assert (kept[1].state, kept[1].outcome) == (JobState.FINISHED, Outcome.LOST)
    assert [moved.sequence for moved in _events(book)] == [1, 2, 3, 4]


def test_a_job_that_cannot_be_recorded_was_never_accepted(book: Book) -> None:
    first = book.add("twice")
    assert book.commit()
    book.add("twice")
    other = book.add("other")
    assert book.commit()
    error, is_new = book.given_up["twice"]
    assert isinstance(error, sqlite3.IntegrityError)
    assert is_new
    assert (first.ordinal, other.ordinal) == (1, 2)
    assert book.store.get("other") is not None


def test_a_job_whose_end_cannot_be_recorded_either_holds_up_nobody(book: Book) -> None:
    bad, good = book.add("bad"), book.add("good")
    assert book.commit()
    book.ledger.annotate(bad, {"pid": object()})
    book.moves.move(good, Event.SPAWNED, in_state(JobState.RUNNING))
    assert book.ledger.commit(lambda job, *_: book.ledger.annotate(job, {"pid": object()}))
    assert not book.ledger.is_behind
    kept = book.store.get("good")
    assert kept is not None
    assert kept.state is JobState.RUNNING


def test_when_the_disk_is_at_fault_everything_waits(book: Book) -> None:
    book.add("a")
    book.store._db.execute("PRAGMA query_only=ON")
    assert not book.commit()
    assert book.ledger.failure
    assert not book.given_up
    book.store._db.execute("PRAGMA query_only=OFF")
    assert book.commit()
    assert not book.ledger.failure
    assert book.store.get("a") is not None


@pytest.mark.parametrize(
    "value, kept",
    [
        ("caf\udce9 \ud800", "caf\\xe9 \\ud800"),
        ("a\0b", "a\0b"),
        (2**63, 2**63 - 1),
        (-(2**80), -(2**63)),
        (True, 1),
    ],
)
def test_what_is_odd_is_stored_as_near_as_can_be(book: Book, value: Any, kept: Any) -> None:
    job = book.add("j")
    column = "reason" if isinstance(value, str) else "finished_ns"
    book.moves.move(job, Event.SPAWN_FAILED, FINISHED, changes={column: value}, reason=str(value))
    assert book.commit()
    assert not book.given_up
    record = book.store.get("j")
    assert record is not None
    assert getattr(record, column) == kept
    if isinstance(value, str):
        assert _events(book)[-1].reason == kept


def _events(book: Book) -> list[Transition]:
    return StoreReader(str(book.path)).events(0, 100)
