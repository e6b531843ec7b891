"""Who comes next: work that clients cause is done at once while they are modest, else in turn, client by client.

The loop has one thread. A client that keeps several connections busy would otherwise fill each of its turns with as
many pieces of work, and everybody else would wait for all of them. So each client has a share of the loop's time;
beyond it, a few pieces of work are done in each turn of the loop, one of each client in turn, between whatever else
there is to do. Nobody is held to the share while nobody else wants anything: turns of the loop follow each other at
once.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from worker_svc.token_bucket import TokenBucket

# The part of the loop's time, and how much of it at once: some ten calls, or ten connections.
_SHARE: Final = 0.2
_BURST_S: Final = 0.01

# What work that had to wait may take of one turn of the loop; what there is to read and to write comes between.
# A piece can begin a call, which goes on by itself, so their number is bounded too.
_TURN_S: Final = 0.001
TURN_PIECES: Final = 8

Work = Callable[[], None]


class _Client:
    __slots__ = ("bucket", "waiting")

    def __init__(self, now_s: float) -> None:
        self.bucket = TokenBucket(_SHARE, _BURST_S, now_s)
        """Seconds of the loop's."""
        self.waiting: deque[Work] = deque()


class Turns:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: in seconds."""
        self._clock = clock
        self._clients: dict[str, _Client] = {}
        self._ring: deque[_Client] = deque()
        """Those that have work waiting."""
        self._is_working = False
        self._next: asyncio.Handle | None = None

    def submit(self, client: str, work: Work) -> None:
        """`work` never raises; it may submit more, which is done in a later turn."""
        now_s = self._clock()
        known = self._clients.get(client)
        if known is None:
            known = self._clients[client] = _Client(now_s)
        if not known.waiting and not self._is_working and known.bucket.has(now_s):
            self._do(known, work, now_s)
            return
        if not known.waiting:
            self._ring.append(known)
        known.waiting.append(work)
        self._go_on()

    async def wait(self, client: str) -> None:
        """For a turn: to do one piece of work right after it."""
        it_is: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.submit(client, lambda: None if it_is.done() else it_is.set_result(None))
        await it_is

    def charge(self, client: str, seconds: float) -> None:
        """For what the client makes us do elsewhere."""
        known = self._clients.get(client)
        if known is not None:
            known.bucket.owe(seconds)

    def forget_quiet(self, now_s: float) -> None:
        for name, known in list(self._clients.items()):
            if not known.waiting and known.bucket.is_full(now_s):
                del self._clients[name]

    def __len__(self) -> int:
        return len(self._clients)

    def _go_on(self) -> None:
        if self._ring and self._next is None:
            self._next = asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        """A few pieces of work, one of each client in turn, until the turn's time is up."""
        self._next = None
        now_s = self._clock()
        until_s = now_s + _TURN_S
        try:
            for _ in range(TURN_PIECES):
                if not self._ring or now_s >= until_s:
                    break
                known = self._ring.popleft()
                work = known.waiting.popleft()
                if known.waiting:
                    self._ring.append(known)
                now_s = self._do(known, work, now_s)
        finally:
            self._go_on()

    def _do(self, known: _Client, work: Work, begun_s: float) -> float:
        """Returns what time it is then."""
        self._is_working = True
        try:
            work()
        finally:
            self._is_working = False
            now_s = self._clock()
            known.bucket.owe(now_s - begun_s)
        return now_s
