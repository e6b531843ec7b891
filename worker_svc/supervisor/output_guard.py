"""Holds each output file to its cap, in a thread of its own: neither a commit nor a slow disk may delay it.

A job that writes at full speed fills 16 MiB in a few milliseconds. So a file is looked at again after the time in which
it could at worst have filled half of what is left; only when it has rested that long is it watched (inotify), and
a file that nobody writes to costs nothing.
"""

from __future__ import annotations

import errno
import heapq
import os
import select
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from worker_svc.job import OutputPolicy
from worker_svc.supervisor import syscalls
from worker_svc.supervisor.journal import note

# How far past its cap a file may go before its head is given back; that is then done in one piece.
SLACK_BYTES: Final = 4 * 1024 * 1024
# What no job writes faster than: about what a memory copy does.
_WRITE_MAX_BYTES_PER_S: Final = 4_000_000_000
_REST_MIN_S: Final = 0.001
_REST_MAX_S: Final = 0.25
_A_LONG_REST: Final = int(2 * _REST_MAX_S * _WRITE_MAX_BYTES_PER_S)
_PAGE_BYTES: Final = 4096
_EVENT: Final = struct.Struct("iIII")


class _File:
    __slots__ = (
        "block_bytes",
        "cap_bytes",
        "gone",
        "identity",
        "is_noted",
        "is_told",
        "job",
        "path",
        "place",
        "policy",
        "punched",
        "size",
        "watch",
    )

    def __init__(self, job: Any, path: str, cap_bytes: int, policy: OutputPolicy) -> None:
        self.job = job
        self.path = path
        self.place = path
        """Where it is found now: an operator may have moved or removed it while the job has it open."""
        self.identity: tuple[int, int] | None = None
        self.cap_bytes = cap_bytes
        self.policy = policy
        self.block_bytes = _PAGE_BYTES
        self.punched = 0
        self.size = 0
        self.watch = -1
        self.gone = False
        self.is_told = False
        self.is_noted = False

    def note(self, event: str, error: OSError) -> None:
        """Once a file: it is looked at a thousand times a second."""
        if not self.is_noted:
            self.is_noted = True
            note(event, path=self.path, reason=str(error))


