"""Records of jobs' states with nothing in them but the state."""

from __future__ import annotations

from worker_svc.job import JobState
from worker_svc.supervisor.life.job import Stage


class _Bare(Stage):
    __slots__ = ("state",)

    def __init__(self, state: JobState) -> None:
        self.state = state


def in_state(state: JobState) -> Stage:
    return _Bare(state)
