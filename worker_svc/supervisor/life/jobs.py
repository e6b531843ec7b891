"""All jobs that are not finished: how they are accepted, and given a slot."""

from __future__ import annotations

from worker_svc.job import (
    Event,
    JobError,
    JobSpec,
    JobState,
    PreconditionFailed,
    ResourceExhausted,
    error_message,
    fault_text,
)
from worker_svc.supervisor.containment import ContainmentError
from worker_svc.supervisor.life.house import House
from worker_svc.supervisor.life.job import Ask, Job
from worker_svc.supervisor.life.starting import Queued, Starting, text_of
from worker_svc.supervisor.retention import check_floor


class Jobs(House):
    """The house, and the way in."""

    def __len__(self) -> int:
        return len(self.by_id)

    @property
    def running(self) -> int:
        """How many have a slot."""
        return self.moves.running

    @property
    def queued(self) -> int:
        return len(self.moves.queue)

    def get(self, job_id: str) -> Job | None:
        return self.by_id.get(job_id)

    def stop_all(self) -> None:
        for job in list(self.by_id.values()):
            job.now.stop(Ask())

    def accept(self, job: Job, spec: JobSpec, stdin: bytes, secrets: bytes = b"", text: str = "") -> None:
        """Takes a new job: into a slot, or into the queue. Raises ResourceExhausted, PreconditionFailed."""
        if not self.reserve.refill():
            raise ResourceExhausted("the supervisor is short of memory or of open files: try again later")
        check_floor(self.store, self.settings)
        self._check_limits(spec)
        self.outputs.check(spec)
        has_slot = self.running < self.settings.slots and not self.queued
        if not has_slot and self.queued >= self.settings.queue_length:
            raise ResourceExhausted(
                f"all {self.settings.slots} slots are taken and {self.queued} jobs wait, which is as many as may "
                "(jobs.queue_length): try again later"
            )
        self.by_id[job.job_id] = job
        self.ledger.add(job, spec, stdin, text)
        if has_slot:
            Starting(self, job, secrets, spec, stdin).launch(queued_ns=0)
        else:
            queued = Queued(self, job, secrets)
            self.moves.move(job, Event.ENQUEUE, queued)
            self.ledger.then(queued.answer)

    def _check_limits(self, spec: JobSpec) -> None:
        """Refused now rather than recorded and refused later, when its turn comes."""
        try:
            self.containment.check(spec.limits)
        except ContainmentError as error:
            raise PreconditionFailed(text_of(error)) from error

    def take_back(self, job: Job, error: JobError) -> None:
        """Its acceptance could not be recorded: it never was."""
        if job.state is JobState.FINISHED:  # stopped in the same turn: it holds nothing any more
            self.retention.on_deleted(0)
        self.moves.take_back(job)
        del self.by_id[job.job_id]
        job.answer(error)

    def give_up(self, job: Job, error: Exception, is_new: bool = False) -> None:
        """What fails in an unforeseen way for one job ends that job. `is_new`: it is not on record, and never was."""
        if is_new:
            self.take_back(job, PreconditionFailed(f"the job cannot be recorded: {fault_text(error)}"))
            return
        reason = error_message(f"the supervisor failed on it: {fault_text(error)}")
        if job.state is JobState.FINISHED:
            self.moves.end_otherwise(job, f"lost: {reason}")
        else:
            job.now.give_up(reason)

    def promote(self) -> None:
        """Slots that are free go to those that wait."""
        while self.queued and self.running < self.settings.slots and self.reserve.refill():
            waiting = next(iter(self.moves.queue.values())).now
            assert isinstance(waiting, Queued)
            waiting.launch()
