"""What a new supervisor finds of the jobs that an earlier one started: the decision, and the facts it rests on."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import Final

from worker_svc.job import Exit, JobState
from worker_svc.record.schema import LiveRow
from worker_svc.supervisor.spawn import start_ticks_of

# include/uapi/linux/pidfd.h: struct pidfd_info as of Linux 6.15 is two u64, eleven u32 and the wait status.
_PIDFD_INFO: Final = struct.Struct("=QQ11Ii")
_PIDFD_GET_INFO: Final = 3 << 30 | _PIDFD_INFO.size << 16 | 0xFF << 8 | 11
_PIDFD_INFO_EXIT: Final = 1 << 3
# include/linux/sched.h, in the flags of proc_pid_stat(5): forked and not yet executed.
_PF_FORKNOEXEC: Final = 0x40
# Before, it was the status of the first thread, which can end before the others (do_task_stat in fs/proc/array.c).
_STAT_TELLS_STATUS: Final = tuple(map(int, os.uname().release.split("-")[0].split(".")[:2])) >= (5, 17)


def lost_reason(row: LiveRow, boot_id: str, owns_processes: bool) -> str:
    """Why the job is lost whatever /proc says; empty: look for its process, or let it wait on."""
    if not owns_processes:
        return "the state directory was copied or moved here; the job belongs to the original"
    if row.state is not JobState.QUEUED and row.boot_id not in ("", boot_id):
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


def may_run(pid: int, argv: list[str]) -> bool:
    """Whether a process can be the one that was started as `argv`: it has executed a program, with these arguments.

    One that a job left behind in a session of its own was forked from that one, and as a rule executed another.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            flags = int(file.read().rpartition(b")")[2].split()[6])
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            found = file.read().removesuffix(b"\0").split(b"\0")
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise
        return False
    if flags & _PF_FORKNOEXEC:
        return False
    wanted = [os.fsencode(text) for text in argv]
    # For a script the kernel puts the interpreter, and perhaps an argument for it, in front (execve(2)).
    with_interpreter = len(found) > len(wanted) and os.path.basename(found[-len(wanted)]) == os.path.basename(wanted[0])
    return found == wanted or (with_interpreter and found[len(found) - len(wanted) + 1 :] == wanted[1:])


def exit_of(pidfd: int, pid: int, start_ticks: int) -> Exit | None:
    """The exit status of a process that is not our child. None: it has not exited, or its status is not known (yet)."""
    return _status_of_zombie(pid, start_ticks) or _status_of_reaped(pidfd)


def _status_of_zombie(pid: int, start_ticks: int) -> Exit | None:
    """Before its parent has reaped it: field 52 of proc_pid_stat(5).

    The field is 0 for those who may not trace the process, which must not be taken for success. The same permission
    opens its `io` (do_io_accounting in fs/proc/base.c).
    """
    if not _STAT_TELLS_STATUS:
        return None
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        if fields[0] != b"Z" or int(fields[17]) > 1 or int(fields[19]) != start_ticks:
            return None
        with open(f"/proc/{pid}/io", "rb") as file:
            file.read()
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise
        return None
    return Exit.from_wait_status(int(fields[49]))


def _status_of_reaped(pidfd: int) -> Exit | None:
    """Once its parent has reaped it: PIDFD_GET_INFO with PIDFD_INFO_EXIT, Linux 6.15 (ioctl_pidfd(2))."""
    request = bytearray(_PIDFD_INFO.pack(_PIDFD_INFO_EXIT, *[0] * 12, 0))
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, request)
    except OSError as error:
        if error.errno in (errno.ESRCH, errno.ENOTTY, errno.EINVAL):
            return None
        raise
    fields = _PIDFD_INFO.unpack(request)
    return Exit.from_wait_status(fields[-1]) if fields[0] & _PIDFD_INFO_EXIT else None
