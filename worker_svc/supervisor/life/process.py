"""The process of a job, from its spawn to its exit, whichever of running and stopping the job is.

A job is finished when its leader has exited and the rest of it is gone. The rest is killed, which takes the kernel a
moment; a process that cannot die (it waits in the kernel for a device or a dead file system) is named, and does not
hold up the end for longer than that.
"""

from __future__ import annotations

import select
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from worker_svc.job import Event, Exit, JobState, Outcome, PreconditionFailed, StopCause, error_text, outcome_of
from worker_svc.linux import failpoints
from worker_svc.linux.clocks import NS_PER_S
from worker_svc.supervisor.containment import Container, Usage
from worker_svc.supervisor.journal import note
from worker_svc.supervisor.life import adoption
from worker_svc.supervisor.life.house import House
from worker_svc.supervisor.life.job import Job, Output, Terms
from worker_svc.supervisor.timers import is_passing

# How long after its end an adopted process may wait for its parent to reap it, before we give its status up.
_EXIT_STATUS_WAIT_S: Final = 5.0
# How long what is left of a job may take to die, before the job ends without it.
_TREE_WAIT_NS: Final = NS_PER_S
_LOOK_AGAIN_S: Final = 0.05
# Where nobody tells when a tree has ended.
_LOOK_EVERY_S: Final = 1.0
_NAMED_MAX: Final = 8


