"""System calls that the standard library lacks, by way of the C library."""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Final

# inotify(7)
IN_MODIFY: Final = 0x0002
IN_MOVED_TO: Final = 0x0080
IN_CREATE: Final = 0x0100
IN_Q_OVERFLOW: Final = 0x4000
IN_IGNORED: Final = 0x8000
IN_ONESHOT: Final = 0x80000000

# fallocate(2)
_FALLOC_FL_KEEP_SIZE: Final = 0x01
_FALLOC_FL_PUNCH_HOLE: Final = 0x02

# statx(2)
_AT_FDCWD: Final = -100
_STATX_BTIME: Final = 0x800

_libc: Final = ctypes.CDLL(None, use_errno=True)
_fallocate: Final = _libc.fallocate64 if hasattr(_libc, "fallocate64") else _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def inotify_init() -> int:
    return _check(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))


def inotify_add_watch(fd: int, path: bytes, mask: int) -> int:
    return _check(_libc.inotify_add_watch(fd, path, ctypes.c_uint32(mask)))


def inotify_rm_watch(fd: int, watch: int) -> None:
    _check(_libc.inotify_rm_watch(fd, watch))


def extend(fd: int, size: int) -> None:
    """Makes a file at least so large; never cuts off what is appended meanwhile, as ftruncate(2). Raises OSError."""
    _check(_fallocate(fd, 0, size - 1, 1))


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Gives bytes of a file back to the file system; its size stays, they read as zeros. Raises OSError."""
    _check(_fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length))


def keep_blocks(fd: int, offset: int, length: int) -> None:
    """Has the file system keep room for these bytes of a file, whose size stays. Raises OSError."""
    _check(_fallocate(fd, _FALLOC_FL_KEEP_SIZE, offset, length))


def birth_ns(path: bytes) -> int | None:
    """When a file was made: nobody can set that, so a copy tells another time. None: its file system does not know.

    statx(2): the mask at 0 says what is known, stx_btime is at 80 (seconds, then nanoseconds).
    """
    found = ctypes.create_string_buffer(256)
    if not hasattr(_libc, "statx"):
        return None
    _check(_libc.statx(_AT_FDCWD, path, 0, _STATX_BTIME, found))
    (mask,), (seconds, ns) = struct.unpack_from("=I", found, 0), struct.unpack_from("=qI", found, 80)
    return seconds * 1_000_000_000 + ns if mask & _STATX_BTIME else None


def memory_file(name: str, content: bytes) -> int:
    """An fd to read the content from, which is the caller's (memfd_create(2)). Raises OSError."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(fd, view) :]
        os.lseek(fd, 0, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd
