"""What other threads have to say to the loop: calls that it makes in its own turn, each about a job."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable

from worker_svc.supervisor.life.job import Job
from worker_svc.supervisor.timers import Timers


class Mailbox:
    def __init__(self, timers: Timers) -> None:
        self._timers = timers
        self._letters: deque[tuple[Callable[[], None], Job]] = deque()
        self.bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """Readable when there is something: then call `open`."""

    def post(self, letter: Callable[[], None], job: Job) -> None:
        """From any thread."""
        self._letters.append((letter, job))
        os.eventfd_write(self.bell, 1)

    def open(self) -> None:
        os.eventfd_read(self.bell)
        while self._letters:
            self._timers.attempt(*self._letters.popleft())
