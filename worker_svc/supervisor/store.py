"""The store: jobs and events in SQLite, written by the supervisor alone, read by the worker too.

A commit is durable when it returns: WAL with synchronous=FULL fsyncs the log at each commit
(https://sqlite.org/pragma.html#pragma_synchronous). Readers never block the writer, nor it them.
"""

from __future__ import annotations

import json
import os
import sqlite3
from typing import Any, Final

from worker_svc.job import JobRecord, JobSpec, JobState, Transition
from worker_svc.supervisor.store_rows import (
    EVENT_COLUMNS,
    INSERT_EVENT,
    IS_OWNED,
    MIGRATIONS,
    RECORD_COLUMNS,
    SCHEMA,
    SCHEMA_VERSION,
    STORE_NAME,
    FinishedRow,
    LiveRow,
    StoreError,
    record_from_row,
    storable,
    transition_from_row,
    uri_of,
)

__all__ = [
    "SCHEMA_VERSION",
    "STORE_NAME",
    "FinishedRow",
    "JobStore",
    "LiveRow",
    "StoreError",
    "StoreReader",
    "output_path",
    "record_from_row",
    "stderr_path",
    "transition_from_row",
]

_encode_json: Final = json.JSONEncoder(separators=(",", ":"), sort_keys=True).encode


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
            found = _schema_version(self._db)
        except sqlite3.Error as error:
            raise StoreError(f"{path}: cannot be read: {error}") from error
        if found != SCHEMA_VERSION:
            raise StoreError(_version_text(path, found))

    def close(self) -> None:
        self._db.close()

    def get(self, job_id: str) -> JobRecord | None:
        row = self._db.execute(f"SELECT {RECORD_COLUMNS} FROM jobs WHERE job_id = ?", (job_id,)).fetchone()
        return record_from_row(row) if row else None

    def find(
        self,
        *,
        before_ordinal: int | None = None,
        states: tuple[JobState, ...] = (),
        labels: dict[str, str] | None = None,
        accepted_since_ns: int | None = None,
        accepted_before_ns: int | None = None,
        owner: str | None = None,
        limit: int,
    ) -> list[JobRecord]:
        """At most `limit` records that match, newest first, below `before_ordinal`."""
        where: list[str] = ["1"]
        values: list[Any] = []
        if owner is not None:
            where.append("owner = ?")
            values.append(owner)
        if before_ordinal is not None:
            where.append("ordinal < ?")
            values.append(before_ordinal)
        if states:
            where.append(f"state IN ({','.join('?' * len(states))})")
            values.extend(int(state) for state in states)
        for key, value in (labels or {}).items():
            where.append("EXISTS (SELECT 1 FROM json_each(spec, '$.labels') WHERE key = ? AND value = ?)")
            values.extend((key, value))
        if accepted_since_ns is not None:
            where.append("accepted_ns >= ?")
            values.append(accepted_since_ns)
        if accepted_before_ns is not None:
            where.append("accepted_ns < ?")
            values.append(accepted_before_ns)
        rows = self._db.execute(
            f"SELECT {RECORD_COLUMNS} FROM jobs WHERE {' AND '.join(where)} ORDER BY ordinal DESC LIMIT ?",
            (*values, limit),
        )
        return [record_from_row(row) for row in rows]

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
            " WHERE state < 5 AND owner = ?",
            (owner,),
        ).fetchone()
        return row[0], row[1]

    def finished_totals(self, owner: str | None = None) -> tuple[int, int]:
        """How many finished jobs there are, and what their output takes on disk in bytes."""
        return _finished_totals(self._db, owner)

    def oldest_finished(self, limit: int, skip: int, owner: str | None = None) -> list[FinishedRow]:
        return _oldest_finished(self._db, limit, skip, owner)

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


