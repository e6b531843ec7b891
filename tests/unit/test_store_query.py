"""Finding jobs in the store: what is found, and that each step is small however many jobs there are."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.make_store import PATH as STORE_V1
from worker_svc.job import JobSpec, JobState, Outcome, Transition
from worker_svc.record.paths import STORE_NAME
from worker_svc.record.query import JobQuery
from worker_svc.record.reader import StoreReader
from worker_svc.record.writer import JobStore

LARGE = JobSpec("true", args=("x" * 5000,), env={"K": "v"}, labels={"size": "large"}, cwd="/tmp")
BYTES = 1 << 20


def add(store: JobStore, *jobs: tuple[str, JobSpec], owner: str = "", fingerprint: str = "f") -> None:
    """Finished jobs, in one transaction."""
    store.begin()
    for job_id, spec in jobs:
        ordinal = store.add_job(job_id, spec, fingerprint, 1, b"", owner)
        moved = Transition(0, job_id, 5, JobState.RUNNING, JobState.FINISHED)
        store.add_transition(ordinal, moved, {"finished_ns": 5, "outcome": int(Outcome.SUCCEEDED)})
    store.commit()


def all_pages(reader: StoreReader, query: JobQuery, limit: int = 100) -> tuple[list[str], int]:
    """The ids, and how many steps it took."""
    found: list[str] = []
    below: int | None = None
    for steps in range(1, 10_000):
        records, below = reader.find(query, below, limit, BYTES)
        found += [record.job_id for record in records]
        if below is None:
            return found, steps
    raise AssertionError("it does not end")


def work_of_a_step(reader: StoreReader, query: JobQuery) -> int:
    """What SQLite does for it, in hundreds of its instructions."""
    counted = 0

    def count() -> int:
        nonlocal counted
        counted += 1
        return 0

    reader._db.set_progress_handler(count, 100)
    reader.find(query, None, 16, BYTES)
    reader._db.set_progress_handler(None, 0)
    return counted


@pytest.fixture(scope="module")
def small_and_large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[StoreReader]]:
    """Stores of 4,500 and of 45,000 jobs."""
    labels, halves = {f"k{number}": "v" for number in range(64)}, [{"half": "0"}, {"other half": "1"}]
    readers = []
    for count in (4500, 45_000):
        path = str(tmp_path_factory.mktemp("store"))
        store = JobStore(path)
        add(store, *((f"j{n}", JobSpec("true", labels=halves[n % 2] if n % 50 else labels)) for n in range(count)))
        store.close()
        readers.append(StoreReader(path))
    yield readers
    for reader in readers:
        reader.close()


@pytest.mark.parametrize(
    "query",
    [
        JobQuery(labels={"no": "such"}),
        JobQuery(labels={f"k{number}": "v" for number in range(63)} | {"k63": "no"}),
        # Each of these labels is on half of the jobs, both are on none.
        JobQuery(labels={"half": "0", "other half": "1"}),
        JobQuery(accepted_before_ns=0),
        JobQuery(owner="dns:nobody"),
        JobQuery(states=(JobState.RUNNING,)),
    ],
    ids=["label", "64 labels", "halves", "time", "owner", "state"],
)
def test_a_step_is_as_much_work_with_ten_times_the_jobs(small_and_large: list[StoreReader], query: JobQuery) -> None:
    """A query that no job matches: it looks at all it may."""
    before, after = (work_of_a_step(reader, query) for reader in small_and_large)
    assert after <= 1.5 * before + 50, (before, after)
    assert all_pages(small_and_large[1], query)[0] == []


def test_what_is_far_apart_is_found_in_steps(store: JobStore, reader: StoreReader) -> None:
    """A step that finds nothing says where to go on."""
    filler = [(f"j{number}", JobSpec("true")) for number in range(9000)]
    add(store, ("first", JobSpec("true", labels={"k": "v"})), *filler)
    add(store, ("last", JobSpec("true")), owner="dns:me")
    found, steps = all_pages(reader, JobQuery(accepted_since_ns=0, states=(JobState.FINISHED,)))
    assert found == ["last", *(f"j{number}" for number in reversed(range(9000))), "first"]
    assert steps > 90
    assert all_pages(reader, JobQuery(accepted_before_ns=0)) == ([], 3)
    # An index leads to these.
    assert all_pages(reader, JobQuery(labels={"k": "v"})) == (["first"], 1)
    assert all_pages(reader, JobQuery(owner="dns:me")) == (["last"], 1)


def test_labels_to_the_byte(store: JobStore, reader: StoreReader) -> None:
    add(store, ("a", JobSpec("true", labels={"k": "a\0b"})), ("b", JobSpec("true", labels={"k": "a", "é": "ö"})))
    assert all_pages(reader, JobQuery(labels={"k": "a\0b"}))[0] == ["a"]
    assert all_pages(reader, JobQuery(labels={"k": "a"}))[0] == ["b"]
    assert all_pages(reader, JobQuery(labels={"é": "ö"}))[0] == ["b"]


def test_a_large_spec_is_brief_unless_the_whole_is_asked_for(store: JobStore, reader: StoreReader) -> None:
    add(store, ("large", LARGE), ("small", JobSpec("true", args=("x",))))
    (small, large), _ = reader.find(JobQuery(), None, 10, BYTES)
    assert (small.spec.args, small.is_brief) == (("x",), 0)
    assert (large.spec, large.is_brief) == (LARGE._replace(args=(), env={}), 1)
    assert reader.get("large") == large
    whole = reader.get("large", whole=True)
    assert whole == large._replace(spec=LARGE, is_brief=False)
    assert reader.find(JobQuery(), None, 10, BYTES, whole=True).records == [small, whole]
    assert store.spec_of(large.ordinal) == LARGE


def test_a_step_ends_before_it_is_too_large(store: JobStore, reader: StoreReader) -> None:
    add(store, *((f"j{number}", LARGE) for number in range(5)))
    sizes = []
    below: int | None = None
    while True:
        records, below = reader.find(JobQuery(), below, 10, 12_000, whole=True)
        sizes.append(len(records))
        if below is None:
            break
    assert sizes == [2, 2, 1]
    assert len(reader.find(JobQuery(), None, 10, 1, whole=True).records) == 1  # one is always told


def test_nothing_is_left_of_a_job_that_is_deleted(store: JobStore) -> None:
    add(store, ("large", LARGE), fingerprint="")
    store.begin()
    store.delete_job("large", keep_ids=10)
    store.commit()
    for table in ("jobs", "specs", "labels", "forgotten"):  # nobody chose its id
        assert store._db.execute(f"SELECT COUNT(*) FROM {table}").fetchone() == (0,), table


def test_ids_are_remembered_the_latest_of_them(store: JobStore, reader: StoreReader) -> None:
    add(store, *((f"j{number}", JobSpec("true")) for number in range(5)), owner="dns:me")
    for number in range(5):
        store.begin()
        store.delete_job(f"j{number}", keep_ids=3)
        store.commit()
    known = [reader.ever_known(f"j{number}") for number in range(5)]
    assert known[:2] == [None, None]
    for found in known[2:]:
        assert found == ("dns:me", "f", JobState.FINISHED, Outcome.SUCCEEDED, "")
    assert store.known("j4") is None  # it is not on record


def test_a_store_of_the_first_version(tmp_path: Path) -> None:
    """Its large specs and its labels are put where they belong."""
    db = sqlite3.connect(tmp_path / STORE_NAME)
    db.executescript(STORE_V1.read_text())
    db.execute("UPDATE jobs SET spec = ? WHERE job_id = 'failed'", (LARGE.to_text(),))
    db.commit()
    db.close()
    JobStore(str(tmp_path)).close()
    reader = StoreReader(str(tmp_path))
    brief, whole, small = reader.get("failed"), reader.get("failed", whole=True), reader.get("succeeded")
    assert brief is not None
    assert whole is not None
    assert small is not None
    assert (brief.spec, brief.is_brief, whole.spec) == (LARGE.brief, 1, LARGE)
    assert (small.spec.env, small.is_brief) == ({"K": "v"}, 0)
    assert all_pages(reader, JobQuery(labels={"size": "large"}))[0] == ["failed"]
    assert len(all_pages(reader, JobQuery(labels={"a": "b"}))[0]) == 6
    reader.close()
