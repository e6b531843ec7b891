"""The store: jobs and events in SQLite, written by the supervisor alone, read by the worker too.

A commit is durable when it returns: WAL with synchronous=FULL fsyncs the log at each commit
(https://sqlite.org/pragma.html#pragma_synchronous). Readers never block the writer, nor it them.
"""

from __future__ import annotations

import json
import os
import sqlite3
from typing import Any, Final, NamedTuple

from worker_svc.job import JobRecord, JobSpec, JobState, Outcome, Transition

STORE_NAME: Final = "jobs.sqlite3"
SCHEMA_VERSION: Final = 1

# `ordinal` is the order of acceptance. Standard input lies apart, so that the rows stay small, and only until
# the process has it. Events outlive the deletion of their job, so that their numbers have no gaps.
_SCHEMA: Final = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE jobs (
    ordinal INTEGER PRIMARY KEY AUTOINCREMENT,
    job_id TEXT NOT NULL UNIQUE,
    spec TEXT NOT NULL,
    state INTEGER NOT NULL,
    last_sequence INTEGER NOT NULL,
    accepted_ns INTEGER NOT NULL,
    fingerprint TEXT NOT NULL DEFAULT '',
    outcome INTEGER NOT NULL DEFAULT 0,
    exit_code INTEGER,
    signal INTEGER,
    reason TEXT NOT NULL DEFAULT '',
    pid INTEGER NOT NULL DEFAULT 0,
    started_ns INTEGER,
    finished_ns INTEGER,
    wall_ns INTEGER,
    cpu_ns INTEGER,
    peak_memory_bytes INTEGER,
    output_size_bytes INTEGER,
    stderr_size_bytes INTEGER,
    boot_id TEXT NOT NULL DEFAULT '',
    start_ticks INTEGER NOT NULL DEFAULT 0,
    started_monotonic_ns INTEGER NOT NULL DEFAULT 0,
    stop_cause INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX jobs_live ON jobs (ordinal) WHERE state < 5;
CREATE INDEX jobs_finished ON jobs (finished_ns) WHERE state = 5;
CREATE TABLE stdin (ordinal INTEGER PRIMARY KEY, content BLOB NOT NULL);
CREATE TABLE events (
    sequence INTEGER PRIMARY KEY,
    job_id TEXT NOT NULL,
    at_ns INTEGER NOT NULL,
    from_state INTEGER NOT NULL,
    to_state INTEGER NOT NULL,
    pid INTEGER NOT NULL,
    outcome INTEGER NOT NULL,
    exit_code INTEGER,
    signal INTEGER,
    reason TEXT NOT NULL,
    queued_ns INTEGER,
    wall_ns INTEGER,
    cpu_ns INTEGER
);
"""
# Entry N brings a store from schema N to N + 1.
_MIGRATIONS: Final[dict[int, str]] = {}

_RECORD_COLUMNS: Final = ", ".join(JobRecord._fields)
_EVENT_COLUMNS: Final = (
    "sequence, job_id, at_ns, from_state, to_state, pid, outcome, exit_code, signal, reason, queued_ns, wall_ns, cpu_ns"
)
_INSERT_EVENT: Final = f"INSERT INTO events ({_EVENT_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?)"

_encode_json = json.JSONEncoder(separators=(",", ":"), sort_keys=True).encode


class LiveRow(NamedTuple):
    """Of a job that is not finished: what a supervisor that starts must know to go on with it."""

    ordinal: int
    job_id: str
    state: JobState
    fingerprint: str
    pid: int
    boot_id: str
    start_ticks: int
    accepted_ns: int
    started_monotonic_ns: int
    stop_cause: int


class StoreError(Exception):
    """The store cannot be used as it is; the text says what is wrong and what to do."""


def record_from_row(row: tuple[Any, ...]) -> JobRecord:
    ordinal, job_id, spec, state, last_sequence, accepted_ns, fingerprint, outcome, *rest = row
    return JobRecord(
        ordinal,
        job_id,
        JobSpec.from_json(json.loads(spec)),
        JobState(state),
        last_sequence,
        accepted_ns,
        fingerprint,
        Outcome(outcome),
        *rest,
    )


def transition_from_row(row: tuple[Any, ...]) -> Transition:
    sequence, job_id, at_ns, from_state, to_state, pid, outcome, *rest = row
    return Transition(
        sequence, job_id, at_ns, JobState(from_state), JobState(to_state), pid, Outcome(outcome), *rest
    )


class StoreReader:
    """Reads the store; any number of them, in any process. Every method is one short read."""

    def __init__(self, state_dir: str) -> None:
        """Raises StoreError."""
        from urllib.parse import quote  # not at the top: the supervisor, which imports this too, has no need of it

        path = f"{state_dir}/{STORE_NAME}"
        try:
            # Not mode=ro: a WAL reader must be able to write the shared-memory index.
            self._db = sqlite3.connect(f"file:{quote(path)}?mode=rw", uri=True, isolation_level=None)
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
        row = self._db.execute(f"SELECT {_RECORD_COLUMNS} FROM jobs WHERE job_id = ?", (job_id,)).fetchone()
        return record_from_row(row) if row else None

    def find(
        self,
        *,
        before_ordinal: int | None = None,
        states: tuple[JobState, ...] = (),
        labels: dict[str, str] | None = None,
        accepted_since_ns: int | None = None,
        accepted_before_ns: int | None = None,
        limit: int,
    ) -> list[JobRecord]:
        """At most `limit` records that match, newest first, below `before_ordinal`."""
        where: list[str] = ["1"]
        values: list[Any] = []
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
            f"SELECT {_RECORD_COLUMNS} FROM jobs WHERE {' AND '.join(where)} ORDER BY ordinal DESC LIMIT ?",
            (*values, limit),
        )
        return [record_from_row(row) for row in rows]

    def events(self, after_sequence: int, limit: int) -> list[Transition]:
        """At most `limit` transitions after `after_sequence`, in order."""
        rows = self._db.execute(
            f"SELECT {_EVENT_COLUMNS} FROM events WHERE sequence > ? ORDER BY sequence LIMIT ?",
            (after_sequence, limit),
        )
        return [transition_from_row(row) for row in rows]


class JobStore:
    """The writing end. Its owner holds the lock of the state directory."""

    def __init__(self, state_dir: str) -> None:
        """Opens the store, or makes it. Raises StoreError."""
        self._path = f"{state_dir}/{STORE_NAME}"
        try:
            self._db = sqlite3.connect(self._path, isolation_level=None, cached_statements=64)
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "cache_size=-1024", "busy_timeout=5000"):
                self._db.execute(f"PRAGMA {pragma}")
            self._migrate()
        except sqlite3.Error as error:
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
        script = _SCHEMA if found == 0 else "".join(_MIGRATIONS[n] for n in range(found, SCHEMA_VERSION))
        if found == 0:
            script += f"INSERT INTO meta VALUES ('state_id', '{os.urandom(8).hex()}');"
        self._db.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;")

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

    def get_meta(self, key: str) -> Any:
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def set_meta(self, key: str, value: str | int) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def add_job(self, job_id: str, spec: JobSpec, fingerprint: str, accepted_ns: int, stdin: bytes) -> int:
        """Returns the job's ordinal. The row is complete with the first `add_transition`."""
        cursor = self._db.execute(
            "INSERT INTO jobs (job_id, spec, state, last_sequence, accepted_ns, fingerprint) VALUES (?,?,0,0,?,?)",
            (job_id, _encode_json(spec.to_json()), accepted_ns, fingerprint),
        )
        ordinal = cursor.lastrowid
        assert ordinal is not None
        if stdin:
            self._db.execute("INSERT INTO stdin VALUES (?, ?)", (ordinal, stdin))
        return ordinal

    def add_transition(self, ordinal: int, moved: Transition, changes: dict[str, Any]) -> int:
        """Records one move, and `changes` of columns with it. Returns the sequence number it was given."""
        sequence = self.sequence + 1
        self._db.execute(_INSERT_EVENT, (sequence, *moved[1:]))
        columns = {"state": int(moved.to_state), "last_sequence": sequence, **changes}
        self._db.execute(
            f"UPDATE jobs SET {', '.join(f'{name}=?' for name in columns)} WHERE ordinal = ?",
            (*columns.values(), ordinal),
        )
        if moved.from_state < JobState.RUNNING <= moved.to_state:
            self._db.execute("DELETE FROM stdin WHERE ordinal = ?", (ordinal,))
        self.sequence = sequence
        return sequence

    def get(self, job_id: str) -> JobRecord | None:
        row = self._db.execute(f"SELECT {_RECORD_COLUMNS} FROM jobs WHERE job_id = ?", (job_id,)).fetchone()
        return record_from_row(row) if row else None

    def spec_of(self, ordinal: int) -> JobSpec:
        (text,) = self._db.execute("SELECT spec FROM jobs WHERE ordinal = ?", (ordinal,)).fetchone()
        return JobSpec.from_json(json.loads(text))

    def stdin_of(self, ordinal: int) -> bytes:
        row = self._db.execute("SELECT content FROM stdin WHERE ordinal = ?", (ordinal,)).fetchone()
        return bytes(row[0]) if row else b""

    def delete_job(self, job_id: str) -> None:
        self._db.execute("DELETE FROM jobs WHERE job_id = ?", (job_id,))

    def live(self) -> list[LiveRow]:
        """The jobs that are not finished, in order of acceptance."""
        rows = self._db.execute(
            f"SELECT {', '.join(LiveRow._fields)} FROM jobs WHERE state < 5 ORDER BY ordinal"
        ).fetchall()
        return [LiveRow(row[0], row[1], JobState(row[2]), *row[3:]) for row in rows]


def _schema_version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def _version_text(path: str, found: int) -> str:
    if found > SCHEMA_VERSION:
        return (
            f"{path}: was written by a newer version (schema {found}, this one knows {SCHEMA_VERSION}): "
            "run that version, or use another state directory"
        )
    return f"{path}: has schema {found}, not {SCHEMA_VERSION}: the supervisor has not migrated it yet"


def output_path(state_dir: str, job_id: str) -> str:
    return f"{state_dir}/output/{job_id}.out"


def stderr_path(state_dir: str, job_id: str) -> str:
    return f"{state_dir}/output/{job_id}.err"


def directory_identity(state_dir: str) -> str:
    """Tells a copy of a state directory from the original: device and inode of the directory itself."""
    found = os.stat(state_dir)
    return f"{found.st_dev}:{found.st_ino}"