class JobStore:
    """The writing end. Its owner holds the lock of the state directory."""

    def __init__(self, state_dir: str) -> None:
        """Opens the store, or makes it. Raises StoreError."""
        self._path = f"{state_dir}/{STORE_NAME}"
        try:
            # Ours alone, whatever the umask; SQLite gives its other files the same mode.
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._db = sqlite3.connect(self._path, isolation_level=None, cached_statements=64)
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "cache_size=-1024", "busy_timeout=5000"):
                self._db.execute(f"PRAGMA {pragma}")
            self._migrate()
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"{self._path}: cannot be opened for writing: {error}") from error
        self._committed = int(self.get_meta("sequence") or 0)
        self.sequence = self._committed
        """The latest sequence number given out."""
        self.state_id = str(self.get_meta("state_id"))

    def _migrate(self) -> None:
        found = _schema_version(self._db)
        if found > SCHEMA_VERSION:
            raise StoreError(_version_text(self._path, found))
        if found == SCHEMA_VERSION:
            return
        # executescript commits first, so the script carries its own transaction.
        script = SCHEMA if found == 0 else "".join(MIGRATIONS[n] for n in range(found, SCHEMA_VERSION))
        if found == 0:
            script += f"INSERT INTO meta VALUES ('state_id', '{_new_state_id()}');"
        self._db.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;")

    def renew_state_id(self) -> None:
        self.state_id = _new_state_id()
        self.set_meta("state_id", self.state_id)

    def close(self) -> None:
        self._db.close()

    def begin(self) -> None:
        """Raises sqlite3.Error, as do all writes and `commit`: full or broken disk."""
        self._db.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        if self.sequence != self._committed:
            self.set_meta("sequence", self.sequence)
        self._db.execute("COMMIT")
        self._committed = self.sequence

    def rollback(self) -> None:
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
        self.sequence = self._committed

    def _write(self, sql: str, values: tuple[Any, ...]) -> sqlite3.Cursor:
        """The one way of values into the store, whatever they are: names of files are bytes, clocks can be set."""
        try:
            return self._db.execute(sql, values)
        except (UnicodeEncodeError, OverflowError):
            return self._db.execute(sql, tuple(map(storable, values)))

    def get_meta(self, key: str) -> Any:
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def set_meta(self, key: str, value: str | int | bytes) -> None:
        self._write("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def add_job(
        self, job_id: str, spec: JobSpec, fingerprint: str, accepted_ns: int, stdin: bytes, owner: str = ""
    ) -> int:
        """Returns the job's ordinal. The row is complete with the first `add_transition`."""
        cursor = self._write(
            "INSERT INTO jobs (job_id, spec, state, last_sequence, accepted_ns, fingerprint, owner)"
            " VALUES (?,?,0,0,?,?,?)",
            (job_id, _encode_json(spec.to_json()), accepted_ns, fingerprint, owner),
        )
        ordinal = cursor.lastrowid
        assert ordinal is not None
        if stdin:
            self._write("INSERT INTO stdin VALUES (?, ?)", (ordinal, stdin))
        return ordinal

    def add_transition(self, ordinal: int, moved: Transition, changes: dict[str, Any]) -> int:
        """Records one move, and `changes` of columns with it. Returns the sequence number it was given."""
        sequence = self.sequence + 1
        self._write(INSERT_EVENT, (sequence, *moved[1:]))
        columns = {"state": int(moved.to_state), "last_sequence": sequence, **changes}
        self._write(
            f"UPDATE jobs SET {', '.join(f'{name}=?' for name in columns)} WHERE ordinal = ?",
            (*columns.values(), ordinal),
        )
        if moved.from_state < JobState.RUNNING <= moved.to_state:
            self._db.execute("DELETE FROM stdin WHERE ordinal = ?", (ordinal,))
        self.sequence = sequence
        return sequence

    def annotate(self, ordinal: int, changes: dict[str, Any]) -> None:
        """Changes columns of a job without a move."""
        self._write(
            f"UPDATE jobs SET {', '.join(f'{name}=?' for name in changes)} WHERE ordinal = ?",
            (*changes.values(), ordinal),
        )

    def get(self, job_id: str) -> JobRecord | None:
        row = self._db.execute(f"SELECT {RECORD_COLUMNS} FROM jobs WHERE job_id = ?", (job_id,)).fetchone()
        return record_from_row(row) if row else None

    def spec_of(self, ordinal: int) -> JobSpec:
        (text,) = self._db.execute("SELECT spec FROM jobs WHERE ordinal = ?", (ordinal,)).fetchone()
        return JobSpec.from_json(json.loads(text))

    def stdin_of(self, ordinal: int) -> bytes:
        row = self._db.execute("SELECT content FROM stdin WHERE ordinal = ?", (ordinal,)).fetchone()
        return bytes(row[0]) if row else b""

    def delete_job(self, job_id: str) -> None:
        self._db.execute("DELETE FROM jobs WHERE job_id = ?", (job_id,))

    def drop_events(self, until_sequence: int) -> None:
        self._db.execute("DELETE FROM events WHERE sequence <= ?", (until_sequence,))

    def first_sequence(self) -> int:
        """Of the oldest event that is kept; one more than the latest if none is."""
        (found,) = self._db.execute("SELECT MIN(sequence) FROM events").fetchone()
        return int(found) if found is not None else self.sequence + 1

    def finished_totals(self) -> tuple[int, int]:
        return _finished_totals(self._db)

    def oldest_finished(self, limit: int) -> list[FinishedRow]:
        return _oldest_finished(self._db, limit, 0)

    def finished(self, job_id: str) -> FinishedRow | None:
        row = self._db.execute(
            "SELECT job_id, finished_ns, stored_bytes FROM jobs WHERE job_id = ? AND state = 5", (job_id,)
        ).fetchone()
        return FinishedRow(*row) if row else None

    def live(self) -> list[LiveRow]:
        """The jobs that are not finished, in order of acceptance."""
        rows = self._db.execute(
            f"SELECT {', '.join(LiveRow._fields)} FROM jobs WHERE state < 5 ORDER BY ordinal"
        ).fetchall()
        return [LiveRow(row[0], row[1], JobState(row[2]), *row[3:]) for row in rows]


