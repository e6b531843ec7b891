"""Each transition as one line of the log, in order; across restarts once."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from structlog.typing import FilteringBoundLogger

from worker_svc.job import JobState, Outcome, Transition, signal_name
from worker_svc.telemetry.cursor import LINES_MAX, Cursor
from worker_svc.telemetry.writer import Lines, LogWriter

# Made at once, some 2 ms: others get their turn in between, also where the log is far behind.
_PAGE: Final = min(32, LINES_MAX)
_RETRY_S: Final = 1.0


class TransitionLog:
    def __init__(
        self,
        log: FilteringBoundLogger,
        lines: FilteringBoundLogger,
        writer: LogWriter,
        state_dir: Path,
        worker_id: str,
        read: Callable[[int, int], Sequence[Transition]],
        latest: int,
    ) -> None:
        """`lines` makes lines, as bytes, which the writer then writes. `read` gives at most so many transitions after a
        sequence number; `latest` is the store's last. Raises OSError."""
        self._log = log
        self._lines = lines.bind(worker=worker_id)
        self._writer = writer
        self._read = read
        self._cursor = Cursor(state_dir, worker_id)
        self._cursor.resolve(writer.file.open_again)
        self._latest = latest
        """That the store is known to have."""
        if self._cursor.sequence > latest:
            log.warning(
                "log.cursor_repaired",
                cursor=self._cursor.sequence,
                latest=latest,
                reason="it was beyond the store's last transition: those after that are logged",
            )
            with contextlib.suppress(OSError):  # told when the next note cannot be written
                self._cursor.settle(latest)
        if self._cursor.lost_lines:
            log.warning("log.lines_lost", lines=self._cursor.lost_lines, reason="held back when the last worker ended")
            self._cursor.lost_lines = 0
        self._in_flight = 0
        self.sequence = self._cursor.sequence
        """The last transition that was logged."""
        self._rung = asyncio.Event()
        self._rung.set()
        self._is_caught_up = asyncio.Event()

    def add(self, batch: Sequence[Transition]) -> None:
        """These are there to be read."""
        self._latest = max(self._latest, batch[-1].sequence)
        self._is_caught_up.clear()
        self._rung.set()

    async def run(self) -> None:
        """Logs what is added, and before that what the store has and the log has not; until cancelled."""
        is_told = False
        while True:
            await self._rung.wait()
            self._rung.clear()
            while self.sequence < self._latest:
                try:
                    batch = self._read(self.sequence, _PAGE)
                except sqlite3.Error as error:
                    if not is_told:
                        self._log.warning("log.transitions_unread", reason=str(error), retry_in_s=_RETRY_S)
                    is_told = True
                    await asyncio.sleep(_RETRY_S)
                    continue
                is_told = False
                await self._write(batch)
            self._is_caught_up.set()

    async def finish(self, timeout_s: float) -> None:
        """Until all is logged; if that takes longer, or nothing can be now, the next worker logs the rest."""
        if not (self._writer.problem or self._writer.is_stalled):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._is_caught_up.wait(), timeout_s)

    async def _write(self, batch: Sequence[Transition]) -> None:
        first = batch[0].sequence if batch else self._latest + 1
        if first > self.sequence + 1:
            self._log.warning("log.transitions_missing", first=self.sequence + 1, last=first - 1)
            self.sequence = first - 1
        made: list[Any] = [self._lines.info("job.transition", **fields_of(moved)) for moved in batch]
        if None in made:  # the level leaves such lines out
            first, made = first + len(made), []
        lines = Lines(made, self._cursor, first)
        self._in_flight = len(made)
        await self._writer.done(self._writer.enqueue(lines))
        self._in_flight = 0
        self.sequence = first - 1 + lines.written
        if lines.written < len(made):  # nobody reads the log; somebody may later
            await asyncio.sleep(_RETRY_S)

    def close(self) -> None:
        """After the writer: what it still holds back nobody will write."""
        lost_lines = self._writer.held_lines - self._in_flight
        if lost_lines > 0:
            with contextlib.suppress(OSError):  # then the disk of the state is full too, and nothing more can be done
                self._cursor.take_leave(lost_lines)
        self._cursor.close()


def fields_of(moved: Transition) -> dict[str, Any]:
    """A transition's line: only what applies to it, durations in seconds."""
    fields: dict[str, Any] = {
        "sequence": moved.sequence,
        "job_id": moved.job_id,
        "from_state": moved.from_state.name,
        "to_state": moved.to_state.name,
        "at_ns": moved.at_ns,
    }
    if moved.pid:
        fields["pid"] = moved.pid
    if moved.to_state is JobState.FINISHED and moved.outcome is not Outcome.NONE:
        fields["outcome"] = moved.outcome.name
    if moved.exit_code is not None:
        fields["exit_code"] = moved.exit_code
    if moved.signal is not None:
        fields["signal"] = signal_name(moved.signal)
    if moved.reason:
        fields["reason"] = moved.reason
    for name, ns in (("queued_s", moved.queued_ns), ("wall_s", moved.wall_ns), ("cpu_s", moved.cpu_ns)):
        if ns is not None:
            fields[name] = round(ns / 1e9, 6)
    return fields
