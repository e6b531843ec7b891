"""Moves of jobs, by the pure table, into the ledger. Nothing else changes a job's state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from worker_svc.job import Event, JobState, Outcome, StopCause, Transition, next_state
from worker_svc.linux.clocks import wall_ns
from worker_svc.supervisor.ledger import Ledger
from worker_svc.supervisor.livejob import LiveJob


class Transitions:
    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def move(self, job: LiveJob, event: Event, *, changes: dict[str, Any] | None = None, **fields: Any) -> bool:
        """Moves a job by the table. False: the event changes nothing in its state."""
        to_state = next_state(job.state, event)
        if to_state is None:
            return False
        moved = Transition(0, job.job_id, wall_ns(), job.state, to_state, pid=job.pid, owner=job.owner, **fields)
        self._ledger.move(job, moved, changes or {})
        job.state = to_state
        return True

    def end_otherwise(self, job: LiveJob, reason: str) -> None:
        """In place of an end that could not be recorded as it was."""
        at_ns, lost = wall_ns(), Outcome.LOST
        moved = Transition(
            0, job.job_id, at_ns, JobState.RUNNING, JobState.FINISHED, outcome=lost, reason=reason, owner=job.owner
        )
        self._ledger.move(job, moved, {"outcome": int(lost), "reason": reason, "finished_ns": at_ns})

    def soon(self, effect: Callable[[], None]) -> None:
        """As Ledger.soon: what follows from a move, and must not wait for a disk that is full."""
        self._ledger.soon(effect)

    def note_stop(self, job: LiveJob, cause: StopCause) -> None:
        """On record of a job that is starting: a stop that takes effect once its process is there."""
        self._ledger.annotate(job, {"stop_cause": int(cause)})
