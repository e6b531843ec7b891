"""How jobs are asked to end, and made to: signal, grace, SIGKILL.

Signals follow the attempt to record why they are sent, and go out even if it failed: a job that fills the disk must be
stoppable.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Final

from worker_svc.job import DURATION_MAX_S, Event, JobState, PreconditionFailed, StopCause
from worker_svc.linux.clocks import NS_PER_S
from worker_svc.supervisor.containment import Containment
from worker_svc.supervisor.journal import note
from worker_svc.supervisor.livejob import LiveJob
from worker_svc.supervisor.timers import Timers
from worker_svc.supervisor.transitions import Transitions

# SIGKILL ends a process in microseconds, unless it waits in the kernel for what does not come.
_UNKILLABLE_AFTER_S: Final = 2.0
# A start that has no process yet waits for a thread, since others hang.
_GIVE_UP_AGAIN_S: Final = 1.0


class Stops:
    def __init__(
        self,
        transitions: Transitions,
        timers: Timers,
        containment: Containment,
        end_queued: Callable[[LiveJob], None],
        on_unkillable: Callable[[LiveJob], None],
        kill_start: Callable[[LiveJob], bool],
        look_again: Callable[[LiveJob], None],
    ) -> None:
        """`end_queued` ends a job that has not started; `on_unkillable` hears of one that a kill did not end,
        `kill_start` gives up a start that hangs; `look_again` looks, later in the turn, whether anything is left of a
        job whose leader has exited."""
        self._transitions = transitions
        self._timers = timers
        self._containment = containment
        self._end_queued = end_queued
        self._on_unkillable = on_unkillable
        self._kill_start = kill_start
        self._look_again = look_again

    def stop(
        self,
        job: LiveJob,
        number: int | None = None,
        grace_s: float | None = None,
        *,
        cause: StopCause = StopCause.REQUEST,
    ) -> None:
        """Asks a job to end. Asked again, it is signalled again if a signal is named, and the nearer end counts."""
        if job.state is JobState.STARTING:
            if job.asked is not None:
                asked_number, asked_grace_s = job.asked
                number = asked_number if number is None else number
                grace_s = min(_or(asked_grace_s, job.stop_grace_s), _or(grace_s, job.stop_grace_s))
            else:
                job.asked_cause = cause
            job.asked = (number, grace_s)
            self._transitions.note_stop(job, job.asked_cause)
            # It may never come to run: a program on a dead file system.
            self._timers.after(_or(grace_s, job.stop_grace_s), partial(self._give_up_start, job), job)
            return
        if job.state is JobState.QUEUED:
            job.stop_cause = cause
            self._end_queued(job)
            return
        reason = {StopCause.TIMEOUT: "timeout", StopCause.OUTPUT: "output limit"}.get(cause, "stop requested")
        changes = {"stop_cause": int(cause), **({"paused": 0} if job.paused else {})}
        moved = self._transitions.move(job, Event.STOP, changes=changes, reason=reason)
        if moved:
            job.stop_cause = cause
        if job.state is not JobState.STOPPING:
            return
        if job.paused:
            job.paused = False
            self._timers.attempt(partial(self._thaw, job), job)
        if moved or number is not None:
            # Once the stop is on record, so that what it brings about is not taken for something else.
            number = job.stop_signal if number is None else number
            self._transitions.soon(partial(self._stop_signal, job, number))
        self.kill_after(job, job.stop_grace_s if grace_s is None else grace_s)

    def _give_up_start(self, job: LiveJob) -> None:
        if job.state is not JobState.STARTING:
            return
        job.given_up = self._kill_start(job) or job.given_up
        if not job.given_up and not job.giving_up:
            job.giving_up = True
            self._timers.after(_GIVE_UP_AGAIN_S, partial(self._give_up_again, job), job)

    def _give_up_again(self, job: LiveJob) -> None:
        job.giving_up = False
        self._give_up_start(job)

    def kill_after(self, job: LiveJob, grace_s: float) -> None:
        kill_at_ns = time.monotonic_ns() + int(min(grace_s, DURATION_MAX_S) * NS_PER_S)
        if job.kill_at_ns and job.kill_at_ns <= kill_at_ns:
            return
        job.kill_at_ns = kill_at_ns
        if grace_s <= 0:
            self._transitions.soon(partial(self._kill, job))
        else:
            self._timers.after(grace_s, partial(self._kill, job), job)

    def _kill(self, job: LiveJob) -> None:
        if job.state is not JobState.STOPPING or time.monotonic_ns() < job.kill_at_ns:  # finished, or other orders
            return
        assert job.container is not None
        self._containment.kill(job.container)
        self._look_again(job)
        self._timers.after(_UNKILLABLE_AFTER_S, partial(self._look_after_kill, job), job)

    def _look_after_kill(self, job: LiveJob) -> None:
        if job.state is JobState.STOPPING:
            self._on_unkillable(job)
            self._kill(job)

    def on_timeout(self, job: LiveJob) -> None:
        if job.state is JobState.RUNNING:
            self.stop(job, cause=StopCause.TIMEOUT)
        elif job.state is JobState.STOPPING:
            # It was asked to end for another reason, with a grace that may be years. The reason stays.
            self.kill_after(job, job.stop_grace_s)

    def on_start_timeout(self, job: LiveJob) -> None:
        """Its time has passed since it was launched. Once it runs, time is counted from then."""
        if job.state is JobState.STARTING:
            self.stop(job, cause=StopCause.TIMEOUT)
            self._give_up_start(job)

    def signal(self, job: LiveJob, number: int, *, wakes: bool = False) -> None:
        """Raises PreconditionFailed if the job's processes may not be signalled (they changed their user)."""
        assert job.container is not None
        try:
            self._containment.signal(job.container, number, wakes=wakes)
        except PermissionError as error:
            raise _not_allowed(job, error) from error

    def pause(self, job: LiveJob) -> None:
        """Raises PreconditionFailed as `signal`, and OSError; then it is not paused, nor recorded as if it was."""
        assert job.container is not None
        try:
            self._containment.freeze(job.container)
        except OSError as error:
            self._timers.attempt(partial(self._thaw, job), job)  # part of it may stand still
            if isinstance(error, PermissionError):
                raise _not_allowed(job, error) from error
            raise
        job.paused = True
        self._transitions.move(job, Event.PAUSE, changes={"paused": 1}, reason="paused")

    def resume(self, job: LiveJob) -> None:
        """Raises as `pause`; then it is paused still, for the most part."""
        assert job.container is not None
        try:
            self._containment.thaw(job.container)
        except PermissionError as error:
            raise _not_allowed(job, error) from error
        job.paused = False
        self._transitions.move(job, Event.RESUME, changes={"paused": 0}, reason="resumed")
        self._look_again(job)  # while it stood still nobody was told of its end

    def thaw_if_unrecorded(self, job: LiveJob) -> None:
        """For an adopted job: the supervisor that froze it may have died before that was on record."""
        if job.container is not None and not job.paused and self._containment.is_frozen(job.container):
            self._timers.attempt(partial(self._thaw, job), job)

    def _thaw(self, job: LiveJob) -> None:
        if job.container is None or job.paused:  # it is finished, or paused anew
            return
        try:
            self._containment.thaw(job.container)
        except PermissionError as error:
            note("job.not_signalled", job_id=job.job_id, signal=int(signal.SIGCONT), reason=str(error))
        self._look_again(job)

    def _stop_signal(self, job: LiveJob, number: int) -> None:
        if job.state is not JobState.STOPPING:
            return
        try:
            self.signal(job, number, wakes=True)
        except PreconditionFailed as error:
            note("job.not_signalled", job_id=job.job_id, signal=number, reason=error.message)


def _not_allowed(job: LiveJob, error: PermissionError) -> PreconditionFailed:
    return PreconditionFailed(f"the supervisor may not signal pid {job.pid}: {error.strerror}")


def _or(grace_s: float | None, default_s: float) -> float:
    return default_s if grace_s is None else grace_s
