"""A job that runs, and one that is asked to end and made to: signal, grace, SIGKILL.

Signals follow the attempt to record why they are sent, and go out even if it failed: a job that fills the disk must be
stoppable.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Final

from worker_svc.job import DURATION_MAX_S, Event, JobState, PreconditionFailed, StopCause
from worker_svc.linux.clocks import NS_PER_S
from worker_svc.supervisor.containment import Container
from worker_svc.supervisor.journal import note
from worker_svc.supervisor.life.job import Ask, Live
from worker_svc.supervisor.life.process import Process

# SIGKILL ends a process in microseconds, unless it waits in the kernel for what does not come.
_UNKILLABLE_AFTER_S: Final = 2.0
_REASONS: Final = {StopCause.TIMEOUT: "timeout", StopCause.OUTPUT: "output limit"}


class Alive(Live):
    """What is so in both: there is a process."""

    __slots__ = ("container", "process", "terms")

    def __init__(self, process: Process) -> None:
        super().__init__(process.house, process.job)
        self.process: Process = process
        self.container: Container = process.container
        self.terms = process.terms


class Running(Alive):
    __slots__ = ("paused",)
    state = JobState.RUNNING

    def __init__(self, process: Process, *, paused: bool = False) -> None:
        super().__init__(process)
        self.paused = paused

    @property
    def outlives_leader(self) -> bool:
        return self.terms.waits_for_tree

    def stop(self, ask: Ask) -> None:
        stopping = Stopping(self.process, ask.cause)
        changes = {"stop_cause": int(ask.cause), **({"paused": 0} if self.paused else {})}
        reason = _REASONS.get(ask.cause, "stop requested")
        self.house.moves.move(self.job, Event.STOP, stopping, changes=changes, reason=reason)
        if self.paused:
            self.house.timers.attempt(self.process.thaw, self.job)
        stopping.send(self.terms.stop_signal if ask.signal is None else ask.signal)
        stopping.kill_after(ask.grace_s)

    def on_timeout(self) -> None:
        self.stop(Ask(cause=StopCause.TIMEOUT))

    def on_output_exceeded(self) -> None:
        self.stop(Ask(cause=StopCause.OUTPUT))

    def pause(self) -> None:
        """Raises PreconditionFailed as `Process.signal`, and OSError; then it is not paused, nor recorded as if it
        was."""
        try:
            with self.process.permitted():
                self.house.containment.freeze(self.container)
        except (OSError, PreconditionFailed):
            self.house.timers.attempt(self.process.thaw, self.job)  # part of it may stand still
            raise
        self.paused = True
        self.house.moves.move(self.job, Event.PAUSE, changes={"paused": 1}, reason="paused")

    def resume(self) -> None:
        """Raises as `pause`; then it is paused still, for the most part."""
        with self.process.permitted():
            self.house.containment.thaw(self.container)
        self.paused = False
        self.house.moves.move(self.job, Event.RESUME, changes={"paused": 0}, reason="resumed")
        self.process.look_again_soon()  # while it stood still nobody was told of its end


class Stopping(Alive):
    __slots__ = ("_kill_at_ns", "cause")
    state = JobState.STOPPING

    def __init__(self, process: Process, cause: StopCause) -> None:
        super().__init__(process)
        self.cause = cause
        self._kill_at_ns = 0
        """When SIGKILL follows the stop signal, on the monotonic clock."""

    @property
    def outlives_leader(self) -> bool:
        return self.terms.waits_for_tree and time.monotonic_ns() < self._kill_at_ns

    def stop(self, ask: Ask) -> None:
        """Asked again, it is signalled again if a signal is named, and the nearer end counts; the first cause stays."""
        self.house.moves.move(self.job, Event.STOP)
        if ask.signal is not None:
            self.send(ask.signal)
        self.kill_after(ask.grace_s)

    def send(self, number: int) -> None:
        """Once the stop is on record, so that what the signal brings about is not taken for something else."""
        self.house.ledger.soon(partial(self._send, number))

    def _send(self, number: int) -> None:
        if self.job.now is not self:
            return
        try:
            self.process.signal(number, wakes=True)
        except PreconditionFailed as error:
            note("job.not_signalled", job_id=self.job.job_id, signal=number, reason=error.message)

    def kill_after(self, grace_s: float | None = None) -> None:
        """None: after the job's own grace."""
        grace_s = self.terms.stop_grace_s if grace_s is None else grace_s
        kill_at_ns = time.monotonic_ns() + int(min(grace_s, DURATION_MAX_S) * NS_PER_S)
        if self._kill_at_ns and self._kill_at_ns <= kill_at_ns:
            return
        self._kill_at_ns = kill_at_ns
        if grace_s <= 0:
            self.house.ledger.soon(self._kill)
        else:
            self.house.timers.after(grace_s, self._kill, self.job)

    def _kill(self) -> None:
        if self.job.now is not self or time.monotonic_ns() < self._kill_at_ns:  # finished, or other orders
            return
        self.house.containment.kill(self.container)
        self.process.look_again_soon()
        self.house.timers.after(_UNKILLABLE_AFTER_S, self._look_after_kill, self.job)

    def _look_after_kill(self) -> None:
        if self.job.now is not self:
            return
        stuck = self.process.survivors_text()
        if stuck != self.process.stuck:
            self.process.stuck = stuck
            note("job.unkillable", job_id=self.job.job_id, stuck=stuck)
            self.house.ledger.annotate(self.job, {"stuck": stuck})
        self._kill()

    def on_timeout(self) -> None:
        """It was asked to end for another reason, with a grace that may be years. The reason stays."""
        self.kill_after()

    def on_output_exceeded(self) -> None:
        """It writes on, and its head cannot be dropped."""
        self.kill_after(0.0)
