"""What the loop does with events that come too late, and with calls that fail."""

from __future__ import annotations

import errno
from unittest.mock import Mock

import pytest

from worker_svc.supervisor.livejob import LiveJob
from worker_svc.supervisor.loop import Supervisor
from worker_svc.supervisor.timers import Timers, is_passing


def test_an_event_of_what_was_closed_in_the_same_turn_is_nobodys() -> None:
    supervisor = Supervisor.__new__(Supervisor)
    supervisor._jobs = Mock()
    supervisor._jobs.with_pidfd.return_value = None
    supervisor._handlers, supervisor._connections = {}, {}
    supervisor._on_ready(99, 1)
    supervisor._jobs.endings.on_exit.assert_not_called()


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
    job = LiveJob("j", "", 0)
    supervisor = Supervisor.__new__(Supervisor)
    supervisor._jobs, supervisor._noted_trouble = Mock(), ("", "")
    timers, call = Timers(supervisor._on_trouble), Mock(side_effect=[error, None])
    assert is_passing(error) is passes
    timers.attempt(call, job)
    call.assert_called_once()
    if passes:
        assert timers.next_ns is not None, "it is to be made again"
        supervisor._jobs.reserve.spend.assert_called_once_with()
        supervisor._jobs.give_up.assert_not_called()
    else:
        assert timers.next_ns is None
        supervisor._jobs.give_up.assert_called_once_with(job, error)
