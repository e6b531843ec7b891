"""An open output file: reads that do not wait for the disk, where its data and its last lines begin."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import threading
from pathlib import Path
from typing import Final, NamedTuple

PAGE_BYTES: Final = 4096
SEARCH_BLOCK_BYTES: Final = 256 * 1024
# What one call into a thread searches: a few milliseconds of work between two looks at cancellation.
SEARCH_PIECE_BYTES: Final = 4 * 1024 * 1024

# statfs(2): tmpfs and ramfs. They know no RWF_NOWAIT but are memory, short of swapping.
_MEMORY_FILE_SYSTEMS: Final = frozenset({0x01021994, 0x858458F6})
_libc: Final = ctypes.CDLL(None, use_errno=True)


class NotARegularFile(OSError):
    """Someone has put something else in the place of the output file."""


class OutputFile:
    """One descriptor, shared by all streams of the file, and by threads that outlive the stream they read
    for.

    The creator holds the first reference. Only `hold` and `release` may be called from any thread.
    """

    def __init__(self, fd: int, path: Path) -> None:
        status = os.fstat(fd)
        self.fd = fd
        self.path = path
        # Cannot be given to another file while we have this one open.
        self.key = (status.st_dev, status.st_ino)
        self.streams = 0
        self._holders = 1
        self._lock = threading.Lock()
        self._flags = os.RWF_NOWAIT
        self._threads_only = False

    @classmethod
    def open(cls, path: Path) -> OutputFile | None:
        """None if there is no such file. Raises OSError. May wait for the disk."""
        try:
            # O_NONBLOCK: a FIFO someone put there must not keep the thread.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise NotARegularFile(errno.EINVAL, "not a regular file", str(path))
        return cls(fd, path)

    def hold(self) -> None:
        with self._lock:
            self._holders += 1

    def release(self) -> None:
        with self._lock:
            self._holders -= 1
            if self._holders:
                return
        if os.fstat(self.fd).st_nlink:
            os.close(self.fd)
        else:  # the last to close a deleted file frees its blocks: for gigabytes that takes a while
            try:
                threading.Thread(target=os.close, args=(self.fd,), daemon=True, name="output-close").start()
            except RuntimeError:  # no thread is to be had
                os.close(self.fd)

    @property
    def size_bytes(self) -> int:
        return os.fstat(self.fd).st_size

    def read_now(self, offset: int, buffer: memoryview) -> int | None:
        """Bytes read, 0 at the end of the file; None if that would wait for the disk. Raises OSError."""
        if self._threads_only:
            return None
        try:
            return os.preadv(self.fd, [buffer], offset, self._flags)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP or not self._flags:
                raise
        self._flags = 0
        self._threads_only = not _is_in_memory(self.fd)
        return self.read_now(offset, buffer)

    def read(self, offset: int, length: int) -> bytes:
        """May wait for the disk. Raises OSError."""
        return os.pread(self.fd, length, offset)

    def head_gone_bytes(self) -> int:
        """How many bytes are gone from the head. May wait for the inode's lock. Raises OSError."""
        size = self.size_bytes  # before the look: what is appended after it is not part of the hole
        try:
            return os.lseek(self.fd, 0, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return size
            if error.errno == errno.EINVAL:
                return 0
            raise

    def search_last_lines(self, lines: int, end: int) -> LineSearch:
        """Begins to look for the last `lines` lines before `end`. May wait for the disk. Raises OSError."""
        end = min(end, self.size_bytes)
        begin = min(end, self.head_gone_bytes())
        # A last line without newline counts as a line, so that a final newline is not one of those to be
        # found.
        final_newline = begin < end and self.read(end - 1, 1) == b"\n"
        return LineSearch(begin, end, lines + final_newline)

    def search_on(self, search: LineSearch) -> LineSearch:
        """Goes on with a search, for at most SEARCH_PIECE_BYTES. May wait for the disk. Raises OSError."""
        floor = max(search.begin, search.end - SEARCH_PIECE_BYTES)
        while search.newlines and search.end > floor:
            begin = max(floor, search.end - SEARCH_BLOCK_BYTES)
            search = search.step(begin, self.read(begin, search.end - begin))
        return search


class LineSearch(NamedTuple):
    """Looking backwards from `end` to `begin` for so many newlines; `end` is then behind the last one."""

    begin: int
    end: int
    newlines: int

    @property
    def done(self) -> bool:
        return not self.newlines or self.end <= self.begin

    @property
    def offset(self) -> int:
        """Where the lines begin: at 0 if there are too few, so that a head that is gone is told."""
        return 0 if self.newlines else self.end

    def step(self, begin: int, block: bytes) -> LineSearch:
        """Having read `block` from `begin` to `end` (less, if the file was truncated just now)."""
        found = block.count(b"\n")
        if found < self.newlines:
            return self._replace(end=begin, newlines=self.newlines - found)
        return self._replace(end=begin + _nth_last_newline(block, self.newlines) + 1, newlines=0)


def _nth_last_newline(block: bytes, n: int) -> int:
    """Where it is; there must be so many. Halves the block: stepping over 250,000 newlines takes 30 ms."""
    low, high = 0, len(block)
    while high - low > PAGE_BYTES:
        middle = (low + high) // 2
        found = block.count(b"\n", middle, high)
        if found >= n:
            low = middle
        else:
            n -= found
            high = middle
    for _ in range(n):
        high = block.rindex(b"\n", low, high)
    return high


def may_have_hole(data: bytes, offset: int) -> bool:
    """Whether `data`, read at `offset`, can be partly of a hole: one there was, or one that just opened.

    What was punched reads as pages of zeros. Where the kernel was clearing a page while it was copied (it
    does that in the large folio at the hole's end), the page begins or ends with zeros, in words of 8 bytes.
    """
    first = min(len(data), -offset % PAGE_BYTES)  # where the first whole page begins in `data`
    last = first + (len(data) - first) // PAGE_BYTES * PAGE_BYTES
    for cut in (data[:first], data[last:]):
        if cut and not (cut[0] and cut[-1]):
            return True
    words = memoryview(data)[first:last].cast("Q")
    page_words = PAGE_BYTES // 8
    return 0 in words[::page_words].tolist() or 0 in words[page_words - 1 :: page_words].tolist()


def _is_in_memory(fd: int) -> bool:
    buffer = (ctypes.c_long * 32)()  # struct statfs (120 bytes): f_type comes first
    return _libc.fstatfs(fd, buffer) == 0 and buffer[0] in _MEMORY_FILE_SYSTEMS
