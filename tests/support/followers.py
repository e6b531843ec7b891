"""Followers of output files, without a worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from tests.support.output_files import joined
from tests.support.waiting import PATIENCE_S, eventually
from worker_svc.output import Chunk, OutputReader, Start

MIB = 1024 * 1024

FROM_ZERO = Start()


def finished(size: int) -> asyncio.Future[int]:
    future = asyncio.get_running_loop().create_future()
    future.set_result(size)
    return future


def running() -> asyncio.Future[int]:
    return asyncio.get_running_loop().create_future()


class Follower:
    """A task that collects a stream."""

    def __init__(self, reader: OutputReader, path: Path, final: asyncio.Future[int], start: Start = FROM_ZERO) -> None:
        self.chunks: list[Chunk] = []
        self.start = start.offset or 0
        stream = reader.stream(path, start=start, follow=True, final_size=final)
        self.task = asyncio.create_task(self._run(stream))

    async def _run(self, stream: AsyncIterator[Chunk]) -> None:
        async for chunk in stream:
            self.chunks.append(chunk)

    @property
    def data(self) -> bytes:
        return joined(self.chunks, self.start)

    async def has(self, data: bytes) -> None:
        await eventually(lambda: self.data == data)

    async def done(self) -> list[Chunk]:
        async with asyncio.timeout(PATIENCE_S):
            await self.task
        return self.chunks


@contextmanager
def counted_turns() -> Iterator[list[None]]:
    """One entry for each turn of the loop meanwhile."""
    selector = cast(Any, asyncio.get_running_loop())._selector
    select, turns = selector.select, list[None]()

    def counting(timeout: float | None = None) -> Any:
        turns.append(None)
        return select(timeout)

    selector.select = counting
    try:
        yield turns
    finally:
        del selector.select
