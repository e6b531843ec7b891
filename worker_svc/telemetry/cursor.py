"""`worker.cursor`: which transition the log has, in numbers. Nothing is ever searched for in the log to find it.

Before a batch of lines is written, it notes where: in which file, from which byte on, and length and checksum of each.
So whatever is killed when, it can be told which of them are there, whatever else was written since.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from worker_svc.record import paths

# Up to this transition all are logged; whose store's numbers these are; then what is being written: device, inode,
# offset and how many lines, of which length and checksum follow; and how many lines the last worker took with it.
_HEAD: Final = struct.Struct("<Q16sQQQII")
_LINE: Final = struct.Struct("<II")
# All of it stays within one page, which the kernel copies as a whole, or not, when we are killed.
_OFFSET_MAX: Final = 2**62
LINES_MAX: Final = (4096 - _HEAD.size) // _LINE.size


class Place(NamedTuple):
    """The end of a file."""

    device: int
    inode: int
    size: int


def place_of(found: os.stat_result) -> Place:
    return Place(found.st_dev, found.st_ino, found.st_size)


class Cursor:
    def __init__(self, state_dir: Path, worker_id: str) -> None:
        """Raises OSError."""
        self._fd = os.open(state_dir / paths.CURSOR_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._worker_id = worker_id.encode()
        self.sequence = 0
        """All up to this transition are logged for certain."""
        self.lost_lines = 0
        """How many lines the last worker held back to its end."""
        self._unsure = Place(0, 0, 0)
        self._lines: list[tuple[int, int]] = []
        self._read(os.pread(self._fd, 4096, 0))

    def _read(self, noted: bytes) -> None:
        # Without the rest it was written by an earlier version, or by nobody.
        head = _HEAD.unpack(noted[: _HEAD.size].ljust(_HEAD.size, b"\0"))
        sequence, worker_id, *unsure, count, lost_lines = head
        # The cursor of a store that was removed says nothing of this one, whose numbers begin anew.
        if worker_id != self._worker_id:
            return
        self.sequence, self.lost_lines = sequence, lost_lines
        lines = noted[_HEAD.size : _HEAD.size + _LINE.size * count]
        if len(lines) == _LINE.size * count and unsure[-1] <= _OFFSET_MAX:
            self._unsure, self._lines = Place(*unsure), list(_LINE.iter_unpack(lines))

    def resolve(self, open_file: Callable[[Place], int | None]) -> None:
        """Counts in what was being written when the last worker ended. `open_file` opens the file of a place to
        read; where it is gone, or none, the lines count as not written: rather twice than never."""
        if not self._lines:
            return
        fd = open_file(self._unsure)
        if fd is None:
            return
        offset = self._unsure.size
        try:
            for length, checksum in self._lines:
                # Without the line feed: if it is missing, whoever writes next ends the line.
                text = os.pread(fd, max(length - 1, 0), offset)
                if len(text) != length - 1 or zlib.crc32(text) != checksum:
                    break
                offset += length
                self.sequence += 1
        finally:
            os.close(fd)

    def ahead(self, place: Place, lines: Sequence[bytes]) -> None:
        """At most LINES_MAX of the transitions after `sequence` are about to be written there. Raises OSError."""
        noted = [_LINE.pack(len(line), zlib.crc32(memoryview(line)[:-1])) for line in lines]
        head = _HEAD.pack(self.sequence, self._worker_id, *place, len(lines), self.lost_lines)
        os.pwrite(self._fd, head + b"".join(noted), 0)

    def settle(self, sequence: int) -> None:
        """All up to `sequence` are logged. Raises OSError."""
        self.sequence = sequence
        os.pwrite(self._fd, _HEAD.pack(sequence, self._worker_id, 0, 0, 0, 0, self.lost_lines), 0)

    def take_leave(self, lost_lines: int) -> None:
        """With so many lines held back that are lost now; whatever is being written. Raises OSError."""
        os.pwrite(self._fd, lost_lines.to_bytes(4, "little"), _HEAD.size - 4)

    def close(self) -> None:
        os.close(self._fd)
