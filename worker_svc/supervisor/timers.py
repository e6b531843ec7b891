"""What is to happen later: a heap of moments on the monotonic clock. Nothing is ever cancelled: whoever is called looks
whether there is still something to do. What is about a finished job is swept away in time: a job of a second may have a
timeout of a day."""

from __future__ import annotations

import errno
import heapq
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from worker_svc.job import DURATION_MAX_S, JobState
from worker_svc.linux.clocks import NS_PER_S
from worker_svc.supervisor.life.job import Job

_SWEEP_FROM: Final = 256
_RETRY_S: Final = 0.25


class _Timer(NamedTuple):
    due_ns: int
    order: int
    fire: Callable[[], None]
    job: Job | None


class Timers:
    def __init__(self, on_trouble: Callable[[Exception, Job | None], bool]) -> None:
        """`on_trouble` hears what a call raised, and which job it is about; true: make it again later."""
        self._on_trouble = on_trouble
        self._heap: list[_Timer] = []
        self._order = 0
        self._sweep_at = _SWEEP_FROM

    def after(self, delay_s: float, fire: Callable[[], None], job: Job | None = None) -> None:
        """`job`: once it is finished, there is no need to call."""
        if len(self._heap) >= self._sweep_at:
            self._sweep()
        self._order += 1
        due_ns = time.monotonic_ns() + int(min(delay_s, DURATION_MAX_S) * NS_PER_S)
        heapq.heappush(self._heap, _Timer(due_ns, self._order, fire, job))

    def _sweep(self) -> None:
        self._heap = [timer for timer in self._heap if timer.job is None or timer.job.state is not JobState.FINISHED]
        heapq.heapify(self._heap)
        self._sweep_at = max(_SWEEP_FROM, 2 * len(self._heap))

    @property
    def next_ns(self) -> int | None:
        return self._heap[0].due_ns if self._heap else None

    def fire_due(self) -> None:
        now_ns = time.monotonic_ns()
        while self._heap and self._heap[0].due_ns <= now_ns:
            timer = heapq.heappop(self._heap)
            self.attempt(timer.fire, timer.job)

    def attempt(self, call: Callable[[], None], job: Job | None = None) -> None:
        """Makes a call, and makes it again later if the machine was out of something. It raises nothing: whatever goes
        wrong for one job must not keep the loop from the others."""
        try:
            call()
        except Exception as error:
            if self._on_trouble(error, job):
                self.after(_RETRY_S, call, job)


def is_passing(error: BaseException) -> bool:
    """Whether it says that the machine is out of files, memory or threads: which may pass, and is no fault of ours."""
    if isinstance(error, OSError):
        return error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)
    return isinstance(error, MemoryError) or "start new thread" in str(error)
