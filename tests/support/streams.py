"""Streams of output, by the real client."""

from __future__ import annotations

import asyncio
import os
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final

from tests.support.waiting import eventually
from tests.support.workers import PATIENCE_S, Worker
from worker_svc.client import WorkerClient
from worker_svc.pb.jobscheduler import OutputChunk

MIB: Final = 1 << 20


async def start(client: WorkerClient, argv: list[str], **options: Any) -> str:
    return (await client.start(argv[0], args=argv[1:], **options)).job_id


async def run(client: WorkerClient, argv: list[str], **options: Any) -> str:
    job_id = await start(client, argv, **options)
    await client.wait(job_id, PATIENCE_S)
    return job_id


async def collect(client: WorkerClient, job_id: str, **options: Any) -> list[OutputChunk]:
    async with asyncio.timeout(60):
        return [chunk async for chunk in client.output(job_id, **options)]


def joined(chunks: list[OutputChunk], at: int = 0) -> bytes:
    """The data of chunks that follow one on another."""
    for chunk in chunks:
        assert chunk.offset == at
        assert bool(chunk.data) != bool(chunk.gap_bytes)
        at += len(chunk.data) or chunk.gap_bytes
    return b"".join(chunk.data for chunk in chunks)


class Following:
    """A stream that is read as it comes, in a task of its own."""

    def __init__(self, client: WorkerClient, job_id: str, **options: Any) -> None:
        self.chunks: list[OutputChunk] = []
        self._task = asyncio.create_task(self._read(client.output(job_id, follow=True, **options)))

    async def _read(self, chunks: Any) -> None:
        async with aclosing(chunks):
            async for chunk in chunks:
                self.chunks.append(chunk)

    @property
    def data(self) -> bytes:
        return b"".join(chunk.data for chunk in self.chunks)

    async def until(self, data: bytes) -> None:
        await eventually(lambda: self._task.done() or self.data == data, PATIENCE_S)
        assert self.data == data
        assert not self._task.done()

    async def end(self) -> list[OutputChunk]:
        async with asyncio.timeout(PATIENCE_S):
            await self._task
        return self.chunks

    async def leave(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])


def held(worker: Worker, path: str) -> tuple[int, int]:
    """How often the worker has this file open, and how many inotify watches it has in all."""
    files = watches = 0
    for fd in Path(f"/proc/{worker.pid}/fd").iterdir():
        try:
            link = str(fd.readlink())
            files += link.removesuffix(" (deleted)") == path
            if "inotify" in link:
                watches += Path(f"/proc/{worker.pid}/fdinfo/{fd.name}").read_text().count("inotify wd:")
        except FileNotFoundError:
            continue
    return files, watches


# A job says what it is told to: each line of a fifo that the test writes.
class Teller:
    """A job whose every word is the test's: `tell` has it write, `end` has it exit."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / f"{name}.fifo"
        os.mkfifo(self.path)
        self.argv = ["sh", "-c", 'exec cat "$1"', "sh", str(self.path)]
        self._fd = -1

    def open(self) -> None:
        self._fd = os.open(self.path, os.O_RDWR)  # not to wait for the job

    def tell(self, data: bytes) -> None:
        os.write(self._fd, data)

    def end(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Teller:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.end()
        except OSError:
            return
