"""The log, written by runs of a worker."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

from tests.support.waiting import eventually
from worker_svc.config import LogConfig
from worker_svc.job import JobState, Transition
from worker_svc.telemetry import Log, TransitionLog, set_up_log

ME, OTHER = "aaaa1111bbbb2222", "cccc3333dddd4444"


class Run:
    """One life of a worker, as far as its log goes."""

    def __init__(self, log: Log, transitions: TransitionLog, added: list[Transition]) -> None:
        self._added = added
        self.log = log
        self.transitions = transitions

    async def write(self, batch: Sequence[Transition]) -> None:
        self._added += batch
        self.transitions.add(batch)
        await eventually(lambda: self.transitions.sequence >= batch[-1].sequence)


@asynccontextmanager
async def run(
    folder: Path,
    worker_id: str = ME,
    log_format: Literal["json", "console"] = "json",
    *,
    recorded: Sequence[Transition] = (),
    level: Literal["info", "error"] = "info",
) -> AsyncIterator[Run]:
    """`recorded`: what the store has when it starts."""
    added: list[Transition] = []

    def read(after: int, limit: int) -> list[Transition]:
        return [moved for moved in (*recorded, *added) if moved.sequence > after][:limit]

    log = set_up_log(LogConfig(file=folder / "worker.log", format=log_format, level=level))
    latest = recorded[-1].sequence if recorded else 0
    transitions = log.transitions(folder / worker_id, worker_id, read, latest)
    task = asyncio.create_task(transitions.run())
    try:
        await eventually(lambda: transitions.sequence >= latest)
        yield Run(log, transitions, added)
    finally:
        task.cancel()
        log.close()


def moves(first: int, last: int, job_id: str = "j") -> list[Transition]:
    return [Transition(number, job_id, number, JobState.NEW, JobState.QUEUED) for number in range(first, last + 1)]


def logged(folder: Path, worker_id: str = ME) -> list[int]:
    """The sequence numbers in the log, in the order they stand there; lines that are no JSON left out."""
    found = []
    for text in (folder / "worker.log").read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if line["event"] == "job.transition" and line["worker"] == worker_id:
            found.append(line["sequence"])
    return found
