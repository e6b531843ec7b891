"""How a job ends: its leader exits, what is left of it is ended too, its status is taken, its container removed.

A job is finished when its leader has exited and the rest of it is gone. The rest is killed, which takes the kernel a
moment; a process that cannot die (it waits in the kernel for a device or a dead file system) is named, and does not
hold up the end for longer than that.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Final, Protocol

from worker_svc.job import Exit, JobState, Outcome, error_text, outcome_of
from worker_svc.linux import failpoints
from worker_svc.supervisor import adoption
from worker_svc.supervisor.containment import Container, Containment, Usage
from worker_svc.supervisor.journal import note
from worker_svc.supervisor.livejob import LiveJob
from worker_svc.supervisor.timers import Timers

# How long after its end an adopted process may wait for its parent to reap it, before we give its status up.
_EXIT_STATUS_WAIT_S: Final = 5.0
# How long what is left of a job may take to die, before the job ends without it.
_TREE_WAIT_S: Final = 1.0
_LOOK_AGAIN_S: Final = 0.05
_TIDY_EVERY_S: Final = 1.0
_NAMED_MAX: Final = 8


class Finish(Protocol):
    def __call__(self, job: LiveJob, ended: Exit, outcome: Outcome, reason: str, stuck: str) -> None: ...


class Endings:
    def __init__(
        self,
        containment: Containment,
        epoll: select.epoll,
        timers: Timers,
        finish: Finish,
        lose: Callable[[LiveJob, str], None],
    ) -> None:
        """`finish` records the end of a job that ran, `lose` that of one whose status cannot be known."""
        self._containment = containment
        self._epoll = epoll
        self._timers = timers
        self._finish = finish
        self._lose = lose
        self._ending: dict[str, LiveJob] = {}
        """Jobs whose leader has exited while the rest is not gone yet."""
        self._lingering: list[Container] = []
        """Containers of finished jobs that would not die as a whole, or whose leader was lost."""
        self._is_tidying = False

    def __len__(self) -> int:
        """How many containers are still to be removed."""
        return len(self._lingering)

    # The leader

    def on_exit(self, job: LiveJob, events: int) -> None:
        """The pidfd has something to say: EPOLLIN, the leader has exited; EPOLLHUP, it was reaped (Linux 6.9)."""
        assert job.container is not None
        if job.exited:
            if events & select.EPOLLHUP and job.adopted:
                self._look_for_status(job)
                self.look_again(job)
            return
        if not job.adopted and not self._containment.has_exited(job.container):
            return
        job.exited = True
        # EPOLLHUP comes all the same; edge-triggered, or it would come for ever while the job waits for its tree.
        self._epoll.modify(job.pidfd, select.EPOLLET)
        self._ending[job.job_id] = job
        if job.adopted:
            self._timers.after(_EXIT_STATUS_WAIT_S, partial(self._give_status_up, job), job)
            # At once: its parent may reap it any moment.
            self._timers.attempt(partial(self._look_for_status, job), job)
        self._timers.attempt(partial(self.look_again, job), job)

    def _end_rest(self, job: LiveJob) -> None:
        assert job.container is not None
        if _may_go_on(job):
            is_watched = self._containment.watch(job.container)  # before we look: what happens after it is told
            if self._containment.is_empty(job.container):
                self._take_status(job)
                return
            self._ending[job.job_id] = job
            if not is_watched:
                self._timers.after(_TIDY_EVERY_S, partial(self.look_again, job), job)
            return
        if self._containment.kill(job.container):
            self._take_status(job)
            return
        self._ending[job.job_id] = job
        self._timers.after(_LOOK_AGAIN_S, partial(self.look_again, job), job)
        self._timers.after(_TREE_WAIT_S, partial(self._end_without_rest, job), job)

    def look_again(self, job: LiveJob) -> None:
        """Whether what is left of the job is gone; after a stop, too, whether it waits for its tree or not."""
        if job.job_id in self._ending and job.state is not JobState.FINISHED:
            self._end_rest(job)

    def _end_without_rest(self, job: LiveJob) -> None:
        if job.state is JobState.FINISHED or not job.exited:
            return
        self._take_status(job)

    def _take_status(self, job: LiveJob) -> None:
        assert job.container is not None
        stuck = self.survivors_text(job)
        if job.adopted:
            self._look_for_status(job)
            ended = job.ended
        else:
            os.close(os.open("/dev/null", os.O_RDONLY))  # there are files left: the status is told only once
            ended = self._containment.take_exit(job.container)
        if failpoints.is_armed:
            failpoints.reach("after-reap")
        if ended is not None:
            self._end(job, ended, stuck)
        else:
            self._ending[job.job_id] = job  # an adopted one, whose parent has yet to reap it

    def _look_for_status(self, job: LiveJob) -> None:
        assert job.container is not None
        job.ended = job.ended or adoption.exit_of(job.pidfd, job.container.pid, job.container.start_ticks)

    def _give_status_up(self, job: LiveJob) -> None:
        if job.state is JobState.FINISHED:
            return
        self._look_for_status(job)
        if job.ended is None:
            self._lose(job, "it ended after its supervisor had died, and this kernel does not tell its exit status")
        else:
            self.look_again(job)

    def _end(self, job: LiveJob, ended: Exit, stuck: str) -> None:
        assert job.container is not None
        try:
            usage = self._containment.usage(job.container)
        except OSError as error:  # the status, which is taken already, matters more
            note("job.usage_unknown", job_id=job.job_id, reason=str(error))
            usage = Usage()
        outcome = outcome_of(ended, job.stop_cause)
        if outcome is Outcome.SIGNALED and ended.signal == signal.SIGKILL and usage.oom_kills:
            outcome = Outcome.OOM_KILLED
        limit = "out of memory" if outcome is Outcome.OOM_KILLED else job.limit_text
        ended = ended._replace(
            cpu_ns=ended.cpu_ns if usage.cpu_ns is None else usage.cpu_ns,
            peak_memory_bytes=ended.peak_memory_bytes if usage.peak_memory_bytes is None else usage.peak_memory_bytes,
        )
        self._finish(job, ended, outcome, error_text(ended, outcome, limit), stuck)

    # The rest

    def survivors_text(self, job: LiveJob) -> str:
        """What of the job lives in spite of a kill: pid, state and what it waits in; and what may be the job's or
        another's, and is not killed for that. Empty if there is nothing."""
        assert job.container is not None
        found: list[str] = []
        if not self._containment.is_empty(job.container):
            alive = [one for one in self._containment.survivors(job.container) if one.pid != job.pid or not job.exited]
            found += [f"pid {one.pid} ({one.state}) waits in {one.wchan or 'the kernel'}" for one in alive]
        doubtful = self._containment.doubtful(job.container)
        found += [f"pid {one.pid} ({one.state}) runs on, being this job's or another's" for one in doubtful]
        return "; ".join(found[:_NAMED_MAX])

    def let_go(self, container: Container) -> None:
        """The job is finished, its leader's pidfd about to be closed: what is left of it is killed until it is gone."""
        self._ending.pop(container.job_id, None)
        if container.is_child and container.pidfd >= 0:  # its status was not taken, and nobody is to know it any more
            self._is_killed(container)
            self._reap(container.pid)
        self._containment.leader_gone(container)
        if self._is_killed(container):
            if not self._containment.remove(container):
                self._tidy_later()
            return
        self._lingering.append(container)
        self._tidy_later()

    def _reap(self, leader: int) -> None:
        if not os.waitpid(leader, os.WNOHANG)[0]:
            self._timers.after(_LOOK_AGAIN_S, partial(self._reap, leader))

    def _is_killed(self, container: Container) -> bool:
        try:
            return self._containment.kill(container)
        except OSError as error:
            note("supervisor.exhausted", reason=str(error))
            return False  # as long as it cannot be told

    def _tidy_later(self) -> None:
        if not self._is_tidying:
            self._is_tidying = True
            self._timers.after(_LOOK_AGAIN_S, self._tidy)

    def _tidy(self) -> None:
        self._is_tidying = False
        for container in self._lingering[:]:
            self._timers.attempt(partial(self._kill_lingering, container))
        if self._containment.tidy() or self._lingering:
            self._is_tidying = True
            self._timers.after(_TIDY_EVERY_S, self._tidy)

    def _kill_lingering(self, container: Container) -> None:
        if container in self._lingering and self._containment.kill(container):
            self._lingering.remove(container)
            self._containment.remove(container)

    def on_tree_events(self) -> None:
        """The containment's events fd is readable."""
        self._look_at(self._containment.take_events())

    def on_child_died(self) -> None:
        """SIGCHLD: orphans are our children."""
        self._look_at(self._containment.reap_orphans())

    def _look_at(self, containers: list[Container]) -> None:
        for container in containers:
            job = self._ending.get(container.job_id)
            if job is not None and job.container is container:
                self._timers.attempt(partial(self.look_again, job), job)
            elif container in self._lingering and self._is_killed(container):
                self._lingering.remove(container)
                self._containment.remove(container)

    def end_strangers(self) -> None:
        """What an earlier supervisor's jobs left and nobody has a record of: ended, since no one would ever."""
        for job_id, accepted_ns in self._containment.strangers():
            note("containment.orphan", job_id=job_id)
            container = self._containment.adopt(job_id, accepted_ns=accepted_ns)
            self._containment.kill(container)
            self.let_go(container)


def _may_go_on(job: LiveJob) -> bool:
    """Whether what is left of a job whose leader has exited is to be let alone: to its end, or the end of its grace."""
    if not job.waits_for_tree:
        return False
    is_in_grace = job.state is JobState.STOPPING and time.monotonic_ns() < job.kill_at_ns
    return job.state is JobState.RUNNING or is_in_grace
