"""Where lines go: a file of ours, which may be moved away under us, or the standard error that we were given.

All of this can block for as long as a disk or a reader likes: only the writer's thread may call it, once it runs.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

from worker_svc.linux.syscalls import keep_blocks
from worker_svc.telemetry.cursor import Place, place_of

# What POSIX lets a pipe take as a whole at least (PIPE_BUF): lines of several writers do not mix in it.
_PIPE_WHOLE_BYTES: Final = 4096
# Some 250 lines of the audit.
_RESERVE_BYTES: Final = 64 * 1024


class LogFile:
    def __init__(self, path: Path | None) -> None:
        """None: standard error. Raises OSError."""
        self._path = path
        self.fd = 2 if path is None else _open(path)
        self.is_file = stat.S_ISREG(os.fstat(self.fd).st_mode)
        """Otherwise a pipe, a terminal, a socket: it has no size, and what is in it may be read already."""
        self._kept_to: int | None = None
        """Up to which size the file system keeps room for it, as far as is known."""
        size = self.place().size
        self.is_torn = self.is_file and size > 0 and not _ends_whole(self.fd, size)
        """Whether its last line was cut short."""

    def place(self) -> Place:
        """Where the next line goes."""
        place = place_of(os.fstat(self.fd))
        # Without O_APPEND (`2>file` in a shell) we write where whoever shares the descriptor is.
        if self.is_file and not fcntl.fcntl(self.fd, fcntl.F_GETFL) & os.O_APPEND:
            return place._replace(size=os.lseek(self.fd, 0, os.SEEK_CUR))
        return place

    def open_again(self, place: Place) -> int | None:
        """The file of an earlier place, to be read; None: it is nowhere to be found."""
        if self._path is None:
            candidates = ["/proc/self/fd/2"]
        else:  # it may have been moved away since, most likely within its folder
            candidates = [str(self._path), *(entry.path for entry in os.scandir(self._path.parent))]
        for path in map(Path, candidates):
            with suppress(OSError):  # one that is gone meanwhile, or not for us, is not the one
                found = path.stat()
                if stat.S_ISREG(found.st_mode) and (found.st_dev, found.st_ino) == place[:2]:
                    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return None

    def follow(self) -> bool:
        """Opens the file anew if there is another one, or none, by its name: whether it did. Raises OSError."""
        if self._path is None:
            return False
        try:
            if os.path.samestat(self._path.stat(), os.fstat(self.fd)):
                return False
        except FileNotFoundError:
            pass  # moved away: it is made anew
        opened = _open(self._path)
        os.dup2(opened, self.fd, inheritable=False)
        os.close(opened)
        self.is_file = stat.S_ISREG(os.fstat(self.fd).st_mode)
        self._kept_to = None
        return True

    def has_room(self, size: int) -> bool:
        """Whether so many bytes leave untouched what is kept for the lines of calls that make room on a full disk."""
        if not self.is_file:
            return True
        end = self.place().size + size
        if self._kept_to is None or not end + _RESERVE_BYTES <= self._kept_to <= end + 2 * _RESERVE_BYTES:
            try:
                keep_blocks(self.fd, end, 2 * _RESERVE_BYTES)
            except OSError as error:
                # Elsewhere: a file system that can keep none.
                return error.errno not in (errno.ENOSPC, errno.EDQUOT)
            self._kept_to = end + 2 * _RESERVE_BYTES
        return True

    def write(self, data: bytes) -> tuple[int, OSError | None]:
        """How many bytes were written, and what kept it from writing all."""
        written = 0
        while written < len(data):
            portion = data[written:] if self.is_file else _whole_lines(data, written)
            try:
                written += os.write(self.fd, portion)
            except BlockingIOError:  # somebody who shares it has made it so
                select.select([], [self.fd], [])
            except OSError as error:
                return written, error
        return written, None

    def close(self) -> None:
        if self._path is not None:
            os.close(self.fd)


def _open(path: Path) -> int:
    # A link could lead to any file of ours, and we would append to it. Those in /dev are the machine's.
    is_device = path.parent == Path("/dev")
    flags = os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | (0 if is_device else os.O_NOFOLLOW)
    try:
        if not is_device:
            with suppress(PermissionError):  # a file we may write and not read
                # Reading too: a FIFO is then open at once, whether or not somebody reads it.
                return os.open(path, os.O_RDWR | flags, 0o600)
        fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | flags, 0o600)
        os.set_blocking(fd, True)
        return fd
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "is a symbolic link: name the file itself", str(path)) from None
        if error.errno == errno.ENXIO:
            raise OSError(errno.ENXIO, "is a FIFO that nobody reads, or a socket", str(path)) from None
        raise


def _ends_whole(fd: int, size: int) -> bool:
    """Whether the last byte is a line feed. A file that may not be read is taken for whole."""
    try:
        reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        return os.pread(reader, 1, size - 1) == b"\n"
    finally:
        os.close(reader)


def _whole_lines(data: bytes, start: int) -> bytes:
    """As many lines as a pipe takes at once; of a longer line the whole."""
    end = data.rfind(b"\n", start, start + _PIPE_WHOLE_BYTES) + 1
    return data[start : end or data.index(b"\n", start) + 1]
