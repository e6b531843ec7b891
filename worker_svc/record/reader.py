"""The reading end of the store, which the worker has too. Readers never block the writer, nor it them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from worker_svc.job import JobRecord, KnownJob, Transition
from worker_svc.linux.clocks import SteadyClock
from worker_svc.record.paths import STORE_NAME
from worker_svc.record.schema import (
    EVENT_COLUMNS,
    EVER_KNOWN,
    IS_OWNED,
    RECORD_COLUMNS,
    SCHEMA_VERSION,
    STEADY_CLOCK,
    WHOLE_RECORD_COLUMNS,
    FinishedRow,
    StoreError,
    known_from_row,
    record_from_row,
    transition_from_row,
    uri_of,
)

if TYPE_CHECKING:
    from worker_svc.record.query import FoundJobs, JobQuery

FINISHED_ROW: Final = ", ".join(FinishedRow._fields)


class StoreReader:
    """Reads the store; any number of them, in any process. Every method is one short read."""

    def __init__(self, state_dir: str) -> None:
        """Raises StoreError."""
        path = f"{state_dir}/{STORE_NAME}"
        try:
            # Not mode=ro: a WAL reader must be able to write the shared-memory index.
            self._db = sqlite3.connect(uri_of(path, "mode=rw"), uri=True, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA query_only=ON")
            self._db.execute("PRAGMA cache_size=-512")
            self._db.execute("PRAGMA busy_timeout=5000")
            found = schema_version(self._db)
        except sqlite3.Error as error:
            raise StoreError(f"{path}: cannot be read: {error}") from error
        if found != SCHEMA_VERSION:
            raise StoreError(version_text(path, found))

    def close(self) -> None:
        self._db.close()

    def get(self, job_id: str, *, whole: bool = False) -> JobRecord | None:
        """Brief, if its spec is large, unless the whole is asked for."""
        return read_job(self._db, job_id, WHOLE_RECORD_COLUMNS if whole else RECORD_COLUMNS)

    def get_all(self, job_ids: Sequence[str]) -> dict[str, JobRecord]:
        """Those of them that there are; brief, as `get`."""
        rows = self._db.execute(
            f"SELECT {RECORD_COLUMNS} FROM jobs WHERE job_id IN (SELECT value FROM json_each(?))",
            (json.dumps(job_ids),),
        )
        return {record.job_id: record for record in map(record_from_row, rows)}

    def ever_known(self, job_id: str) -> KnownJob | None:
        """Also if retention took it, and its id is remembered."""
        return read_known(self._db, EVER_KNOWN, job_id)

    def find(self, query: JobQuery, below: int | None, limit: int, max_bytes: int, *, whole: bool = False) -> FoundJobs:
        """The next jobs that match, newest first, below an ordinal: what is found with a bounded amount of work."""
        from worker_svc.record.query import find  # the supervisor has no need of it

        return find(self._db, query, below, limit, max_bytes, whole=whole)

    def owner_of(self, job_id: str) -> str | None:
        """None: there is no such job."""
        row = self._db.execute("SELECT owner FROM jobs WHERE job_id = ?", (job_id,)).fetchone()
        return str(row[0]) if row else None

    def is_owned(self, job_id: str, owner: str) -> bool:
        """Whether it is there and this owner's. Takes as long where it is not there as where it is somebody else's."""
        return self._db.execute(IS_OWNED, (owner, job_id)).fetchone() is not None

    def live_of(self, owner: str) -> tuple[int, int]:
        """How many of its jobs run, and wait."""
        row = self._db.execute(
            "SELECT COUNT(*) FILTER (WHERE state > 1), COUNT(*) FILTER (WHERE state = 1) FROM jobs"
            " INDEXED BY jobs_live WHERE state < 5 AND owner = ?",
            (owner,),
        ).fetchone()
        return row[0], row[1]

    def finished_totals(self, owner: str | None = None) -> tuple[int, int]:
        """How many finished jobs there are, and what their output takes on disk in bytes."""
        return read_finished_totals(self._db, owner)

    def oldest_finished(self, limit: int, after: FinishedRow | None, owner: str | None = None) -> list[FinishedRow]:
        return read_oldest_finished(self._db, limit, after, owner)

    def steady_ns(self) -> int:
        """The time by the store's own clock."""
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (STEADY_CLOCK,)).fetchone()
        return SteadyClock(row[0] if row else None).now_ns()

    def sequence(self) -> int:
        """The latest sequence number given out."""
        row = self._db.execute("SELECT value FROM meta WHERE key = 'sequence'").fetchone()
        return int(row[0]) if row else 0

    def events(self, after_sequence: int, limit: int) -> list[Transition]:
        """At most `limit` transitions after `after_sequence`, in order."""
        rows = self._db.execute(
            f"SELECT {EVENT_COLUMNS} FROM events WHERE sequence > ? ORDER BY sequence LIMIT ?",
            (after_sequence, limit),
        )
        return [transition_from_row(row) for row in rows]


def read_job(db: sqlite3.Connection, job_id: str, columns: str) -> JobRecord | None:
    row = db.execute(f"SELECT {columns} FROM jobs WHERE job_id = ?", (job_id,)).fetchone()
    return record_from_row(row) if row else None


def read_known(db: sqlite3.Connection, query: str, job_id: str) -> KnownJob | None:
    row = db.execute(query, {"job_id": job_id}).fetchone()
    return known_from_row(row) if row else None


def _of(owner: str | None) -> tuple[str, tuple[str, ...]]:
    return ("", ()) if owner is None else (" AND owner = ?", (owner,))


def read_finished_totals(db: sqlite3.Connection, owner: str | None = None) -> tuple[int, int]:
    only, whose = _of(owner)
    count, size = db.execute(
        f"SELECT COUNT(*), COALESCE(SUM(stored_bytes), 0) FROM jobs WHERE state = 5{only}", whose
    ).fetchone()
    return count, size


def read_oldest_finished(
    db: sqlite3.Connection, limit: int, after: FinishedRow | None, owner: str | None = None
) -> list[FinishedRow]:
    only, whose = _of(owner)
    # The index alone finds where to go on: it has the ordinal, too.
    place = (after.finished_steady_ns, after.ordinal) if after else (-1, 0)
    rows = db.execute(
        f"SELECT {FINISHED_ROW} FROM jobs WHERE state = 5 AND (finished_steady_ns, ordinal) > (?, ?){only}"
        " ORDER BY finished_steady_ns, ordinal LIMIT ?",
        (*place, *whose, limit),
    )
    return [FinishedRow(*row) for row in rows]


def schema_version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def version_text(path: str, found: int) -> str:
    if found > SCHEMA_VERSION:
        return (
            f"{path}: was written by a newer version (schema {found}, this one knows {SCHEMA_VERSION}): "
            "run that version, or use another state directory"
        )
    if not found:
        return f"{path}: holds no store: it was emptied, or the supervisor has not made it yet"
    return f"{path}: has schema {found}, not {SCHEMA_VERSION}: the supervisor has not migrated it yet"