def _of(owner: str | None) -> tuple[str, tuple[str, ...]]:
    return ("", ()) if owner is None else (" AND owner = ?", (owner,))


def _finished_totals(db: sqlite3.Connection, owner: str | None = None) -> tuple[int, int]:
    only, whose = _of(owner)
    count, size = db.execute(
        f"SELECT COUNT(*), COALESCE(SUM(stored_bytes), 0) FROM jobs WHERE state = 5{only}", whose
    ).fetchone()
    return count, size


def _oldest_finished(db: sqlite3.Connection, limit: int, skip: int, owner: str | None = None) -> list[FinishedRow]:
    only, whose = _of(owner)
    rows = db.execute(
        f"SELECT job_id, finished_ns, stored_bytes FROM jobs WHERE state = 5{only}"
        " ORDER BY finished_ns, ordinal LIMIT ? OFFSET ?",
        (*whose, limit, skip),
    )
    return [FinishedRow(*row) for row in rows]


def _new_state_id() -> str:
    return os.urandom(8).hex()


def _schema_version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def _version_text(path: str, found: int) -> str:
    if found > SCHEMA_VERSION:
        return (
            f"{path}: was written by a newer version (schema {found}, this one knows {SCHEMA_VERSION}): "
            "run that version, or use another state directory"
        )
    if not found:
        return f"{path}: holds no store: it was emptied, or the supervisor has not made it yet"
    return f"{path}: has schema {found}, not {SCHEMA_VERSION}: the supervisor has not migrated it yet"


def output_path(state_dir: str, job_id: str) -> str:
    return f"{state_dir}/output/{job_id}.out"


def stderr_path(state_dir: str, job_id: str) -> str:
    return f"{state_dir}/output/{job_id}.err"
