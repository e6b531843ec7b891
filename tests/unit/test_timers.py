"""Calls that are to be made later, and calls that fail."""

from __future__ import annotations

import errno
import weakref
from unittest.mock import Mock

import pytest

from tests.support.stages import in_state
from worker_svc.job import Event, JobState
from worker_svc.supervisor.life.job import FINISHED, Job
from worker_svc.supervisor.life.moves import Moves
from worker_svc.supervisor.timers import Timers, is_passing


@pytest.mark.parametrize(
    "error, passes",
    [
        (OSError(errno.EMFILE, ""), True),
        (OSError(errno.ENFILE, ""), True),
        (OSError(errno.ENOMEM, ""), True),
        (MemoryError(), True),
        (RuntimeError("can't start new thread"), True),
        (OSError(errno.EIO, ""), False),
        (ChildProcessError(errno.ECHILD, ""), False),
        (RuntimeError("a fault of ours"), False),
    ],
)
def test_what_may_pass(error: Exception, passes: bool) -> None:
    assert is_passing(error) is passes


@pytest.mark.parametrize("passes", [True, False])
def test_a_call_that_failed_is_made_again_if_its_trouble_may_pass(passes: bool) -> None:
    job, error = Job("j", "", 0), OSError(errno.EMFILE, "")
    heard: list[tuple[Exception, Job | None]] = []

    def hear(error: Exception, job: Job | None) -> bool:
        heard.append((error, job))
        return passes

    def call() -> None:
        raise error

    timers = Timers(hear)
    timers.attempt(call, job)
    assert heard == [(error, job)]
    assert (timers.next_ns is not None) is passes


def test_timers_of_finished_jobs_do_not_pile_up() -> None:
    """A day's worth of jobs with a timeout of a day must not be kept for a day (budget: 0 for finished jobs)."""

    class Fire:
        def __call__(self) -> None:
            raise AssertionError("it is not due")

    timers, kept = Timers(lambda error, job: False), weakref.WeakSet[Fire]()
    moves = Moves(Mock())
    for number in range(10_000):
        job, fire = Job(str(number), "", 0), Fire()
        kept.add(fire)
        moves.put_back(job, in_state(JobState.RUNNING))
        timers.after(86400.0, fire, job)
        moves.move(job, Event.EXIT, FINISHED)
    assert len(kept) < 1000
