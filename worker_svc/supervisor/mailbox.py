"""What other threads have to say to the loop: calls that it makes in its own turn."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable


class Mailbox:
    def __init__(self) -> None:
        self._letters: deque[Callable[[], None]] = deque()
        self.bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """Readable when there is something: then call `open`."""

    def post(self, letter: Callable[[], None]) -> None:
        """From any thread."""
        self._letters.append(letter)
        os.eventfd_write(self.bell, 1)

    def open(self) -> None:
        os.eventfd_read(self.bell)
        while self._letters:
            self._letters.popleft()()
