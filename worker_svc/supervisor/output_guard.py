"""Holds output files that jobs write by themselves to their caps, and sees when they are truncated.

In a thread of its own: neither a commit nor a slow disk may delay it.

A job that writes at full speed fills 16 MiB in a few milliseconds. So a file is looked at again after the time in which
it could at worst have filled half of what is left; only when it has rested that long is it watched (inotify), and
a file that nobody writes to costs next to nothing: a look a second, for what is written by mmap(2) tells nobody.
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
from worker_svc.linux import syscalls
from worker_svc.linux.threads import start_thread
from worker_svc.supervisor.journal import note

# How far past its cap a file may go before its head is given back; that is then done in one piece.
SLACK_BYTES: Final = 4 * 1024 * 1024
# What no job writes faster than: about what a memory copy does.
_WRITE_MAX_BYTES_PER_S: Final = 4_000_000_000
_REST_MIN_S: Final = 0.001
_REST_MAX_S: Final = 0.25
_LOOK_EVERY_S: Final = 1.0
# Without inotify all files are looked at all the time: this much of a CPU's time, at most, goes into that.
_POLL_S_PER_FILE: Final = 0.0005
_A_LONG_REST: Final = int(2 * _REST_MAX_S * _WRITE_MAX_BYTES_PER_S)
_PAGE_BYTES: Final = 4096
_PIECE_BYTES: Final = 1024 * 1024
_FAR_AWAY: Final = 1 << 40
_EVENT: Final = struct.Struct("iIII")


class _File:
    __slots__ = (
        "block_bytes",
        "blocks",
        "cap_bytes",
        "gone",
        "identity",
        "is_noted",
        "is_told",
        "job",
        "lock",
        "next_look",
        "path",
        "place",
        "policy",
        "punched",
        "size",
        "truncated_bytes",
        "watch",
    )

    def __init__(self, job: Any, path: str, cap_bytes: int, policy: OutputPolicy) -> None:
        self.job = job
        self.lock = threading.Lock()
        """Held for a look, and to let go: the end of a job must not fall between the two halves of a change."""
        self.path = path
        self.place = path
        """Where it is found now: an operator may have moved or removed it while the job has it open."""
        self.identity: tuple[int, int] | None = None
        self.cap_bytes = cap_bytes
        """Zero: none."""
        self.policy = policy
        self.block_bytes = _PAGE_BYTES
        self.punched = 0
        self.size = 0
        self.blocks = 0
        self.truncated_bytes = 0
        """How many bytes were lost by that."""
        self.watch = -1
        self.next_look = 0
        """Which of the looks that are due is the one: earlier ones are outdated."""
        self.gone = False
        self.is_told = False
        self.is_noted = False

    def note(self, event: str, error: OSError) -> None:
        """Once a file: it is looked at a thousand times a second."""
        if not self.is_noted:
            self.is_noted = True
            note(event, path=self.path, reason=str(error))


class OutputGuard:
    def __init__(
        self,
        on_exceeded: Callable[[Any], None],
        on_remark: Callable[[Any, str, bool], None],
        can_drop_head: bool,
    ) -> None:
        """All are called in the guard's thread. `on_exceeded`: the job whose policy is to be stopped; once more if it
        writes on and its file system cannot give anything back. `on_remark`: what is to be said of a job's output, and
        whether some is lost."""
        self._on_exceeded = on_exceeded
        self._on_remark = on_remark
        self._can_drop_head = can_drop_head
        self._orders: deque[Callable[[], None]] = deque()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._files: dict[str, _File] = {}
        self._watched: dict[int, _File] = {}
        self._due: list[tuple[float, int, _File]] = []
        self._order = 0
        self.degraded = ""
        """Why files are looked at by the clock; empty: they are watched."""
        self._inotify = -1
        try:
            self._inotify = syscalls.inotify_init()
        except OSError as error:
            self.degraded = (
                f"inotify: {error.strerror} (fs.inotify.max_user_instances): output that goes to its file by itself is "
                "looked at by the clock"
            )
            note("output.degraded", reason=self.degraded)
        start_thread(self._work, "output-guard")

    def guard(self, job: Any, path: str, cap_bytes: int, policy: OutputPolicy) -> None:
        """From now on until `release`."""
        file = _File(job, path, cap_bytes, policy)
        self._files[path] = file
        self._tell(lambda: self._watch(file))

    def release(self, path: str) -> int:
        """Returns the size that it was last seen to have; zero if it is not guarded."""
        file = self._files.get(path)
        if file is None:
            return 0
        with file.lock:
            file.gone = True
        self._tell(lambda: self._let_go(path))
        return file.size

    def _tell(self, order: Callable[[], None]) -> None:
        self._orders.append(order)
        os.eventfd_write(self._bell, 1)

    # In the thread

    def _work(self) -> None:
        _hurry()
        poll = select.poll()
        poll.register(self._bell, select.POLLIN)
        if self._inotify >= 0:
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
                _, order, file = heapq.heappop(self._due)
                if order == file.next_look:
                    self._watch(file)

    def _let_go(self, path: str) -> None:
        file = self._files.pop(path, None)
        if file is None:
            return
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
        rest_s = min(_REST_MAX_S, max(_REST_MIN_S, left / 2 / _WRITE_MAX_BYTES_PER_S))
        self._look_in(rest_s if self._inotify >= 0 else max(rest_s, len(self._files) * _POLL_S_PER_FILE), file)

    def _look_in(self, delay_s: float, file: _File) -> None:
        self._order += 1
        file.next_look = self._order
        heapq.heappush(self._due, (time.monotonic() + delay_s, self._order, file))

    def _watch(self, file: _File) -> None:
        """After a rest: waits for the next write, unless there was one meanwhile."""
        if file.gone:
            return
        if self._inotify < 0:
            self._rest(file)
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
        if found is not None and (found.st_size, found.st_blocks) != (file.size, file.blocks):
            del self._watched[watch]
            file.watch = -1
            self._rest(file)
        else:
            self._look_in(_LOOK_EVERY_S, file)

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
        with file.lock:
            return self._enforce(file)

    def _enforce(self, file: _File) -> int:
        found = self._stat(file)
        if found is None:
            return _A_LONG_REST
        file.block_bytes = max(_PAGE_BYTES, found.st_blksize)
        if found.st_size < file.size and not file.gone:
            self._go_on_behind(file, found.st_size)
            found = self._stat(file) or found
        elif file.truncated_bytes:
            self._with_file(file, self._lift)  # what has it open since then may write where it was
        file.size, file.blocks = found.st_size, found.st_blocks
        if not file.cap_bytes:
            return _A_LONG_REST
        kept = found.st_size - file.punched
        if kept > file.cap_bytes and file.policy is OutputPolicy.STOP and not file.is_told:
            file.is_told = True
            self._on_exceeded(file.job)
        # Under STOP too: until it has stopped it can fill the disk, or take its time and write.
        is_last = file.gone and file.policy is OutputPolicy.DROP_HEAD and kept > file.cap_bytes
        if kept > file.cap_bytes + SLACK_BYTES or is_last:
            self._with_file(file, self._drop_head)
            found = self._stat(file) or found
            kept = file.size - file.punched
        # XFS allocates up to twice what there is ahead of who writes, and takes it back at the end.
        slack_bytes = SLACK_BYTES + (0 if file.gone else 2 * max(kept, file.cap_bytes))
        if found.st_blocks * 512 > kept + slack_bytes:
            self._with_file(file, self._cut if file.gone else self._trim)
        return max(SLACK_BYTES, file.cap_bytes + SLACK_BYTES - kept)

    def _with_file(self, file: _File, act: Callable[[int, _File], None]) -> None:
        """Opens it for `act`, if it is still the one."""
        try:
            flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | (os.O_NOFOLLOW if file.place == file.path else 0)
            fd = os.open(file.place, flags)
        except FileNotFoundError:
            return
        except OSError as error:
            file.note("output.not_dropped", error)
            return
        try:
            opened = os.fstat(fd)
            if (opened.st_dev, opened.st_ino) == file.identity:  # else replaced just now: the next look will find it
                act(fd, file)
        except OSError as error:
            file.note("output.not_dropped", error)
            if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
                file.gone = True
                self._on_exceeded(file.job)
        finally:
            os.close(fd)

    def _drop_head(self, fd: int, file: _File) -> None:
        # Whole blocks, and whole pages: readers rely on it (worker_svc/output).
        until = (file.size - file.cap_bytes) // file.block_bytes * file.block_bytes
        if until > file.punched:
            syscalls.punch_hole(fd, file.punched, until - file.punched)
            file.punched = until

    def _trim(self, fd: int, file: _File) -> None:
        """Takes back what the job allocated beyond the end or where the head was (fallocate(2), mmap(2)). That races
        with what it writes, so it is not done for less than a lot."""
        self._on_remark(file.job, "much was allocated beyond its end and taken back: some bytes may be missing", True)
        if file.punched:
            syscalls.punch_hole(fd, 0, file.punched)
        syscalls.punch_hole(fd, -(-os.fstat(fd).st_size // file.block_bytes) * file.block_bytes, _FAR_AWAY)
        found = os.fstat(fd)
        if found.st_blocks * 512 > found.st_size - file.punched + SLACK_BYTES:
            self._cut(fd, file)  # ext4 gives back what is beyond the end only so

    def _cut(self, fd: int, file: _File) -> None:
        file.size = os.fstat(fd).st_size
        os.ftruncate(fd, file.size)

    def _go_on_behind(self, file: _File, size: int) -> None:
        """It was truncated. It goes on at the next block, so that offsets stay places in it, all before is a hole, of
        which readers are told, and nobody waits for it to grow."""
        file.truncated_bytes += max(0, file.size - max(file.punched, 0))
        self._on_remark(file.job, f"{file.truncated_bytes} bytes were truncated", True)
        if not self._can_drop_head:
            file.size, file.punched = size, 0
            return
        file.punched = -(-file.size // file.block_bytes) * file.block_bytes
        self._with_file(file, self._extend)

    def _extend(self, fd: int, file: _File) -> None:
        syscalls.extend(fd, file.punched)
        self._lift(fd, file)

    def _lift(self, fd: int, file: _File) -> None:
        """What was written before the place where it goes on is moved to its end (without NULs around it)."""
        at = 0
        while at < file.punched:
            try:
                at = os.lseek(fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # there is no data
                    return
                raise
            end = min(os.lseek(fd, at, os.SEEK_HOLE), at + _PIECE_BYTES, file.punched)
            if at >= end:
                return
            os.write(fd, os.pread(fd, end - at, at).strip(b"\0"))
            syscalls.punch_hole(fd, at, end - at)
            at = end


def _hurry() -> None:
    """Lets this thread run when it is due, also beside jobs that take all CPUs: in 40 ms a job writes 50 MiB.

    It takes a small part of the time that the jobs it holds need to write. Who may not do this (it takes CAP_SYS_NICE,
    or RLIMIT_RTPRIO) does without, and caps hold as well as the scheduler lets them; to be nicer is no help, that
    counts only within a session (sched(7), autogroup).
    """
    try:
        # This concerns the calling thread only.
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
