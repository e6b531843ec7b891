"""The writing end of the store, which the supervisor alone has.

A commit is durable when it returns: WAL with synchronous=FULL fsyncs the log at each commit
(https://sqlite.org/pragma.html#pragma_synchronous).
"""

from __future__ import annotations

import os
import sqlite3
from typing import Any

from worker_svc.job import JobRecord, JobSpec, JobState, KnownJob, Outcome, Transition
from worker_svc.linux.clocks import SteadyClock
from worker_svc.record.paths import STORE_NAME
from worker_svc.record.reader import (
    FINISHED_ROW,
    read_finished_totals,
    read_job,
    read_known,
    read_oldest_finished,
    schema_version,
    version_text,
)
from worker_svc.record.schema import (
    EVER_KNOWN,
    INSERT_EVENT,
    KNOWN,
    MIGRATIONS,
    RECORD_COLUMNS,
    SCHEMA,
    SCHEMA_VERSION,
    SPEC_IN_ROW_MAX_BYTES,
    SPEC_OF,
    STEADY_CLOCK,
    FinishedRow,
    LiveRow,
    StoreError,
    storable,
)


class JobStore:
    """The writing end. Its owner holds the lock of the state directory."""

    def __init__(self, state_dir: str) -> None:
        """Opens the store, or makes it. Raises StoreError."""
        self.directory = state_dir
        self.path = f"{state_dir}/{STORE_NAME}"
        try:
            # Ours alone, whatever the umask; SQLite gives its other files the same mode.
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._opened = os.stat(self.path)
            self._db = sqlite3.connect(self.path, isolation_level=None, cached_statements=64)
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "cache_size=-1024", "busy_timeout=5000"):
                self._db.execute(f"PRAGMA {pragma}")
            self._migrate()
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"{self.path}: cannot be opened for writing: {error}") from error
        self._committed = int(self.get_meta("sequence") or 0)
        self.sequence = self._committed
        """The latest sequence number given out."""
        self.state_id = str(self.get_meta("state_id"))
        self.clock = SteadyClock(self.get_meta(STEADY_CLOCK))

    def _migrate(self) -> None:
        found = schema_version(self._db)
        if found > SCHEMA_VERSION:
            raise StoreError(version_text(self.path, found))
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

    def is_in_place(self) -> bool:
        """Whether what has its name is what was opened. Raises OSError: nothing has."""
        return os.path.samestat(os.stat(self.path), self._opened)

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

    def keep_clock(self) -> None:
        """From time to time. Raises sqlite3.Error."""
        kept = self.clock.to_keep()
        if kept:
            self.set_meta(STEADY_CLOCK, kept)

    def add_job(
        self,
        job_id: str,
        spec: JobSpec,
        fingerprint: str,
        accepted_ns: int,
        stdin: bytes,
        owner: str = "",
        text: str = "",
    ) -> int:
        """`text` is the spec's, where it is at hand. Returns the job's ordinal. The row is complete with the first
        `add_transition`."""
        whole = text or spec.to_text()
        is_large = len(whole) > SPEC_IN_ROW_MAX_BYTES
        in_row, spec_bytes = (spec.brief.to_text(), len(whole)) if is_large else (whole, 0)
        cursor = self._write(
            "INSERT INTO jobs (job_id, spec, spec_bytes, state, last_sequence, accepted_ns, fingerprint, owner)"
            " VALUES (?,?,?,0,0,?,?,?)",
            (job_id, in_row, spec_bytes, accepted_ns, fingerprint, owner),
        )
        ordinal = cursor.lastrowid
        assert ordinal is not None
        if is_large:
            self._write("INSERT INTO specs VALUES (?, ?)", (ordinal, whole))
        for label in spec.labels.items():
            self._write("INSERT INTO labels VALUES (?, ?, ?)", (ordinal, *label))
        if stdin:
            self._write("INSERT INTO stdin VALUES (?, ?)", (ordinal, stdin))
        return ordinal

    def add_transition(self, ordinal: int, moved: Transition, changes: dict[str, Any]) -> int:
        """Records one move, and `changes` of columns with it. Returns the sequence number it was given."""
        sequence = self.sequence + 1
        self._write(INSERT_EVENT, (sequence, *moved[1:]))
        columns = {"state": int(moved.to_state), "last_sequence": sequence, **changes}
        if moved.to_state is JobState.FINISHED:
            columns["finished_steady_ns"] = self.clock.now_ns()
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
        """Brief, if its spec is large."""
        return read_job(self._db, job_id, RECORD_COLUMNS)

    def ever_known(self, job_id: str) -> KnownJob | None:
        """Also if retention took it, and its id is remembered."""
        return read_known(self._db, EVER_KNOWN, job_id)

    def known(self, job_id: str) -> KnownJob | None:
        return read_known(self._db, KNOWN, job_id)

    def spec_of(self, ordinal: int) -> JobSpec:
        (text,) = self._db.execute(SPEC_OF, (ordinal,)).fetchone()
        return JobSpec.from_text(text)

    def stdin_of(self, ordinal: int) -> bytes:
        row = self._db.execute("SELECT content FROM stdin WHERE ordinal = ?", (ordinal,)).fetchone()
        return bytes(row[0]) if row else b""

    def delete_job(self, job_id: str, keep_ids: int = 0) -> None:
        """With `keep_ids` its id is remembered, if a client chose it, and so many in all."""
        if keep_ids:
            # Only the reason of a failed start is told to who starts it again.
            self._db.execute(
                "INSERT OR REPLACE INTO forgotten (job_id, owner, fingerprint, outcome, reason)"
                " SELECT job_id, owner, fingerprint, outcome, CASE outcome WHEN ? THEN reason ELSE '' END"
                " FROM jobs WHERE job_id = ? AND fingerprint != ''",
                (int(Outcome.START_FAILED), job_id),
            )
            self._db.execute(
                "DELETE FROM forgotten WHERE number <= (SELECT MAX(number) FROM forgotten) - ?", (keep_ids,)
            )
        for table in ("specs", "labels"):
            self._db.execute(
                f"DELETE FROM {table} WHERE ordinal = (SELECT ordinal FROM jobs WHERE job_id = ?)", (job_id,)
            )
        self._db.execute("DELETE FROM jobs WHERE job_id = ?", (job_id,))

    def drop_events(self, until_sequence: int) -> None:
        self._db.execute("DELETE FROM events WHERE sequence <= ?", (until_sequence,))

    def first_sequence(self) -> int:
        """The number of the oldest event that is kept; one more than the latest if none is."""
        (found,) = self._db.execute("SELECT MIN(sequence) FROM events").fetchone()
        return int(found) if found is not None else self.sequence + 1

    def finished_totals(self) -> tuple[int, int]:
        return read_finished_totals(self._db)

    def oldest_finished(self, limit: int) -> list[FinishedRow]:
        return read_oldest_finished(self._db, limit, None)

    def finished(self, job_id: str) -> FinishedRow | None:
        row = self._db.execute(f"SELECT {FINISHED_ROW} FROM jobs WHERE job_id = ? AND state = 5", (job_id,)).fetchone()
        return FinishedRow(*row) if row else None

    def live(self) -> list[LiveRow]:
        """The jobs that are not finished, in order of acceptance."""
        rows = self._db.execute(
            f"SELECT {', '.join(LiveRow._fields)} FROM jobs WHERE state < 5 ORDER BY ordinal"
        ).fetchall()
        return [LiveRow(row[0], row[1], JobState(row[2]), *row[3:]) for row in rows]


def _new_state_id() -> str:
    return os.urandom(8).hex()
