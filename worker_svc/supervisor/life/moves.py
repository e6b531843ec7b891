"""Moves of jobs, by the pure table, into the ledger. Nothing else changes the state that a job is in: who waits and how
many have a slot follows from them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Final

from worker_svc.job import Event, IllegalTransition, JobState, Outcome, Transition, next_state
from worker_svc.linux.clocks import wall_ns
from worker_svc.supervisor.ledger import Ledger
from worker_svc.supervisor.life.job import NEW, Job, Stage

_WITH_SLOT: Final = frozenset({JobState.STARTING, JobState.RUNNING, JobState.STOPPING})


class Moves:
    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.queue: OrderedDict[str, Job] = OrderedDict()
        """The jobs that wait for a slot, in order."""
        self.running = 0
        """How many jobs have a slot."""

    def move(
        self,
        job: Job,
        event: Event,
        stage: Stage | None = None,
        *,
        changes: dict[str, Any] | None = None,
        **fields: Any,
    ) -> bool:
        """Moves a job by the table into the record of the state that follows, or on in the one that it has. False: the
        event changes nothing in its state. Raises IllegalTransition."""
        to_state = next_state(job.state, event)
        if to_state is None:
            return False
        stage = stage or job.now
        if stage.state is not to_state:
            raise IllegalTransition(f"{event.name} leads from {job.state.name} to {to_state.name}, not {stage.state}")
        pid = stage.pid or job.now.pid
        moved = Transition(0, job.job_id, wall_ns(), job.state, to_state, pid=pid, owner=job.owner, **fields)
        self._ledger.move(job, moved, changes or {})
        self._enter(job, stage)
        return True

    def put_back(self, job: Job, stage: Stage) -> None:
        """Into the state that an earlier supervisor moved it to, by the same table."""
        self._enter(job, stage)

    def take_back(self, job: Job) -> None:
        """Its acceptance could not be recorded, nor any move since: it never was."""
        self._enter(job, NEW)

    def _enter(self, job: Job, stage: Stage) -> None:
        if job.state is JobState.QUEUED:
            del self.queue[job.job_id]
        self.running += (stage.state in _WITH_SLOT) - (job.state in _WITH_SLOT)
        job.now = stage
        if stage.state is JobState.QUEUED:
            self.queue[job.job_id] = job

    def end_otherwise(self, job: Job, reason: str) -> None:
        """In place of an end that could not be recorded as it was."""
        at_ns, lost = wall_ns(), Outcome.LOST
        moved = Transition(
            0, job.job_id, at_ns, JobState.RUNNING, JobState.FINISHED, outcome=lost, reason=reason, owner=job.owner
        )
        self._ledger.move(job, moved, {"outcome": int(lost), "reason": reason, "finished_ns": at_ns})
