"""A job's output to this process's own, byte by byte."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from typing import IO, TYPE_CHECKING

from worker_svc.cli.console import complain, what_was_lost
from worker_svc.cli.render import human_size

if TYPE_CHECKING:
    from worker_svc.pb.jobscheduler import OutputChunk


def write(target: IO[bytes], data: bytes) -> None:
    """At once and whole; BrokenPipeError when nobody reads any more, CannotWrite when it is lost."""
    target.write(data)
    target.flush()
    lost = what_was_lost(target)
    if lost is not None:
        raise lost


def gap_text(chunk: OutputChunk) -> str:
    last = chunk.offset + chunk.gap_bytes - 1
    return f"bytes {chunk.offset} to {last} are gone ({human_size(chunk.gap_bytes)})"


async def copy(chunks: AsyncIterator[OutputChunk], command: str) -> None:
    """To standard output; gaps are reported on standard error."""
    async for chunk in chunks:
        if chunk.gap_bytes:
            complain(command, gap_text(chunk))
        else:
            write(sys.stdout.buffer, chunk.data)
