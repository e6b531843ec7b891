"""Long reads of the store: in a thread, so that the loop goes on, and in turn, so that nobody holds up others."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

from worker_svc.linux.threads import ready_pool
from worker_svc.record.reader import StoreReader

_T = TypeVar("_T")


class LongReads:
    """Whatever may take long is done in steps of a few milliseconds, one step at a time in the whole worker, client by
    client: one with a hundred listings and watches waits for its own, others for one step of its."""

    def __init__(self, state_dir: str) -> None:
        self._state_dir = state_dir
        self._thread = ready_pool(1, "reads")
        self._reader: StoreReader | None = None
        self._is_taken = False
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        """By client, the next one first."""

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        if self._reader is not None:
            self._reader.close()

    @contextlib.asynccontextmanager
    async def step(self, client: str) -> AsyncIterator[None]:
        """One step is all that is done within; nothing in it may wait for a client."""
        if self._is_taken:
            mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(client, deque()).append(mine)
            try:
                await mine
            except asyncio.CancelledError:
                if not mine.cancelled():  # it was ours already
                    self._pass_on()
                raise
        self._is_taken = True
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        while self._waiting:
            client = next(iter(self._waiting))
            line = self._waiting.pop(client)
            following = line.popleft()
            if line:
                self._waiting[client] = line  # behind all others
            if not following.done():  # else it was cancelled
                following.set_result(None)
                return
        self._is_taken = False

    async def pause(self, client: str) -> None:
        """Between pieces of work of a few milliseconds that no step holds."""
        async with self.step(client):
            await asyncio.sleep(0)

    async def read(self, query: Callable[[StoreReader], _T]) -> _T:
        """Within a step. Raises sqlite3.Error, StoreError."""

        def run() -> _T:
            if self._reader is None:
                self._reader = StoreReader(self._state_dir)
            return query(self._reader)

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)

    async def read_in_turn(self, client: str, query: Callable[[StoreReader], _T]) -> _T:
        """What is a step by itself. Raises as `read`."""
        async with self.step(client):
            return await self.read(query)
