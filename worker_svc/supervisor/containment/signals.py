"""Signals to a job's process group, and the exit of its leader."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from typing import Final

from worker_svc.job import Exit

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
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # or it is reaped: ECHILD
                os.killpg(pid, number)
            else:
                signal.pidfd_send_signal(pidfd, number)
        except (ProcessLookupError, ChildProcessError):
            return


def group_exists(pidfd: int) -> bool:
    """Whether somebody, if only a zombie, is in the group that the process led; then its number is no one else's.

    False too where it cannot be told: on a kernel before 6.9.
    """
    try:
        signal.pidfd_send_signal(pidfd, 0, None, _PIDFD_SIGNAL_PROCESS_GROUP)
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def signal_verified(pid: int, number: int, is_it: Callable[[int], bool], *, group: bool = False) -> bool:
    """Signals the process with this number if `is_it` still says so once a pidfd holds it. False: it is gone.

    group: the whole group that it leads, where the kernel can. Raises PermissionError.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        if error.errno in (errno.ESRCH, errno.EINVAL):  # EINVAL: a thread's number by now
            return False
        raise
    try:
        if not is_it(pid):
            return False
        if group:
            signal_job(pidfd, pid, number, is_child=False)
        else:
            signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(pidfd)
    return True


def take_exit(pid: int) -> Exit | None:
    """Reaps our exited child. None: it has not exited."""
    reaped, status, usage = os.wait4(pid, os.WNOHANG)
    if not reaped:
        return None
    return Exit.from_wait_status(
        status,
        cpu_ns=int((usage.ru_utime + usage.ru_stime) * 1e9),
        peak_memory_bytes=_peak_memory_bytes(usage.ru_maxrss),
    )


def has_exited(pid: int) -> bool:
    """Whether our child has exited, and waits to be reaped unless somebody has done it."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _peak_memory_bytes(max_rss_kib: int) -> int | None:
    """None if it is not known: a process that was spawned with vfork starts out with its parent's peak (exec_mmap in
    fs/exec.c), so that only what exceeds ours is the job's own.

    Not our ru_maxrss, which starts out in the same way with the peak of the worker that spawned us.
    """
    global _own_peak_kib
    if max_rss_kib <= _own_peak_kib:
        return None
    _own_peak_kib = _vm_hwm_kib()
    return max_rss_kib * 1024 if max_rss_kib > _own_peak_kib else None


_own_peak_kib = 0
"""As last read; it only grows."""


def _vm_hwm_kib() -> int:
    try:
        file = open("/proc/self/status", "rb")  # noqa: SIM115 - closed below; only opening it may fail
    except OSError:  # no fd is free; the status that was just taken must not be lost for that
        return _own_peak_kib
    with file:
        return int(file.read().partition(b"VmHWM:")[2].split(maxsplit=1)[0])
