"""What is left of jobs that are finished: killed until it is gone, and their containers removed."""

from __future__ import annotations

import os
from functools import partial
from typing import Final

from worker_svc.supervisor.containment import Container, Containment
from worker_svc.supervisor.journal import note
from worker_svc.supervisor.life.job import Job
from worker_svc.supervisor.timers import Timers

_REAP_AGAIN_S: Final = 0.05
_TIDY_SOON_S: Final = 0.05
_TIDY_EVERY_S: Final = 1.0


class Remains:
    def __init__(self, containment: Containment, timers: Timers, by_id: dict[str, Job]) -> None:
        self._containment = containment
        self._timers = timers
        self._by_id = by_id
        self._lingering: set[Container] = set()
        """Containers of finished jobs that would not die as a whole, or whose leader was lost."""
        self._is_tidying = False

    def __len__(self) -> int:
        """How many containers are still to be removed."""
        return len(self._lingering)

    def take(self, container: Container, *, is_gone: bool) -> None:
        """The job is finished, its leader's pidfd about to be closed. `is_gone`: nothing of it lives."""
        is_gone = is_gone or self._is_killed(container)
        if container.pidfd >= 0:
            if container.is_child:  # its status was not taken, and nobody is to know it any more
                self._reap(container.pid)
            self._containment.leader_gone(container)
        if not is_gone:
            self._lingering.add(container)
        if not is_gone or not self._containment.remove(container):
            self._tidy_in(_TIDY_SOON_S)

    def _reap(self, leader: int) -> None:
        if not os.waitpid(leader, os.WNOHANG)[0]:
            self._timers.after(_REAP_AGAIN_S, partial(self._reap, leader))

    def _is_killed(self, container: Container) -> bool:
        try:
            return self._containment.kill(container)
        except OSError as error:
            note("supervisor.exhausted", reason=str(error))
            return False  # as long as it cannot be told

    def _tidy_in(self, delay_s: float) -> None:
        if not self._is_tidying:
            self._is_tidying = True
            self._timers.after(delay_s, self._tidy)

    def _tidy(self) -> None:
        self._is_tidying = False
        for container in list(self._lingering):
            self._timers.attempt(partial(self._kill_lingering, container))
        if self._containment.tidy() or self._lingering:
            self._tidy_in(_TIDY_EVERY_S)

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
            if container in self._lingering:
                self._timers.attempt(partial(self._kill_lingering, container))
                continue
            job = self._by_id.get(container.job_id)
            if job is not None and job.now.container is container and job.now.process is not None:
                self._timers.attempt(job.now.process.look_again, job)

    def end_strangers(self) -> None:
        """What an earlier supervisor's jobs left and nobody has a record of: ended, since no one would ever."""
        for job_id, accepted_ns in self._containment.strangers():
            note("containment.orphan", job_id=job_id)
            self.take(self._containment.adopt(job_id, accepted_ns=accepted_ns), is_gone=False)
