"""Output that comes through pipes: one thread, native where it can be, empties them all into the jobs' files.

Each pipe is open for reading and writing on the job's side, so that it outlives the supervisor: nobody gets SIGPIPE,
and the next supervisor takes it up again from /proc/PID/fd. It is known there by its mode, which only its owner, the
job's user, could give to another. A job is not held up by who else holds its pipe: what was in it when the job ended is
its output, and what comes later is thrown away.
"""

from __future__ import annotations

import errno
import importlib
import os
import stat
import struct
from collections.abc import Callable, Iterable
from typing import Any, Final

from worker_svc.supervisor.journal import note
from worker_svc.supervisor.spawn import NATIVE, PIPE_MODES
from worker_svc.supervisor.timers import is_passing

_NEWS: Final = struct.Struct("@iiq")
_EXCEEDED, _NOT_DROPPED, _FULL, _TRUNCATED, _BROKEN = range(1, 6)
_PAGE_BYTES: Final = 4096


class OutputPump:
    def __init__(
        self, implementation: str, on_exceeded: Callable[[Any], None], on_remark: Callable[[Any, str, bool], None]
    ) -> None:
        """`on_exceeded` hears of a job that wrote more than its cap where that stops it, `on_remark` what is to be said
        of a job's output, and whether some is lost. Raises OSError."""
        self._on_exceeded = on_exceeded
        self._on_remark = on_remark
        self.news_fd, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        """Readable when there is something: then call `take_news`."""
        module = "_native" if implementation == NATIVE else "pump_fallback"
        self._thread = importlib.import_module(f"worker_svc.supervisor.spawn.{module}")
        self._thread.pump_start(writer)
        self._jobs: dict[int, Any] = {}
        self._number = 0

    def add(self, job: Any, in_fd: int, out_fd: int, cap_bytes: int, stops: bool) -> tuple[int, Any]:
        """Takes the fds over. Raises OSError, and has closed them then."""
        self._number = self._number % 0x7FFF_FFFF + 1
        try:
            found = os.fstat(out_fd)
            block_bytes = max(_PAGE_BYTES, found.st_blksize)
            handle = self._thread.pump_add(self._number, in_fd, out_fd, found.st_size, cap_bytes, block_bytes, stops)
        except OSError:
            os.close(in_fd)
            os.close(out_fd)
            raise
        self._jobs[self._number] = job
        return self._number, handle

    def finish(self, pipe: tuple[int, Any]) -> tuple[int, str]:
        """At the end of the job: the size of its output, and what of it is lost. It may wait for the disk, as a commit
        does, for no more than a pipe holds."""
        number, handle = pipe
        del self._jobs[number]
        size, truncated, unwritten = self._thread.pump_finish(handle)
        lost = [f"{truncated} bytes were truncated"] if truncated else []
        return size, "; ".join(lost + ([f"{unwritten} bytes could not be written"] if unwritten else []))

    def take_news(self) -> None:
        for number, kind, value in _NEWS.iter_unpack(os.read(self.news_fd, _NEWS.size * 256)):
            job = self._jobs.get(number)
            if job is not None:  # else it has ended meanwhile
                self._take(job, kind, value)

    def _take(self, job: Any, kind: int, value: int) -> None:
        if kind == _EXCEEDED:
            self._on_exceeded(job)
        elif kind == _TRUNCATED:
            self._on_remark(job, f"{value} bytes were truncated", True)
        elif kind == _FULL:
            self._on_remark(job, f"waits for space on the disk ({os.strerror(value)})", False)
        elif kind == _BROKEN:
            self._on_remark(job, f"could not be written from here on: {os.strerror(value)}", True)
        else:
            self._on_remark(job, f"the cap is not held: {os.strerror(value)}", False)
            if value in (errno.EOPNOTSUPP, errno.ENOSYS):
                self._on_exceeded(job)


def find_pipes(pids: Iterable[int], count: int) -> list[int]:
    """For a new supervisor: reading ends of a job's pipes, looked for in its processes; -1 for what nobody holds."""
    found: dict[int, int] = {}
    for pid in pids:
        try:
            for name in os.listdir(f"/proc/{pid}/fd"):
                _take_pipe(f"/proc/{pid}/fd/{name}", PIPE_MODES[:count], found)
                if len(found) == count:
                    return [found[mode] for mode in PIPE_MODES[:count]]
        except OSError as error:  # it has ended, or we may not look
            if is_passing(error):
                for reader in found.values():
                    os.close(reader)
                raise
            note("output.not_looked_for", pid=pid, reason=str(error))
    return [found.get(mode, -1) for mode in PIPE_MODES[:count]]


def _take_pipe(link: str, modes: tuple[int, ...], found: dict[int, int]) -> None:
    if not os.readlink(link).startswith("pipe:"):  # looked at before it is touched: it may be anything
        return
    held = os.open(link, os.O_PATH | os.O_CLOEXEC)
    try:
        mode = os.fstat(held).st_mode
        if stat.S_ISFIFO(mode) and stat.S_IMODE(mode) in modes and stat.S_IMODE(mode) not in found:
            found[stat.S_IMODE(mode)] = os.open(f"/proc/self/fd/{held}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(held)


def why_no_pipes(folder: str) -> str:
    """Why output cannot come through pipes into files there; empty: it can."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    path = f"{folder}/.probe-splice"
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.unlink(path)
            os.write(writer, b"x")
            os.splice(reader, file, 1)
        finally:
            os.close(file)
    except OSError as error:
        return "" if error.errno in (errno.ENOSPC, errno.EDQUOT) else f"{folder}: {error.strerror}"
    finally:
        os.close(reader)
        os.close(writer)
    return ""
