"""Empties output pipes where the C extension was not built: as _pump.h, which says why, in a thread of Python's."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct
import termios
import threading
import time
from contextlib import suppress
from typing import Final

from worker_svc.linux import syscalls
from worker_svc.linux.threads import start_thread

_SLACK_BYTES: Final = 4 * 1024 * 1024
_PIECE_BYTES: Final = 256 * 1024
_FULL_PAUSE_S: Final = 0.25
_LEFT_BYTES: Final = 2 * 1024 * 1024
_NEWS: Final = struct.Struct("@iiq")
# Kept in step with _pump.h.
EXCEEDED, NOT_DROPPED, FULL, TRUNCATED, BROKEN = range(1, 6)


class _Output:
    def __init__(self, number: int, in_fd: int, out_fd: int, size: int, cap: int, block: int, stops: bool) -> None:
        self.lock = threading.Lock()
        self.number = number
        self.in_fd = in_fd
        self.out_fd = out_fd
        self.size = size
        self.cap = cap
        self.block = block
        self.stops = stops
        self.dropped = 0
        self.truncated = 0
        self.unwritten = 0
        self.is_broken = False
        self.told: set[int] = set()

    def tell(self, kind: int, value: int) -> None:
        if kind in self.told:
            return
        try:
            os.write(_news, _NEWS.pack(self.number, kind, value))
        except BlockingIOError:  # full: said at the next occasion
            return
        self.told.add(kind)

    def drop(self, until: int) -> None:
        until = until // self.block * self.block
        if until <= self.dropped:
            return
        try:
            syscalls.punch_hole(self.out_fd, self.dropped, until - self.dropped)
        except OSError as error:
            self.tell(NOT_DROPPED, error.errno or errno.EIO)
        else:
            self.dropped = until

    def look_for_truncation(self) -> None:
        found = os.fstat(self.out_fd).st_size
        if found >= self.size:
            return
        self.truncated += self.size - max(self.dropped, found)
        self.size = -(-self.size // self.block) * self.block
        self.dropped = 0
        self.drop(self.size)
        self.tell(TRUNCATED, self.truncated)

    def hold_to_cap(self) -> None:
        kept = self.size - self.dropped
        if not self.cap or kept <= self.cap:
            return
        if self.stops:
            self.tell(EXCEEDED, self.size)
        if kept > self.cap + _SLACK_BYTES:
            self.drop(self.size - self.cap)

    def move(self, count: int) -> int:
        """At most so many bytes, from pipe to file. 0: the pipe has no writer any more. Raises OSError."""
        if not self.is_broken:
            self.look_for_truncation()
            try:
                moved = os.splice(self.in_fd, self.out_fd, count, offset_dst=self.size, flags=os.SPLICE_F_NONBLOCK)
            except BlockingIOError:
                raise
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    self.tell(FULL, error.errno)
                    raise
                self.is_broken = True
                self.tell(BROKEN, error.errno or errno.EIO)
            else:
                self.size += moved
                self.hold_to_cap()
                return moved
        gone = os.splice(self.in_fd, _null, count, flags=os.SPLICE_F_NONBLOCK)
        self.unwritten += gone
        return gone

    def has_room(self) -> bool:
        """Whether the disk is not as good as full for what is in the pipe."""
        if self.is_broken:
            return True
        disk = os.fstatvfs(self.out_fd)
        left = min(_LEFT_BYTES, disk.f_blocks * disk.f_frsize // 16)
        return not disk.f_blocks or disk.f_bavail * disk.f_frsize > left or not self.waiting()

    def waiting(self) -> int:
        """Bytes in the pipe."""
        return int.from_bytes(fcntl.ioctl(self.in_fd, termios.FIONREAD, bytes(4)), "little")

    def drain(self) -> None:
        left = self.waiting()
        try:
            while left > 0 and (moved := self.move(left)):
                left -= moved
        except OSError:  # the disk is full, and that was told
            self.unwritten += left
        self.look_for_truncation()
        if self.cap and not self.stops:
            self.drop(self.size - self.cap)

    def close(self) -> None:
        _outputs.pop(self.in_fd, None)
        # A child between fork and exec has the fd too: without this, epoll would go on to report it.
        with suppress(FileNotFoundError):  # it was taken out when the last writer had gone
            _epoll.unregister(self.in_fd)
        os.close(self.in_fd)
        self.in_fd = -1


_news = _null = -1
_epoll: select.epoll
_outputs: Final[dict[int, _Output]] = {}


def pump_start(news_fd: int) -> None:
    global _news, _null, _epoll
    _news = news_fd
    _null = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
    _epoll = select.epoll(flags=select.EPOLL_CLOEXEC)
    start_thread(_run, "output-pump")


def pump_add(number: int, in_fd: int, out_fd: int, size: int, cap: int, block: int, stops: bool) -> _Output:
    output = _outputs[in_fd] = _Output(number, in_fd, out_fd, size, cap, block, stops)
    _epoll.register(in_fd, select.EPOLLIN)
    return output


def pump_finish(output: _Output) -> tuple[int, int, int]:
    with output.lock:
        output.drain()
        answer = output.size, output.truncated, output.unwritten
        os.close(output.out_fd)
        output.out_fd = -1
        output.is_broken = True
        try:
            is_over = os.splice(output.in_fd, _null, 1, flags=os.SPLICE_F_NONBLOCK) == 0
        except BlockingIOError:
            is_over = False
        if is_over:
            output.close()
    return answer


def _run() -> None:
    while True:
        is_full = False
        for fd, _ in _epoll.poll():
            output = _outputs.get(fd)
            if output is None:  # closed meanwhile
                continue
            with output.lock:
                is_full |= output.in_fd == fd and _step(output)
        if is_full:
            time.sleep(_FULL_PAUSE_S)


def _step(output: _Output) -> bool:
    """True: the disk is full."""
    if not output.has_room():
        output.tell(FULL, errno.ENOSPC)
        return True
    try:
        moved = output.move(_PIECE_BYTES)
    except BlockingIOError:
        return False
    except OSError:
        return True
    if not moved:
        _epoll.unregister(output.in_fd)  # or it would be reported for ever
        if output.out_fd < 0:
            output.close()
    return False
