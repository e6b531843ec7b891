"""Memory and files held back from the start. When the machine gives no more they are let go of, so that the jobs there
are can be looked after to their end; until they are back no other job is started."""

from __future__ import annotations

import mmap
import os
from typing import Final

_MEMORY_BYTES: Final = 4 * 1024 * 1024
_FILES: Final = 8


class Reserve:
    def __init__(self) -> None:
        """Raises OSError."""
        self._memory: mmap.mmap | None = None
        self._files: list[int] = []
        self._fill()

    def _fill(self) -> None:
        if self._memory is None:  # address space: none of it is ever touched
            self._memory = mmap.mmap(-1, _MEMORY_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        while len(self._files) < _FILES:
            self._files.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))

    @property
    def is_whole(self) -> bool:
        return self._memory is not None and len(self._files) == _FILES

    def refill(self) -> bool:
        """Whether it is whole, by now."""
        if not self.is_whole:
            try:
                self._fill()
            except OSError:  # not yet; the loop tries again
                return False
        return True

    def spend(self) -> None:
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        while self._files:
            os.close(self._files.pop())
