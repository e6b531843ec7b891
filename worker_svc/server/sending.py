"""What may be under way to clients: nothing is made that a client does not take, and there is one bound for all.

A stream whose window is shut waits before it makes something to send, so that it holds nothing. What is made although
it cannot be sent at once, such as a large answer to one that reads slowly, is counted.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

from worker_svc.server.http2 import Http2

# One identity may have this part of the whole: a quarter.
_PART: Final = 4
# What a message takes of a window besides its data: else its last bytes would wait, and with them all of it.
OVERHEAD_BYTES: Final = 64


class SendBudget:
    """Memory for answers that are made and not yet sent, of all connections together."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.taken_bytes = 0
        self.of_identity: dict[str, int] = {}
        self.waiting: set[Sending] = set()

    def add(self, identity: str, size: int) -> None:
        self.taken_bytes += size
        own = self.of_identity.get(identity, 0) + size
        if own:
            self.of_identity[identity] = own
        else:
            del self.of_identity[identity]

    def has_room(self, identity: str, size: int, *, is_lone: bool) -> bool:
        """A lone answer of an identity always has. Of its connections, one that is stuck does not stop the others."""
        own = self.of_identity.get(identity, 0)
        if not own:
            return True
        return (is_lone or own + size <= self.limit_bytes // _PART) and self.taken_bytes + size <= self.limit_bytes


class Sending:
    """What of it one connection has. Its calls wait in a queue: one is let on at a time, and lets on the next."""

    def __init__(self, whole: SendBudget, identity: str, engine: Http2) -> None:
        self._whole = whole
        self._identity = identity
        self._engine = engine
        self.is_choked = False
        """Whether the client does not read what it was sent."""
        self._taken_bytes = 0
        self._queue: deque[asyncio.Future[None]] = deque()

    def take(self, size: int) -> None:
        """For what is there already."""
        self._taken_bytes += size
        self._whole.add(self._identity, size)

    def give(self, size: int) -> None:
        self._taken_bytes -= size
        self._whole.add(self._identity, -size)
        for sending in list(self._whole.waiting):
            sending.let_on()

    async def take_room(self, most_bytes: int, least_bytes: int) -> int:
        """Waits until the connection can take something, and takes as much of it as there is: at most, and at least
        where it is a whole answer that will be made.
        """
        # Not before those that wait.
        size = 0 if self._queue else self._room(most_bytes, least_bytes)
        while not size:
            turn = asyncio.get_running_loop().create_future()
            self._queue.append(turn)
            self._whole.waiting.add(self)
            try:
                await turn
            except asyncio.CancelledError:
                self.let_on()
                raise
            size = self._room(most_bytes, least_bytes)
        self.take(size)
        self.let_on()
        return size

    def let_on(self) -> None:
        """One of those that wait, when something has changed for the better."""
        queue = self._queue
        while queue and (queue[0].done() or self._room(1, 1)):
            turn = queue.popleft()
            if not turn.done():  # else it was cancelled
                turn.set_result(None)
                break
        if not queue:
            self._whole.waiting.discard(self)

    def _room(self, most_bytes: int, least_bytes: int) -> int:
        # What is taken already will go first.
        window = self._engine.window - self._taken_bytes - OVERHEAD_BYTES
        if window <= 0 or self.is_choked:
            return 0
        size = max(least_bytes, min(most_bytes, window))
        return size if self._whole.has_room(self._identity, size, is_lone=not self._taken_bytes) else 0