class OutputGuard:
    def __init__(self, on_exceeded: Callable[[Any], None]) -> None:
        """`on_exceeded` is called in the guard's thread with the job whose policy is to be stopped; once more if it
        writes on and its file system cannot give anything back."""
        self._on_exceeded = on_exceeded
        self._orders: deque[Callable[[], None]] = deque()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._inotify = -1
        self._files: dict[str, _File] = {}
        self._watched: dict[int, _File] = {}
        self._due: list[tuple[float, int, _File]] = []
        self._order = 0
        self._thread: threading.Thread | None = None

    def guard(self, job: Any, path: str, cap_bytes: int, policy: OutputPolicy) -> None:
        """From now on until `release`. Raises OSError if the machine has no inotify instance left."""
        if self._thread is None:
            self._inotify = syscalls.inotify_init()
            self._thread = threading.Thread(target=self._work, name="output-guard", daemon=True)
            self._thread.start()
        file = _File(job, path, cap_bytes, policy)
        self._tell(lambda: self._take(file))

    def release(self, path: str) -> None:
        if self._thread is not None:
            self._tell(lambda: self._let_go(path))

    def _tell(self, order: Callable[[], None]) -> None:
        self._orders.append(order)
        os.eventfd_write(self._bell, 1)

    # In the thread

    def _work(self) -> None:
        _hurry()
        poll = select.poll()
        poll.register(self._bell, select.POLLIN)
        poll.register(self._inotify, select.POLLIN)
        while True:
            rest_s = max(0.0, self._due[0][0] - time.monotonic()) if self._due else None
            for fd, _ in poll.poll(None if rest_s is None else rest_s * 1000):
                if fd == self._bell:
                    os.eventfd_read(self._bell)
                else:
                    self._take_events()
            while self._orders:
                self._orders.popleft()()
            now_s = time.monotonic()
            while self._due and self._due[0][0] <= now_s:
                _, _, file = heapq.heappop(self._due)
                self._watch(file)

    def _take(self, file: _File) -> None:
        self._files[file.path] = file
        self._watch(file)

    def _let_go(self, path: str) -> None:
        file = self._files.pop(path, None)
        if file is None:
            return
        file.gone = True
        if self._watched.pop(file.watch, None):
            try:
                syscalls.inotify_rm_watch(self._inotify, file.watch)
            except OSError as error:  # the watch went with the file, or as its event was on the way
                note("output.unwatched", path=path, reason=str(error))
        self._look(file)  # what it wrote last

    def _take_events(self) -> None:
        received = os.read(self._inotify, 64 * 1024)
        at = 0
        while at < len(received):
            watch, mask, _, length = _EVENT.unpack_from(received, at)
            at += _EVENT.size + length
            if mask & syscalls.IN_Q_OVERFLOW:
                for file in list(self._watched.values()):
                    self._watch(file)
            elif mask & syscalls.IN_MODIFY:
                file_or_none = self._watched.pop(watch, None)
                if file_or_none is not None:
                    file_or_none.watch = -1
                    self._rest(file_or_none)

    def _rest(self, file: _File) -> None:
        """Looks at the file, and at it again as soon as it could be too large."""
        if file.gone:
            return
        left = self._look(file)
        delay_s = min(_REST_MAX_S, max(_REST_MIN_S, left / 2 / _WRITE_MAX_BYTES_PER_S))
        self._order += 1
        heapq.heappush(self._due, (time.monotonic() + delay_s, self._order, file))

    def _watch(self, file: _File) -> None:
        """After a rest: waits for the next write, unless there was one meanwhile."""
        if file.gone:
            return
        try:
            watch = syscalls.inotify_add_watch(
                self._inotify, os.fsencode(file.place), syscalls.IN_MODIFY | syscalls.IN_ONESHOT
            )
        except FileNotFoundError:
            if self._stat(file) is not None:  # found again where the job has it open
                self._watch(file)
            return
        except OSError as error:
            file.note("output.unwatched", error)
            self._rest(file)
            return
        file.watch = watch
        self._watched[watch] = file
        found = self._stat(file)
        if found is not None and found.st_size != file.size:
            del self._watched[watch]
            file.watch = -1
            self._rest(file)

    def _stat(self, file: _File) -> os.stat_result | None:
        """None: removed by an operator, and the job's first process does not have it open: it cannot be held."""
        for place in (file.place, f"/proc/{file.job.pid}/fd/{2 if file.path.endswith('.err') else 1}"):
            try:
                found = os.stat(place)
            except OSError:
                continue
            identity = (found.st_dev, found.st_ino)
            if file.identity in (None, identity):
                file.identity, file.place = identity, place
                return found
        return None

    def _look(self, file: _File) -> int:
        """Enforces the cap; returns how many bytes may be written before it must be enforced again."""
        found = self._stat(file)
        if found is None:
            return _A_LONG_REST
        if found.st_size < file.size:  # truncated by an operator: what is written from now on is no hole
            file.punched = 0
        file.size = found.st_size
        file.block_bytes = max(_PAGE_BYTES, found.st_blksize)
        kept = min(found.st_size - file.punched, found.st_blocks * 512)
        if kept <= file.cap_bytes:
            return file.cap_bytes + SLACK_BYTES - kept
        if file.policy is OutputPolicy.STOP and not file.is_told:
            file.is_told = True
            self._on_exceeded(file.job)
        # Under STOP too: until it has stopped it can fill the disk, or take its time and write.
        if kept > file.cap_bytes + SLACK_BYTES or (file.gone and file.policy is OutputPolicy.DROP_HEAD):
            return self._drop_head(file)
        return file.cap_bytes + SLACK_BYTES - kept

    def _drop_head(self, file: _File) -> int:
        """As `_look`."""
        # Whole blocks, and whole pages: readers rely on it (worker_svc/output).
        until = (file.size - file.cap_bytes) // file.block_bytes * file.block_bytes
        if until <= file.punched:
            return SLACK_BYTES
        try:
            fd = os.open(file.place, os.O_WRONLY | os.O_CLOEXEC | (os.O_NOFOLLOW if file.place == file.path else 0))
            try:
                opened = os.fstat(fd)
                if (opened.st_dev, opened.st_ino) != file.identity:  # replaced just now: the next look will find it
                    return SLACK_BYTES
                syscalls.punch_hole(fd, file.punched, until - file.punched)
            finally:
                os.close(fd)
        except FileNotFoundError:
            return SLACK_BYTES
        except OSError as error:
            file.note("output.not_dropped", error)
            if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
                file.gone = True
                self._on_exceeded(file.job)
            return _A_LONG_REST
        file.punched = until
        return SLACK_BYTES


def _hurry() -> None:
    """Lets this thread run when it is due, also beside jobs that take all CPUs: in 40 ms a job writes 50 MiB.

    It takes a small part of the time that the jobs it holds need to write. Who may not do this (it takes CAP_SYS_NICE,
    or RLIMIT_RTPRIO) does without, and caps hold as well as the scheduler lets them; to be nicer is no help, that
    counts only within a session (sched(7), autogroup).
    """
    try:
        # Of the calling thread only.
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except OSError as error:
        note("output.guard_without_priority", reason=str(error))


def can_drop_head(folder: str) -> bool:
    """Whether files there can give back their head, and a reader can tell (SEEK_DATA, lseek(2))."""
    path = f"{folder}/.probe"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.unlink(path)
            syscalls.punch_hole(fd, 0, _PAGE_BYTES)
            os.write(fd, b"x" * _PAGE_BYTES * 2)
            syscalls.punch_hole(fd, 0, _PAGE_BYTES)
            return os.lseek(fd, 0, os.SEEK_DATA) == _PAGE_BYTES
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            # That says nothing of what it can do, and to take it for less would stop jobs.
            note("output.not_probed", folder=folder, reason=str(error))
            return True
        note("output.cannot_drop_head", folder=folder, reason=str(error))
        return False
