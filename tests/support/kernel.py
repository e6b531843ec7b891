"""What this kernel offers."""

from __future__ import annotations

import os

from worker_svc.job import Exit
from worker_svc.supervisor.life import adoption


def tells_exit_of_strangers() -> bool:
    """PIDFD_GET_INFO with PIDFD_INFO_EXIT: the exit status of a process that somebody else has reaped."""
    pid = os.fork()
    if pid == 0:
        os._exit(7)
    pidfd = os.pidfd_open(pid)
    os.waitpid(pid, 0)
    try:
        return adoption.exit_of(pidfd, 0, 0) == Exit(7, None)
    finally:
        os.close(pidfd)


def landlock_abi() -> int:
    """0: there is no Landlock."""
    import ctypes

    return max(0, int(ctypes.CDLL(None).syscall(444, None, 0, 1)))
