"""Moves that are decided but not yet on disk, and what must wait until they are.

Jobs move in memory first; the moves of one turn are then committed together, and only a commit that succeeded lets
the effects out. When the disk is full nothing is lost: the moves stay here, in order, and the next turn tries again.
Sequence numbers are given out at the commit, so that moves can be taken back until then. What cannot be written for a
reason of its own holds up no other job: it is put aside, and its job ended.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeAlias

from worker_svc.job import JobError, JobSpec, ResourceExhausted, Transition, Unavailable, fault_text
from worker_svc.record.writer import JobStore
from worker_svc.supervisor import disk_reserve
from worker_svc.supervisor.journal import note
from worker_svc.supervisor.life.job import Job


class _Add(NamedTuple):
    job: Job
    spec: JobSpec
    stdin: bytes
    text: str


class _Move(NamedTuple):
    job: Job
    moved: Transition
    changes: dict[str, Any]


class _Annotate(NamedTuple):
    job: Job
    changes: dict[str, Any]


class _Delete(NamedTuple):
    job_id: str
    keep_ids: int


class _DropEvents(NamedTuple):
    until_sequence: int


_Entry: TypeAlias = _Add | _Move | _Annotate | _Delete | _DropEvents

GiveUp: TypeAlias = Callable[[Job, Exception, bool], None]

# The kinds of sqlite3.Error for which the values are at fault; for all others it is the disk, and they may pass.
_FAULTS_OF_DATA: Final = (sqlite3.InterfaceError, sqlite3.ProgrammingError, sqlite3.IntegrityError, sqlite3.DataError)


class Ledger:
    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._pending: list[_Entry] = []
        self._effects: list[Callable[[], None]] = []
        self._urgent: list[Callable[[], None]] = []
        self.failure = ""
        """Why the last commit failed; empty after one that succeeded."""
        self._is_full = False

    def add(self, job: Job, spec: JobSpec, stdin: bytes, text: str = "") -> None:
        """`text` is the spec's, where it is at hand."""
        self._pending.append(_Add(job, spec, stdin, text))

    def move(self, job: Job, moved: Transition, changes: dict[str, Any]) -> None:
        self._pending.append(_Move(job, moved, changes))

    def annotate(self, job: Job, changes: dict[str, Any]) -> None:
        """Changes columns of a job without a move."""
        self._pending.append(_Annotate(job, changes))

    def delete(self, job_id: str, keep_ids: int) -> None:
        """`keep_ids`: of how many deleted jobs the ids are remembered; zero: this one's is not."""
        self._pending.append(_Delete(job_id, keep_ids))

    def drop_events(self, until_sequence: int) -> None:
        self._pending.append(_DropEvents(until_sequence))

    def then(self, effect: Callable[[], None]) -> None:
        """Runs `effect` once all that was decided so far is on disk."""
        self._effects.append(effect)

    def soon(self, effect: Callable[[], None]) -> None:
        """Runs `effect` in this turn, after the attempt to put what was decided on disk, whatever came of that."""
        self._urgent.append(effect)

    @property
    def is_behind(self) -> bool:
        return bool(self._pending)

    def commit(self, give_up: GiveUp) -> bool:
        """Puts what is pending on disk. False: it could not be, `failure` says why, and everything stays pending.

        `give_up` is to end a job of which something can never be written, with what it raised, and whether the job
        itself is not on record. What was pending of it is gone by then.
        """
        given_up: set[int] = set()
        self.failure = ""
        while self._pending and not self.failure:
            entry: _Entry = self._pending[0]
            try:
                self._store.begin()
                for entry in self._pending:
                    self._write(entry)
                self._store.commit()
                self._pending.clear()
            except Exception as error:
                self._store.rollback()
                is_full = getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL
                if is_full and disk_reserve.let_go(self._store.directory):
                    continue
                if isinstance(error, sqlite3.Error | MemoryError) and not isinstance(error, _FAULTS_OF_DATA):
                    self.failure = str(error) or "out of memory"
                    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_FULL)
                    self._is_full = code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_NOMEM)
                else:
                    self._put_aside(entry, error, given_up, give_up)
        return not self.failure

    def refusal(self) -> JobError:
        """What is said of a job that cannot be recorded because of `failure`."""
        kind = ResourceExhausted if self._is_full else Unavailable
        return kind(f"the job cannot be recorded now: {self.failure}")

    def _put_aside(self, entry: _Entry, error: Exception, given_up: set[int], give_up: GiveUp) -> None:
        job = None if isinstance(entry, _Delete | _DropEvents) else entry.job
        note("store.refused", entry=type(entry).__name__, job_id=job.job_id if job else "", reason=fault_text(error))
        if job is None or id(job) in given_up:
            self._pending.remove(entry)
            return
        given_up.add(id(job))
        mine = [one for one in self._pending if getattr(one, "job", None) is job]
        self._pending = [one for one in self._pending if getattr(one, "job", None) is not job]
        give_up(job, error, any(isinstance(one, _Add) for one in mine))

    def take_effects(self) -> list[Callable[[], None]]:
        effects, self._effects = self._effects, []
        return effects

    def take_urgent(self) -> list[Callable[[], None]]:
        urgent, self._urgent = self._urgent, []
        return urgent

    def take_back_new(self) -> list[Job]:
        """Forgets the jobs whose acceptance is not on disk, and all their moves. Returns them."""
        new = [entry.job for entry in self._pending if isinstance(entry, _Add)]
        gone = set(map(id, new))
        self._pending = [
            entry for entry in self._pending if isinstance(entry, _Delete | _DropEvents) or id(entry.job) not in gone
        ]
        return new

    def _write(self, entry: _Entry) -> None:
        match entry:
            case _Add(job, spec, stdin, text):
                job.ordinal = self._store.add_job(
                    job.job_id, spec, job.fingerprint, job.accepted_ns, stdin, job.owner, text
                )
            case _Move(job, moved, changes):
                self._store.add_transition(job.ordinal, moved, changes)
            case _Annotate(job, changes):
                self._store.annotate(job.ordinal, changes)
            case _Delete(job_id, keep_ids):
                self._store.delete_job(job_id, keep_ids)
            case _DropEvents(until_sequence):
                self._store.drop_events(until_sequence)
