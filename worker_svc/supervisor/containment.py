"""What belongs to a job and how it is reached: at this level, its process group."""

from __future__ import annotations

import errno
import os
import signal
from typing import Final

from worker_svc.job import Exit

LEVEL: Final = "process-group"

# pidfd_send_signal(2), Linux 6.9: the signal goes to the group that the process leads.
_PIDFD_SIGNAL_PROCESS_GROUP: Final = 1 << 2


def signal_job(pidfd: int, pid: int, number: int, *, is_child: bool) -> None:
    """Signals the group that the process leads, never anybody else's: a pidfd cannot come to mean another process.

    A kernel before 6.9 cannot signal a group by pidfd. There the number of our own child, which is ours until it is
    reaped, does as well; of a process that is not our child only the leader itself can be reached safely.
    """
    try:
        signal.pidfd_send_signal(pidfd, number, None, _PIDFD_SIGNAL_PROCESS_GROUP)
    except ProcessLookupError:
        return  # nobody is left in it
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        try:
            if is_child:
                os.killpg(pid, number)
            else:
                signal.pidfd_send_signal(pidfd, number)
        except ProcessLookupError:
            return


def reap(pidfd: int, pid: int) -> Exit | None:
    """Ends what our exited child left behind in its group, then takes its exit status. None: it has not exited.

    In this order: a group lives on under its leader's number as long as the leader is not reaped.
    """
    if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        return None
    signal_job(pidfd, pid, signal.SIGKILL, is_child=True)
    _, status, usage = os.wait4(pid, 0)
    return Exit.from_wait_status(
        status,
        cpu_ns=int((usage.ru_utime + usage.ru_stime) * 1e9),
        peak_memory_bytes=usage.ru_maxrss * 1024,  # getrusage(2): in kilobytes
    )
