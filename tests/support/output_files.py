"""Output files as jobs and supervisors make them; and what a reader holds, from /proc."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from worker_svc.output import Chunk

PUNCH: Final = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def punch_head(path: Path, end: int) -> None:
    """As the supervisor does it. Raises OSError."""
    fd = os.open(path, os.O_WRONLY)
    try:
        if _libc.fallocate(fd, PUNCH, 0, end):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))
    finally:
        os.close(fd)


@functools.cache
def why_no_holes(directory: Path) -> str:
    """Empty if a punched head shows in SEEK_DATA here, else the reason to skip."""
    probe = directory / "hole-probe"
    probe.write_bytes(b"x" * 16384)
    try:
        punch_head(probe, 8192)
        fd = os.open(probe, os.O_RDONLY)
        try:
            return "" if os.lseek(fd, 0, os.SEEK_DATA) == 8192 else f"{directory}: holes do not show in SEEK_DATA"
        finally:
            os.close(fd)
    except OSError as error:
        return f"{directory}: {error.strerror}"
    finally:
        probe.unlink()


def append(path: Path, data: bytes) -> None:
    with path.open("ab", buffering=0) as file:
        file.write(data)


def pattern(offset: int, length: int) -> bytes:
    """Bytes that tell where they stand, without zeros: any piece of output can be checked for itself."""
    first = offset // 16
    lines = b"".join(b"%015d\n" % n for n in range(first, (offset + length) // 16 + 1))
    return lines[offset - first * 16 :][:length]


def writer(path: Path, program: str, *args: object) -> subprocess.Popen[bytes]:
    """A child whose standard output is `path`, opened O_APPEND as the supervisor does."""
    with path.open("ab", buffering=0) as file:
        return subprocess.Popen([sys.executable, "-Sc", program, *map(str, args)], stdout=file)


# Writes `pattern` in pieces of argv[2] bytes, argv[1] bytes in all, argv[3] seconds apart.
PATTERN: Final = """
import os, sys, time
total, piece, pause = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
data = b"".join(b"%015d\\n" % n for n in range(total // 16 + 1))
for at in range(0, total, piece):
    os.write(1, data[at : min(at + piece, total)])
    if pause: time.sleep(pause)
"""

# Writes binary blocks of 64 KiB with zeros in them: each page is its own number, eight bytes, over and over.
PAGES: Final = """
import os, struct, sys
for page in range(1, int(sys.argv[1]) + 1, 16):
    os.write(1, b"".join(struct.pack(">Q", n) * 512 for n in range(page, page + 16)))
"""


async def collect(chunks: AsyncIterator[Chunk]) -> list[Chunk]:
    return [chunk async for chunk in chunks]


def joined(chunks: list[Chunk], start: int = 0) -> bytes:
    """The data, having checked that chunks follow one on another; gaps are left out."""
    for chunk in chunks:
        assert chunk.offset == start
        assert bool(chunk.data) != bool(chunk.gap_bytes)
        start += len(chunk.data) or chunk.gap_bytes
    return b"".join(chunk.data for chunk in chunks)


def gaps(chunks: list[Chunk]) -> list[tuple[int, int]]:
    return [(chunk.offset, chunk.offset + chunk.gap_bytes) for chunk in chunks if chunk.gap_bytes]


def open_fds() -> dict[str, str]:
    fds = {}
    for link in Path("/proc/self/fd").iterdir():
        try:
            fds[link.name] = str(link.readlink())
        except FileNotFoundError:  # the one that lists the directory
            continue
    return fds


def inotify_watches() -> int:
    watches = 0
    for fd, target in open_fds().items():
        if "inotify" in target:
            watches += Path(f"/proc/self/fdinfo/{fd}").read_text().count("inotify wd:")
    return watches
