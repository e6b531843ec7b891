"""What is to happen to jobs later: a heap of moments on the monotonic clock. Nothing is ever cancelled: whoever is
called looks whether there is still something to do."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from worker_svc.job import DURATION_MAX_S
from worker_svc.supervisor.livejob import LiveJob

NS_PER_S: Final = 1_000_000_000


class _Timer(NamedTuple):
    due_ns: int
    order: int
    job: LiveJob
    fire: Callable[[LiveJob], None]


class Timers:
    def __init__(self) -> None:
        self._heap: list[_Timer] = []
        self._order = 0

    def after(self, delay_s: float, job: LiveJob, fire: Callable[[LiveJob], None]) -> None:
        self._order += 1
        due_ns = time.monotonic_ns() + int(min(delay_s, DURATION_MAX_S) * NS_PER_S)
        heapq.heappush(self._heap, _Timer(due_ns, self._order, job, fire))

    @property
    def next_ns(self) -> int | None:
        return self._heap[0].due_ns if self._heap else None

    def fire_due(self) -> None:
        now_ns = time.monotonic_ns()
        while self._heap and self._heap[0].due_ns <= now_ns:
            timer = heapq.heappop(self._heap)
            timer.fire(timer.job)
