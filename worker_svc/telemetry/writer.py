"""The thread that writes the log: who logs never waits for a disk or a reader.

Lines are held back, in order, while they cannot be written, up to a bound; what is beyond it is counted, and the count
told where the lines are missing. Transitions are not held back but left where they are, in the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from queue import Empty, SimpleQueue
from typing import Final

from worker_svc.linux import failpoints
from worker_svc.telemetry.cursor import Cursor
from worker_svc.telemetry.file import LogFile

STANDS_STILL: Final = "whoever reads the log, or its disk, stands still"
HELD_MAX_BYTES: Final = 4 * 1024 * 1024
# A write takes less; a disk or a reader that takes longer stands still.
_STALLED_AFTER_S: Final = 0.25
_RETRY_S: Final = 1.0
# Lines that were held back for less need not be told of.
_TOLD_AFTER_S: Final = 1.0


class Lines:
    """What is written together: lines of the log in order, or a batch of transitions."""

    __slots__ = ("cursor", "first", "lines", "number", "written")

    def __init__(self, lines: Sequence[bytes], cursor: Cursor | None = None, first: int = 0) -> None:
        self.lines = lines
        self.cursor = cursor
        self.first = first
        """For transitions, which are noted at the cursor: the sequence number of the first."""
        self.number = 0
        self.written = 0
        """How many of the lines are written."""


class LogWriter:
    def __init__(self, file: LogFile) -> None:
        self.file = file
        self.notice: Callable[..., bytes]
        """Makes a line: `notice(event, **fields)`. To be set before the first line is put."""
        self.problem = ""
        """Why the file takes no line now. Where it is none, but a pipe nobody reads any more, lines are just lost."""
        self.lost_lines = 0
        self.held_lines = 0
        self._held_bytes = 0
        self._untold = 0
        self._numbered = self._done = 0
        self._began_s = 0.0
        """When the write began that is under way."""
        self._queue: SimpleQueue[Lines | None] = SimpleQueue()
        # Reentrant: what the garbage collector ends may log too.
        self._lock = threading.RLock()
        self._waiters: list[asyncio.Future[None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._leaving = threading.Event()
        self._urgent: SimpleQueue[Lines | None] = SimpleQueue()
        self._gone = 0
        """Lines since the reader has gone."""
        self._told: set[str] = set()
        """What goes wrong beside the writing, and was said to."""
        # A daemon: where a write never ends, the worker must all the same.
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    # For whoever logs

    def put(self, line: bytes, most_bytes: int = HELD_MAX_BYTES) -> int:
        """The line's number, for `settled`; 0: so much is held back already that it is lost."""
        with self._lock:
            if self._held_bytes + len(line) > most_bytes:
                self.lost_lines += 1
                self._untold += 1
                return 0
            self._tell_lost()
            return self.enqueue(Lines((line,)))

    def enqueue(self, lines: Lines) -> int:
        """Its number, for `settled`."""
        with self._lock:
            self._numbered += 1
            lines.number = self._numbered
            self.held_lines += len(lines.lines)
            self._held_bytes += sum(map(len, lines.lines))
            self._queue.put(lines)
            return lines.number

    async def put_urgent(self, line: bytes) -> bool:
        """Written before all that is held back, while there is a `problem`: whether it was."""
        urgent = Lines((line,))
        with self._lock:
            self._urgent.put(urgent)
            number = self.enqueue(Lines(()))  # where it is not taken before, with that
        await self._until(lambda: urgent.number > 0 or self._done >= number)
        return urgent.written == 1

    def look_for_file(self) -> None:
        """Follows the file if it was moved away, also while there is nothing to write."""
        self.enqueue(Lines(()))

    def _tell_lost(self) -> None:
        if self._untold:
            untold, self._untold = self._untold, 0
            self.enqueue(Lines((self.notice("log.lines_lost", lines=untold),)))

    # For the event loop

    @property
    def is_stalled(self) -> bool:
        return 0 < self._began_s < time.monotonic() - _STALLED_AFTER_S

    @property
    def hindrance(self) -> str:
        """What keeps lines from being written now; usually nothing."""
        return self.problem or (STANDS_STILL if self.is_stalled else "")

    async def settled(self, number: int) -> str:
        """Returns once these lines are written, or cannot be now: with the `problem`, if there is one."""

        def is_settled() -> bool:
            if self._done >= number or self.problem or self.is_stalled:
                return True
            if self._watch is None:
                self._watch = asyncio.get_running_loop().call_later(_STALLED_AFTER_S, self._look)
            return False

        await self._until(is_settled)
        return "" if self._done >= number else self.problem

    async def done(self, number: int) -> None:
        """Returns once these lines are written, however long that takes."""
        await self._until(lambda: self._done >= number)

    async def usable(self) -> None:
        """Returns once the file takes lines again."""
        await self._until(lambda: not self.problem)

    async def _until(self, is_over: Callable[[], bool]) -> None:
        while not is_over():
            self._loop = asyncio.get_running_loop()
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._waiters.append(waiter)
            # The thread, which looks for waiters when it has written, may have done so meanwhile.
            if not is_over():
                await waiter

    def _look(self) -> None:
        self._watch = None
        self._wake()

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    # The thread

    def _run(self) -> None:
        try:
            self._write_all()
        finally:  # whoever waits for it must not wait for ever
            self.problem = self.problem or "its thread has ended"
            self._tell_waiters()

    def _write_all(self) -> None:
        while True:
            for lines in self._take():
                if lines is None:
                    return
                self._write(lines)
                with self._lock:
                    self.held_lines -= len(lines.lines)
                    self._held_bytes -= sum(map(len, lines.lines))
                    self._done = lines.number
                    if self._done == self._numbered and not self._gone:
                        self._tell_lost()
            self._tell_waiters()

    def _take(self) -> list[Lines | None]:
        """All that is there, at least one; what can be written at once together."""
        taken = [self._queue.get()]
        plain: list[bytes] = []
        while True:
            try:
                lines = self._queue.get_nowait()
            except Empty:
                break
            last = taken[-1]
            if last is None or lines is None or last.cursor or lines.cursor:
                taken.append(lines)
                continue
            if last.lines is not plain:
                plain = list(last.lines)
                last.lines = plain
            plain += lines.lines
            last.number = lines.number
        return taken

    def _tell_waiters(self) -> None:
        if self._waiters and self._loop is not None:
            try:
                self._loop.call_soon_threadsafe(self._wake)
            except RuntimeError:  # it is closed: nobody waits any more
                self._loop = None

    def _write(self, lines: Lines) -> None:
        """All of it, however long that takes; less only where the reader is gone, or when the worker leaves."""
        self._began_s = time.monotonic()
        self._write_urgent(0, takes_urgent=True)
        if self._gone and not self._is_back():
            self._lose(lines)
            return
        data, ends = b"".join(lines.lines), [0, *accumulate(map(len, lines.lines))]
        at, reason = 0, STANDS_STILL
        while True:
            if self._follow():
                at = ends[lines.written]  # a line that was cut short is written there whole
            error: OSError | None = None
            has_room = self.file.has_room(len(data) - at)
            if has_room:
                if lines.cursor is not None:
                    self._announce(lines, lines.cursor, at - ends[lines.written])
                count, error = self.file.write(data[at:])
                at += count
                lines.written = bisect_right(ends, at) - 1
                if error is None:
                    break
                if not self.file.is_file:
                    self._lose(lines)
                    return
            self.problem = reason = os.strerror(errno.ENOSPC if error is None else error.errno or errno.EIO)
            self._tell_waiters()
            if lines.cursor is not None and at == ends[lines.written]:
                self._settle(lines, lines.cursor)
            if self._wait(takes_urgent=at == ends[lines.written]):
                return  # as it stands: the cursor tells how far it could have got
        if lines.cursor is not None:
            if failpoints.is_armed:
                failpoints.reach("line-written")
            self._settle(lines, lines.cursor)
        self.problem = ""
        for_s, self._began_s = time.monotonic() - self._began_s, 0.0
        if for_s >= _TOLD_AFTER_S:
            told = self.notice("log.held_back", lines=self.held_lines, for_s=round(for_s, 1), reason=reason)
            self.enqueue(Lines((told,)))

    def _wait(self, *, takes_urgent: bool) -> bool:
        """For the next try. Meanwhile what makes room is written in what is kept for it, but not within a line.
        Returns whether it is time to leave."""
        until_s = time.monotonic() + _RETRY_S
        while not self._leaving.is_set() and (left_s := until_s - time.monotonic()) > 0:
            self._write_urgent(left_s, takes_urgent=takes_urgent)
        return self._leaving.is_set()

    def _write_urgent(self, timeout_s: float, *, takes_urgent: bool) -> None:
        """What there is of it, at least one unless that takes longer."""
        with contextlib.suppress(Empty):
            urgent = self._urgent.get(block=timeout_s > 0, timeout=timeout_s)
            while urgent is not None:
                if takes_urgent:
                    _, error = self.file.write(urgent.lines[0])
                    urgent.written = int(error is None)
                urgent.number = 1
                self._tell_waiters()
                urgent = self._urgent.get_nowait()

    def _lose(self, lines: Lines) -> None:
        """Nobody reads the pipe any more. Transitions are in the store all the same."""
        self._began_s = 0.0
        if lines.cursor is not None:
            self._settle(lines, lines.cursor)
            return
        lost = len(lines.lines) - lines.written
        self._gone += lost
        with self._lock:
            self.lost_lines += lost

    def _is_back(self) -> bool:
        """Whether somebody reads it again, who is then told first what was lost meanwhile."""
        _, error = self.file.write(self.notice("log.lines_lost", lines=self._gone))
        self._gone = self._gone if error else 0
        return not error

    def _follow(self) -> bool:
        try:
            has_followed = self.file.follow()
        except OSError as error:
            self._tell_once("log.not_reopened", f"{error}: what was open stays in use")
            return False
        if has_followed:
            self._told.clear()
        return has_followed

    def _announce(self, lines: Lines, cursor: Cursor, cut_bytes: int) -> None:
        """`cut_bytes`: of the first of its lines are there already."""
        if not self.file.is_file:
            return
        place = self.file.place()
        cursor.sequence = lines.first - 1 + lines.written
        try:
            cursor.ahead(place._replace(size=place.size - cut_bytes), lines.lines[lines.written :])
            if failpoints.is_armed:
                failpoints.reach("line-announced")
        except OSError as error:  # the lines matter more: without the note some can come twice after a crash
            self._tell_once("log.cursor_not_written", str(error))

    def _settle(self, lines: Lines, cursor: Cursor) -> None:
        try:
            cursor.settle(lines.first - 1 + lines.written)
        except OSError as error:
            self._tell_once("log.cursor_not_written", str(error))

    def _tell_once(self, event: str, reason: str) -> None:
        if event not in self._told:
            self._told.add(event)
            self.enqueue(Lines((self.notice(event, reason=reason),)))

    def close(self, timeout_s: float) -> None:
        """Writes what is there; gives up when it takes longer."""
        self._queue.put(None)
        self._leaving.set()
        self._urgent.put(None)  # wakes it
        self._thread.join(0 if self.is_stalled else timeout_s)
        if not self._thread.is_alive():
            self.file.close()
