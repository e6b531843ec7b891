"""What a new supervisor finds of the jobs that an earlier one started: the decision, and the facts it rests on."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import Final

from worker_svc.job import Exit, JobState
from worker_svc.supervisor.spawn import start_ticks_of
from worker_svc.supervisor.store import LiveRow

# include/uapi/linux/pidfd.h: struct pidfd_info as of Linux 6.15 is two u64, eleven u32 and the wait status.
_PIDFD_INFO: Final = struct.Struct("=QQ11Ii")
_PIDFD_GET_INFO: Final = 3 << 30 | _PIDFD_INFO.size << 16 | 0xFF << 8 | 11
_PIDFD_INFO_EXIT: Final = 1 << 3


def lost_reason(row: LiveRow, boot_id: str, owns_processes: bool) -> str:
    """Why the job is lost whatever /proc says; empty: look for its process, or let it wait on."""
    if row.state is JobState.QUEUED:
        return ""
    if row.state is JobState.STARTING:
        return "the supervisor died while it started the job, which may or may not have run"
    if not owns_processes:
        return "the state directory was copied or moved from elsewhere; the job belongs to the original"
    if row.boot_id != boot_id:
        return "machine rebooted"
    return ""


def open_pidfd(pid: int, start_ticks: int) -> int | None:
    """A pidfd of the process with this identity, or None if it is gone or its number is another's now.

    Raises OSError when there are no fds left.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        if error.errno in (errno.ESRCH, errno.EINVAL):
            return None
        raise
    # After opening: now the number cannot change hands unnoticed.
    if start_ticks_of(pid) != start_ticks:
        os.close(pidfd)
        return None
    return pidfd


def exit_of(pidfd: int) -> Exit | None:
    """The exit status of a process that is not our child, once its parent has reaped it. None: not known.

    PIDFD_GET_INFO with PIDFD_INFO_EXIT, Linux 6.15 (ioctl_pidfd(2)).
    """
    request = bytearray(_PIDFD_INFO.pack(_PIDFD_INFO_EXIT, *[0] * 12, 0))
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, request)
    except OSError as error:
        if error.errno in (errno.ESRCH, errno.ENOTTY, errno.EINVAL):
            return None
        raise
    fields = _PIDFD_INFO.unpack(request)
    return Exit.from_wait_status(fields[-1]) if fields[0] & _PIDFD_INFO_EXIT else None


def boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()
