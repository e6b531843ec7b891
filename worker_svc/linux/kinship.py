"""Whether a process that calls one of our unix sockets is a job's: those run under us, and may not act on us."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from typing import Any, Final, NamedTuple

from worker_svc.linux.processes import environ_value, group_path_of, lineage

_UCRED: Final = struct.Struct("3i")
_INT: Final = struct.Struct("i")
# Since Linux 6.5 (asm-generic/socket.h): a pidfd of who connected, whoever has its number by now.
_SO_PEERPIDFD: Final = 77
# Every process of a job is started with it, and its children have it of them.
STATE_VARIABLE: Final = "WORKER_STATE_ID"
_STATE: Final = STATE_VARIABLE.encode()


class Kinship(NamedTuple):
    """What tells the jobs of one worker from all other processes."""

    supervisor_pid: int
    state_id: str
    cgroup: str
    """Which holds the jobs' groups, as in /proc/PID/cgroup; empty: there is none."""

    def is_job(self, connected: socket.socket | Any) -> bool:
        """Whether who connected is a process of a job, or descends from one. True as well if that cannot be told any
        more, since it is gone: the fd may have been given away. Raises OSError if no file can be opened now."""
        pid, _, _ = peer_credentials(connected)
        if pid == 0:
            return False  # of another pid namespace, and so no descendant of ours
        try:
            (pidfd,) = _INT.unpack(connected.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, _INT.size))
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise
            if error.errno != errno.ENOPROTOOPT:
                return True
            pidfd = -1
        try:
            return self._is_of_a_job(pid) or (pidfd >= 0 and _has_exited(pidfd))
        finally:
            if pidfd >= 0:
                os.close(pidfd)

    def _is_of_a_job(self, pid: int) -> bool:
        if self._is_in_a_group(pid):
            return True
        line = lineage(pid)
        if not line:
            return line is None or not _is_there(pid)
        if any(one.pid == self.supervisor_pid for one in line):
            return True
        # The orphans of an earlier supervisor's jobs do not descend from ours.
        return any(
            self._is_in_a_group(one.pid)
            or any(environ_value(number, _STATE) == self.state_id for number in {one.pid, one.session})
            for one in line
        )

    def _is_in_a_group(self, pid: int) -> bool:
        return bool(self.cgroup) and group_path_of(pid).startswith(f"{self.cgroup}/")


def peer_credentials(connected: socket.socket | Any) -> tuple[int, int, int]:
    """The process, user and group of who connected to a unix socket, as they were then (SO_PEERCRED, unix(7))."""
    pid, uid, gid = _UCRED.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid, gid


def _has_exited(pidfd: int) -> bool:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))


def _is_there(pid: int) -> bool:
    """Also if /proc does not show it to us (hidepid): then it is another user's."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
