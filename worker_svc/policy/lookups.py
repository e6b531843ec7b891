"""Looks at files in threads, since a dead file system keeps whoever looks for ever."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, Final, TypeVar

from worker_svc.job import Unavailable

T = TypeVar("T")

_PATIENCE_S: Final = 10.0


class Lookups:
    """A thread each, which nobody waits for at the end of the process, and so many at once."""

    def __init__(self, most: int = 32) -> None:
        self._free = asyncio.Semaphore(most)

    async def run(self, look: Callable[[], T]) -> T:
        """Raises Unavailable when it takes too long."""
        try:
            async with asyncio.timeout(_PATIENCE_S):
                await self._free.acquire()
                return await self._start(look)
        except TimeoutError:
            raise Unavailable("the file system of the job's program does not answer: try again") from None

    def _start(self, look: Callable[[], T]) -> asyncio.Future[T]:
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()

        def settle(value: Any, error: BaseException | None) -> None:
            self._free.release()
            if result.done():
                return
            if error is None:
                result.set_result(value)
            else:
                result.set_exception(error)

        def run() -> None:
            value: Any = None
            failure: BaseException | None = None
            try:
                value = look()
            except BaseException as error:  # for the one who waits
                failure = error
            try:
                loop.call_soon_threadsafe(settle, value, failure)
            except RuntimeError:  # the loop is closed: whoever asked is gone
                return

        threading.Thread(target=run, name="policy", daemon=True).start()
        return result
