"""`worker.cursor`: which transition the log has, in numbers. No text of the log is ever read to find it.

Before a batch of lines is written, it notes where: in which file, from which byte on, and how long each line is. So
whatever is killed when, the size of that file says which of the lines are there.
"""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from worker_svc import frames

# Up to this transition all are logged; whose store's numbers these are; then what is being written: device, inode,
# offset and how many lines, whose lengths follow.
_HEAD: Final = struct.Struct("<Q16sQQQI")
# Head and lengths stay within one page, which the kernel copies as a whole, or not, when we are killed.
LINES_MAX: Final = 512
_SIZE: Final = _HEAD.size + 4 * LINES_MAX


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
        self._fd = os.open(state_dir / frames.CURSOR_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._worker_id = worker_id.encode()
        self.sequence = 0
        """All up to this transition are logged for certain."""
        self._unsure = Place(0, 0, 0)
        self._lengths: tuple[int, ...] = ()
        self._read(os.pread(self._fd, _SIZE, 0))

    def _read(self, noted: bytes) -> None:
        # Without the rest it was written by an earlier version, or by nobody.
        head = _HEAD.unpack(noted[: _HEAD.size].ljust(_HEAD.size, b"\0"))
        sequence, worker_id, *unsure, count = head
        # The cursor of a store that was removed says nothing of this one, whose numbers begin anew.
        if worker_id != self._worker_id:
            return
        self.sequence = sequence
        lengths = noted[_HEAD.size : _HEAD.size + 4 * count]
        if len(lengths) == 4 * count:
            self._unsure, self._lengths = Place(*unsure), struct.unpack(f"<{count}I", lengths)

    def resolve(self, size_of: Callable[[Place], int | None]) -> None:
        """Counts in what was being written when the last worker ended. Where the file is gone, or none, its lines
        count as not written: rather twice than never."""
        if self._lengths:
            size = size_of(self._unsure)
            written = 0 if size is None else size - self._unsure.size
            # Of the last one the line feed may be missing: whoever opened the file has written it.
            self.sequence += sum(end - 1 <= written for end in itertools.accumulate(self._lengths))
            self.settle(self.sequence)

    def ahead(self, place: Place, lengths: Sequence[int]) -> None:
        """The lines after `sequence` are about to be written there, at most LINES_MAX. Raises OSError."""
        head = _HEAD.pack(self.sequence, self._worker_id, *place, len(lengths))
        os.pwrite(self._fd, head + struct.pack(f"<{len(lengths)}I", *lengths), 0)

    def settle(self, sequence: int) -> None:
        """All up to `sequence` are logged. Raises OSError."""
        self.sequence = sequence
        os.pwrite(self._fd, _HEAD.pack(sequence, self._worker_id, 0, 0, 0, 0), 0)

    def close(self) -> None:
        os.close(self._fd)
