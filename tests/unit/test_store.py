"""The store, on real SQLite files: sequence numbers without gaps, filters and pages, and what a reader may see."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker_svc.job import CheckedFile, JobRecord, JobSpec, JobState, Outcome, OutputPolicy, Transition
from worker_svc.record.paths import STORE_NAME
from worker_svc.record.query import JobQuery
from worker_svc.record.reader import StoreReader
from worker_svc.record.schema import SCHEMA_VERSION, StoreError
from worker_svc.record.writer import JobStore

NEW, QUEUED, STARTING, RUNNING, STOPPING, FINISHED = JobState


def add(store: JobStore, job_id: str, *, accepted_ns: int = 1, stdin: bytes = b"", spec: JobSpec | None = None) -> int:
    """A job that is queued, in a transaction of its own."""
    store.begin()
    ordinal = store.add_job(job_id, spec or JobSpec("true"), "fp", accepted_ns, stdin)
    store.add_transition(ordinal, Transition(0, job_id, 5, NEW, QUEUED), {})
    store.commit()
    return ordinal


def move(store: JobStore, ordinal: int, job_id: str, from_state: JobState, to_state: JobState) -> int:
    store.begin()
    sequence = store.add_transition(ordinal, Transition(0, job_id, 5, from_state, to_state), {})
    store.commit()
    return sequence


def test_every_column_of_a_record_survives(store: JobStore, reader: StoreReader) -> None:
    spec = JobSpec("c", "p", ("a", ""), {"K": "v"}, "/", 3, 1.5, 9, 0.25, {"l": "é"}, True, 7, OutputPolicy.STOP)
    spec = spec._replace(checked=(CheckedFile("command", "/usr/bin/c", 1, 2, 3),))
    store.begin()
    ordinal = store.add_job("j", spec, "print", 11, b"abc", "dns:someone")
    changes = {
        "outcome": int(Outcome.FAILED),
        "exit_code": 3,
        "signal": 9,
        "reason": "exit status 3",
        "pid": 77,
        "started_ns": 12,
        "finished_ns": 13,
        "wall_ns": 14,
        "cpu_ns": 15,
        "peak_memory_bytes": 16,
        "output_size_bytes": 2**40,
        "stderr_size_bytes": 0,
        "paused": 1,
        "stuck": "pid 3",
        "started_monotonic_ns": 17,
        "output_loss": "9 bytes",
    }
    sequence = store.add_transition(ordinal, Transition(0, "j", 9, STOPPING, FINISHED, 77), changes)
    store.commit()
    expected = JobRecord(
        ordinal, "j", spec, FINISHED, sequence, 11, "print", Outcome.FAILED, 3, 9, "exit status 3", 77,
        12, 13, 14, 15, 16, 2**40, 0, 1, "pid 3", "dns:someone", 17, "9 bytes",
    )  # fmt: skip
    assert reader.get("j") == store.get("j") == expected
    added = {"ordinal", "job_id", "spec", "state", "last_sequence", "accepted_ns", "fingerprint", "owner", "is_brief"}
    assert set(changes) | added == set(JobRecord._fields)


def test_every_column_of_an_event_survives(store: JobStore, reader: StoreReader) -> None:
    moved = Transition(1, "j", 2, RUNNING, FINISHED, 3, Outcome.SIGNALED, 4, 5, "why", 6, 7, 8, "dns:someone")
    assert all(moved)  # nothing at its default
    store.begin()
    ordinal = store.add_job("j", JobSpec("true"), "", 1, b"")
    assert store.add_transition(ordinal, moved._replace(sequence=0), {}) == 1
    store.commit()
    (found,) = reader.events(0, 10)
    assert found == moved
    assert [type(value) for value in found] == [type(value) for value in moved]


def test_what_is_not_known_stays_unknown(store: JobStore, reader: StoreReader) -> None:
    add(store, "j")
    (found,) = reader.events(0, 10)
    assert (found.exit_code, found.signal, found.queued_ns, found.wall_ns, found.cpu_ns) == (None,) * 5
    record = reader.get("j")
    assert record is not None
    assert record[12:] == (*(None,) * (len(JobRecord._fields) - 18), 0, "", "", 0, "", 0)


@settings(max_examples=30, deadline=None)
@given(steps=st.lists(st.sampled_from(["commit", "rollback", "reopen"]), max_size=12), per_step=st.integers(1, 3))
def test_sequence_numbers_have_no_gaps(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str], per_step: int
) -> None:
    folder = str(tmp_path_factory.mktemp("store"))
    store = JobStore(folder)
    kept = []
    for number, step in enumerate(steps):
        if step == "reopen":
            store.close()
            store = JobStore(folder)
            continue
        store.begin()
        job_id = f"j{number}"
        ordinal = store.add_job(job_id, JobSpec("true"), "", 1, b"")
        for _ in range(per_step):
            store.add_transition(ordinal, Transition(0, job_id, 5, NEW, QUEUED), {})
        if step == "commit":
            store.commit()
            kept += [job_id] * per_step
        else:
            store.rollback()
        assert store.sequence == len(kept)
    reader = StoreReader(folder)
    assert [(event.sequence, event.job_id) for event in reader.events(0, 1000)] == list(enumerate(kept, 1))
    reader.close()
    store.close()


def test_numbers_go_on_after_the_events_are_gone(tmp_path: Path) -> None:
    store = JobStore(str(tmp_path))
    ordinal = add(store, "a")
    move(store, ordinal, "a", QUEUED, FINISHED)
    store.begin()
    store.drop_events(2)
    store.delete_job("a")
    store.commit()
    store.close()
    store = JobStore(str(tmp_path))
    assert store.sequence == 2
    assert add(store, "b") == ordinal + 1  # nor is a place in the order of acceptance given twice
    assert store.sequence == 3
    store.close()


def test_the_order_of_acceptance_grows_also_after_deletion(store: JobStore) -> None:
    first = add(store, "a")
    store.begin()
    store.delete_job("a")
    store.commit()
    assert add(store, "a") > first


def test_a_reader_sees_what_is_committed_and_only_that(store: JobStore, reader: StoreReader) -> None:
    store.begin()
    ordinal = store.add_job("j", JobSpec("true"), "", 1, b"")
    store.add_transition(ordinal, Transition(0, "j", 5, NEW, QUEUED), {})
    assert reader.get("j") is None
    assert reader.events(0, 10) == []
    store.rollback()
    assert reader.get("j") is None
    add(store, "j")
    assert reader.get("j") is not None
    assert [event.sequence for event in reader.events(0, 10)] == [1]


def test_a_reader_does_not_stop_the_writer(store: JobStore, tmp_path: Path) -> None:
    add(store, "j")
    other = sqlite3.connect(tmp_path / STORE_NAME, isolation_level=None)
    other.execute("BEGIN")
    other.execute("SELECT * FROM jobs").fetchall()
    add(store, "k")
    other.execute("COMMIT")
    other.close()


def test_a_reader_cannot_write(reader: StoreReader) -> None:
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        reader._db.execute("DELETE FROM jobs")


def test_a_commit_is_on_disk(store: JobStore) -> None:
    """WAL with FULL fsyncs at each commit; NORMAL would not."""
    assert store._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert store._db.execute("PRAGMA synchronous").fetchone() == (2,)


def test_stdin_is_kept_until_the_process_has_it(store: JobStore) -> None:
    ordinal = add(store, "j", stdin=b"\0secret")
    assert store.stdin_of(ordinal) == b"\0secret"
    move(store, ordinal, "j", QUEUED, STARTING)
    assert store.stdin_of(ordinal) == b"\0secret"
    move(store, ordinal, "j", STARTING, RUNNING)
    assert store.stdin_of(ordinal) == b""
    assert store._db.execute("SELECT COUNT(*) FROM stdin").fetchone() == (0,)


@pytest.mark.parametrize("from_state", [QUEUED, STARTING])
def test_stdin_of_a_job_that_never_runs_is_not_kept(store: JobStore, from_state: JobState) -> None:
    ordinal = add(store, "j", stdin=b"secret")
    if from_state is STARTING:
        move(store, ordinal, "j", QUEUED, STARTING)
    move(store, ordinal, "j", from_state, FINISHED)
    assert store._db.execute("SELECT COUNT(*) FROM stdin").fetchone() == (0,)


def ids(found: list[JobRecord]) -> str:
    return "".join(record.job_id for record in found)


def find(reader: StoreReader, limit: int, **query: Any) -> str:
    return ids(reader.find(JobQuery(**query), None, limit, 10_000).records)


@pytest.fixture
def six(store: JobStore) -> None:
    """Jobs a to f, accepted at 10 to 60."""
    labels: list[dict[str, str]] = [
        {},
        {"team": "red"},
        {"team": "red", "size": "1"},
        {"team": "blue"},
        {"team.a b'\"%": "red"},
        {"size": "01"},
    ]
    for number, (job_id, marks) in enumerate(zip("abcdef", labels, strict=True), 1):
        ordinal = add(store, job_id, accepted_ns=number * 10, spec=JobSpec("true", labels=marks))
        if job_id in "bd":
            move(store, ordinal, job_id, QUEUED, STARTING)
        if job_id == "c":
            move(store, ordinal, job_id, QUEUED, FINISHED)


@pytest.mark.usefixtures("six")
def test_filters(reader: StoreReader) -> None:
    assert find(reader, 10) == "fedcba"
    assert find(reader, 2) == "fe"
    assert find(reader, 10, states=(STARTING,)) == "db"
    assert find(reader, 10, states=(STARTING, FINISHED)) == "dcb"
    assert find(reader, 10, labels={"team": "red"}) == "cb"
    assert find(reader, 10, labels={"team": "red", "size": "1"}) == "c"
    assert find(reader, 10, labels={"size": "1"}) == "c"
    assert find(reader, 10, labels={"team": "re"}) == ""
    assert find(reader, 10, labels={"team.a b'\"%": "red"}) == "e"
    assert find(reader, 10, labels={"team": "%"}) == ""
    assert find(reader, 10, accepted_since_ns=20, accepted_before_ns=40) == "cb"
    assert find(reader, 10, states=(QUEUED,), labels={}, accepted_since_ns=11) == "fe"


@pytest.mark.usefixtures("six")
@pytest.mark.parametrize("size", [1, 2, 3, 6, 7])
def test_pages(reader: StoreReader, store: JobStore, size: int) -> None:
    found: list[JobRecord] = []
    below: int | None = None
    for number in range(7):
        page, below = reader.find(JobQuery(), below, size, 10_000)
        assert len(page) <= size
        found += page
        if below is None:
            break
        add(store, f"later{number}")  # what comes meanwhile is not on later pages
    assert ids(found) == "fedcba"


@pytest.mark.usefixtures("six")
def test_events_in_pages(reader: StoreReader) -> None:
    found: list[int] = []
    while page := reader.events(found[-1] if found else 0, 4):
        assert len(page) <= 4
        found += [event.sequence for event in page]
    assert found == list(range(1, 10))


def test_live_jobs_in_order_of_acceptance(store: JobStore) -> None:
    for job_id in "abc":
        add(store, job_id)
    move(store, 2, "b", QUEUED, FINISHED)
    assert [(row.job_id, row.state) for row in store.live()] == [("a", QUEUED), ("c", QUEUED)]


def test_a_job_id_is_there_once(store: JobStore) -> None:
    add(store, "j")
    store.begin()
    with pytest.raises(sqlite3.IntegrityError):
        store.add_job("j", JobSpec("true"), "", 1, b"")
    store.rollback()
    assert store.sequence == 1


def test_the_id_of_the_store_is_for_life(tmp_path: Path) -> None:
    first = JobStore(str(tmp_path))
    first.close()
    second = JobStore(str(tmp_path))
    second.close()
    (tmp_path / "other").mkdir()
    other = JobStore(str(tmp_path / "other"))
    other.close()
    assert first.state_id == second.state_id != other.state_id


def test_a_store_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    JobStore(str(tmp_path)).close()
    database = sqlite3.connect(tmp_path / STORE_NAME)
    database.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    database.commit()
    database.close()
    for opened in (JobStore, StoreReader):
        with pytest.raises(StoreError, match=r"newer version .* run that version"):
            opened(str(tmp_path))


def test_a_reader_does_not_make_a_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be read"):
        StoreReader(str(tmp_path))
    assert not (tmp_path / STORE_NAME).exists()


def test_what_is_no_store(tmp_path: Path) -> None:
    (tmp_path / STORE_NAME).write_bytes(b"this is not a database at all" * 100)
    for opened in (JobStore, StoreReader):
        with pytest.raises(StoreError, match="not a database"):
            opened(str(tmp_path))


def test_a_directory_with_odd_characters(tmp_path: Path) -> None:
    folder = tmp_path / "a b?c#d%41é"
    folder.mkdir()
    store = JobStore(str(folder))
    add(store, "j")
    reader = StoreReader(str(folder))
    assert reader.get("j") is not None
    reader.close()
    store.close()


def test_a_full_disk_takes_nothing_back_that_was_committed(tmp_path: Path) -> None:
    store = JobStore(str(tmp_path))
    add(store, "a")
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count={pages}")
    store.begin()
    with pytest.raises(sqlite3.OperationalError, match="full"):
        store.add_job("b", JobSpec("true"), "", 1, os.urandom(1 << 20))
    store.rollback()
    assert store.sequence == 1
    store._db.execute("PRAGMA max_page_count=1000000")
    add(store, "c")
    reader = StoreReader(str(tmp_path))
    assert [(event.sequence, event.job_id) for event in reader.events(0, 10)] == [(1, "a"), (2, "c")]
    reader.close()
    store.close()