class Process:
    __slots__ = (
        "_exited",
        "_rest_until_ns",
        "_status",
        "container",
        "house",
        "job",
        "output",
        "pid",
        "pidfd",
        "started_monotonic_ns",
        "stuck",
        "terms",
    )

    def __init__(self, house: House, job: Job, terms: Terms, container: Container, started_monotonic_ns: int) -> None:
        """`container` knows its leader: whether that is our child, or an earlier supervisor's."""
        self.house = house
        self.job = job
        self.terms = terms
        self.container = container
        self.pid, self.pidfd = container.pid, container.pidfd
        self.started_monotonic_ns = started_monotonic_ns
        self.output = Output(job, terms)
        self.stuck = ""
        """What of it would not die, as last recorded."""
        self._exited = False
        """Whether the leader has."""
        self._status: Exit | None = None
        """The leader's, once it is taken: it is told only once."""
        self._rest_until_ns = 0
        """How long the end waits for what is left to die; zero: it was not killed yet."""

    def watch(self, pipes: tuple[tuple[int, int], ...] = ()) -> None:
        """From now on its exit, its timeout and its output are looked after."""
        if self.job.state is JobState.FINISHED:  # before this could be tried again
            return
        if not self.output.is_taken_up:
            if self.container.is_child:
                self.house.outputs.begin(self.output, pipes)
            else:
                self.house.outputs.take_up(self.output, self.pids())
        if self.pidfd not in self.house.by_pidfd:
            self.house.epoll.register(self.pidfd, select.EPOLLIN)
            self.house.by_pidfd[self.pidfd] = self
        if self.terms.timeout_s > 0:
            age_s = (time.monotonic_ns() - self.started_monotonic_ns) / NS_PER_S
            self.house.timers.after(max(0.0, self.terms.timeout_s - age_s), self.job.on_timeout, self.job)

    def pids(self) -> Iterator[int]:
        """Its own, and then, if one is not enough, those of all others of the job."""
        yield self.pid
        yield from (one.pid for one in self.house.containment.survivors(self.container) if one.pid != self.pid)

    # The way of an exit

    def on_pidfd(self, events: int) -> None:
        """It has something to say: EPOLLIN, the leader has exited; EPOLLHUP, it was reaped (Linux 6.9)."""
        if self._exited:
            if events & select.EPOLLHUP and not self.container.is_child:
                self._look_for_status()
                self.look_again()
            return
        if self.container.is_child and not self.house.containment.has_exited(self.container):
            return
        self._exited = True
        if not self.container.is_child:
            self.house.timers.after(_EXIT_STATUS_WAIT_S, self._give_status_up, self.job)
            # At once: its parent may reap it any moment.
            self.house.timers.attempt(self._look_for_status, self.job)
        self.house.timers.attempt(self.look_again, self.job)
        if self.pidfd >= 0:
            # It goes on without its leader, of which EPOLLHUP comes all the same: edge-triggered, or for ever.
            self.house.epoll.modify(self.pidfd, select.EPOLLET)

    def look_again(self) -> None:
        """Once the leader has exited: is the rest gone? Else it is killed, or let be for as long as it may go on."""
        if not self._exited or self.job.state is JobState.FINISHED:
            return
        containment = self.house.containment
        if self.job.now.outlives_leader:
            is_watched = containment.watch(self.container)  # before we look: what happens after it is told
            if not containment.is_empty(self.container):
                if not is_watched:
                    self.house.timers.after(_LOOK_EVERY_S, self.look_again, self.job)
                return
        now_ns = time.monotonic_ns()
        is_gone = containment.kill(self.container)
        if is_gone or 0 < self._rest_until_ns <= now_ns:
            self._end(is_gone=is_gone)
            return
        self._rest_until_ns = self._rest_until_ns or now_ns + _TREE_WAIT_NS
        self.house.timers.after(_LOOK_AGAIN_S, self.look_again, self.job)

    def _end(self, *, is_gone: bool) -> None:
        """Its status is taken, what it used is added up, and it is finished."""
        stuck = self.survivors_text(is_gone=is_gone)
        if not self.container.is_child:
            self._look_for_status()
        elif self._status is None:
            self._status = self.house.containment.take_exit(self.container)
        if failpoints.is_armed:
            failpoints.reach("after-reap")
        ended = self._status
        if ended is None:  # an adopted one, whose parent has yet to reap it
            return
        was_killed = ended.signal == signal.SIGKILL
        usage = self._usage(oom_kills=was_killed)
        cause = self.job.now.cause
        outcome = outcome_of(ended, cause)
        if outcome is Outcome.SIGNALED and was_killed and usage.oom_kills:
            outcome = Outcome.OOM_KILLED
        ended = ended._replace(
            cpu_ns=ended.cpu_ns if usage.cpu_ns is None else usage.cpu_ns,
            peak_memory_bytes=ended.peak_memory_bytes if usage.peak_memory_bytes is None else usage.peak_memory_bytes,
        )
        reason = error_text(ended, outcome, self._limit_text(outcome, cause))
        self.house.finish(self.job, Event.EXIT, outcome, reason, ended=ended, stuck=stuck, is_gone=is_gone)

    def _usage(self, *, oom_kills: bool) -> Usage:
        try:
            return self.house.containment.usage(self.container, oom_kills=oom_kills)
        except OSError as error:
            if is_passing(error):
                raise  # the status is kept until it has passed
            note("job.usage_unknown", job_id=self.job.job_id, reason=str(error))
            return Usage()

    def _limit_text(self, outcome: Outcome, cause: StopCause) -> str:
        """Names the limit that ended the job; empty if none did."""
        if outcome is Outcome.OOM_KILLED:
            return "out of memory"
        if cause is StopCause.TIMEOUT:
            return f"timed out after {self.terms.timeout_s:g} s"
        if cause is StopCause.OUTPUT:
            return f"wrote more than {self.terms.output_max_bytes} bytes"
        return ""

    def _look_for_status(self) -> None:
        """It may be told already: the process is not our child."""
        self._status = self._status or adoption.exit_of(self.pidfd, self.container.pid, self.container.start_ticks)

    def _give_status_up(self) -> None:
        if self.job.state is JobState.FINISHED:
            return
        self._look_for_status()
        if self._status is None:
            reason = "it ended after its supervisor had died, and this kernel does not tell its exit status"
            self.house.lose(self.job, reason)
        else:
            self.look_again()

    def survivors_text(self, *, is_gone: bool = False) -> str:
        """What of the job lives in spite of a kill: pid, state and what it waits in; and what may be the job's or
        another's, and is not killed for that. Empty if there is nothing."""
        containment = self.house.containment
        found: list[str] = []
        if not is_gone:
            alive = [one for one in containment.survivors(self.container) if one.pid != self.pid or not self._exited]
            found += [f"pid {one.pid} ({one.state}) waits in {one.wchan or 'the kernel'}" for one in alive]
        doubtful = containment.doubtful(self.container)
        found += [f"pid {one.pid} ({one.state}) runs on, being this job's or another's" for one in doubtful]
        return "; ".join(found[:_NAMED_MAX])

    # Signals

    def signal(self, number: int, *, wakes: bool = False) -> None:
        """Raises PreconditionFailed if the job's processes may not be signalled (they changed their user)."""
        with self.permitted():
            self.house.containment.signal(self.container, number, wakes=wakes)

    @contextmanager
    def permitted(self) -> Iterator[None]:
        try:
            yield
        except PermissionError as error:
            raise PreconditionFailed(f"the supervisor may not signal pid {self.pid}: {error.strerror}") from error

    def thaw(self) -> None:
        """What part of it stands still goes on, unless the job is finished, or paused anew."""
        if self.job.state is JobState.FINISHED or self.job.now.paused:
            return
        try:
            self.house.containment.thaw(self.container)
        except PermissionError as error:
            note("job.not_signalled", job_id=self.job.job_id, signal=int(signal.SIGCONT), reason=str(error))
        self.look_again_soon()

    def look_again_soon(self) -> None:
        """In this turn, but after what is under way."""
        self.house.timers.after(0.0, self.look_again, self.job)
