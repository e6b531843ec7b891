"""Moves of jobs, by the pure table, into the ledger. Nothing else changes a job's state."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from worker_svc.job import Event, StopCause, Transition, next_state
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
        moved = Transition(0, job.job_id, time.time_ns(), job.state, to_state, pid=job.pid, owner=job.owner, **fields)
        self._ledger.move(job, moved, changes or {})
        job.state = to_state
        return True

    def soon(self, effect: Callable[[], None]) -> None:
        """As Ledger.soon: what follows from a move, and must not wait for a disk that is full."""
        self._ledger.soon(effect)

    def note_stop(self, job: LiveJob, cause: StopCause) -> None:
        """On record of a job that is starting: a stop that takes effect once its process is there."""
        self._ledger.annotate(job, {"stop_cause": int(cause)})
