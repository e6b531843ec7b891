"""Memory and files held back from the start. When the machine gives no more they are let go of, so that the jobs there
are can be looked after to their end; until they are back no other job is started."""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from typing import Final

_MEMORY_BYTES: Final = 4 * 1024 * 1024
_FILES: Final = 8


class Reserve:
    def __init__(self) -> None:
        """Raises OSError."""
        self._take()

    def _take(self) -> None:
        self._memory, self._files = _map(_MEMORY_BYTES), _open(_FILES)
        self.is_whole = True

    def spend(self) -> None:
        if self.is_whole:
            self.is_whole = False
            self._memory.close()
            _close(self._files)

    def refill(self) -> bool:
        """Whether it is whole, by now. It is not taken back before there is as much beside it: else what it was let go
        for would fail again at once."""
        if not self.is_whole:
            with suppress(OSError):
                _map(2 * _MEMORY_BYTES).close()
                _close(_open(2 * _FILES))
                self._take()
        return self.is_whole


def _map(size: int) -> mmap.mmap:
    # Address space: none of it is ever touched.
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _open(count: int) -> list[int]:
    opened: list[int] = []
    try:
        for _ in range(count):
            opened.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        _close(opened)
        raise
    return opened


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
