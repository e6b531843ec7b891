"""Transitions as they are read from the store: to the log, to watchers, and to those who wait for a job's end.

The supervisor's doorbell says up to where the store goes; reading on from where one is makes catching up and living
on the same thing.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Final

from worker_svc.job import JobState, Transition, Unavailable
from worker_svc.linux import failpoints
from worker_svc.record.reader import StoreReader

if TYPE_CHECKING:
    from worker_svc.reading import LongReads

# What is read and told in one turn of the loop.
_STEP: Final = 64
_TOLD_AT_ONCE: Final = 16
_RECENT_MAX: Final = 4096
# Pages of history, for all who read on at the same place.
_PAGE: Final = 256
_PAGES_MAX: Final = 8
_RETRY_S: Final = 1.0


def unreadable(reason: object) -> str:
    return f"the store cannot be read now: {reason}"


class Feed:
    def __init__(
        self,
        reader: StoreReader,
        reads: LongReads,
        after_sequence: int,
        on_batch: Callable[[Sequence[Transition]], None],
        on_event: Callable[..., None] = lambda event, **fields: None,
    ) -> None:
        """Reads on after `after_sequence`; each batch goes to `on_batch` first, exactly once and in order. `on_event`
        gets an event's name and its fields, for the log."""
        self._reader = reader
        self._reads = reads
        self._on_batch = on_batch
        self._on_event = on_event
        self._trouble = ""
        self.sequence = self._target = after_sequence
        """The latest transition read."""
        self._recent: deque[Transition] = deque(maxlen=_RECENT_MAX)
        self._pages: dict[int, Sequence[Transition]] = {}
        """Those that were read last, by the number that they come after."""
        self._rung = asyncio.Event()
        self._more: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ends: dict[str, dict[asyncio.Future[None], None]] = {}
        self._due: deque[asyncio.Future[None]] = deque()

    def ring(self, sequence: int) -> None:
        """The store goes up to `sequence`."""
        if sequence > self._target:
            self._target = sequence
            self._rung.set()

    async def run(self) -> None:
        """Reads whenever the bell rings, until cancelled."""
        while True:
            await self._rung.wait()
            self._rung.clear()
            while self.sequence < self._target:
                is_read = self._read_on()
                await asyncio.sleep(0 if is_read else _RETRY_S)  # others get their turn
                while self._due:
                    self._tell_some()
                    await asyncio.sleep(0)

    def _read_on(self) -> bool:
        """False: the store cannot be read now. Whoever waits is told, rather than left to wait for a dead disk."""
        try:
            batch = self._reader.events(self.sequence, _STEP)
        except sqlite3.Error as error:
            self._fail(str(error))
            return False
        if self._trouble:
            self._trouble = ""
            self._on_event("store.readable_again")
        self._take(batch)
        return True

    def _fail(self, reason: str) -> None:
        if reason != self._trouble:
            self._trouble = reason
            self._on_event("store.unreadable", reason=reason, retry_in_s=_RETRY_S)
        ends, self._ends = self._ends, {}
        more, self._more = self._more, asyncio.get_running_loop().create_future()
        for waiting in (more, *chain.from_iterable(ends.values())):
            if not waiting.done():
                waiting.set_exception(Unavailable(unreadable(reason)))
                waiting.exception()  # seen, also where nobody waits

    def _take(self, batch: Sequence[Transition]) -> None:
        if not batch:
            # Only retention removes events, and only such as were read long ago; a copied store might lack some.
            self.sequence = self._target
            return
        self._on_batch(batch)
        if failpoints.is_armed:
            failpoints.reach("batch-logged")
        self._recent.extend(batch)
        self.sequence = batch[-1].sequence
        for moved in batch:
            if moved.to_state is JobState.FINISHED:
                self._due += self._ends.pop(moved.job_id, ())
        more, self._more = self._more, asyncio.get_running_loop().create_future()
        more.set_result(None)

    def _tell_some(self) -> None:
        """Tells a few of those who wait, who are then answered: a thousand can wait for one job."""
        for _ in range(min(_TOLD_AT_ONCE, len(self._due))):
            end = self._due.popleft()
            if not end.done():
                end.set_result(None)

    def end_of(self, job_id: str) -> asyncio.Future[None]:
        """Done once a transition to FINISHED of this job is read. Ask before looking at the record, and `forget` it."""
        end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ends.setdefault(job_id, {})[end] = None
        return end

    def forget(self, job_id: str, end: asyncio.Future[None]) -> None:
        ends = self._ends.get(job_id, {})
        ends.pop(end, None)
        if not ends:
            self._ends.pop(job_id, None)

    async def since(
        self, sequence: int, client: str, wanted: Callable[[Transition], bool]
    ) -> AsyncIterator[Sequence[Transition]]:
        """Transitions from `sequence` on that are wanted, in batches, without end. Only its place in the row is held
        for a reader, and it takes its turns among the client's long reads."""
        after = sequence - 1
        while True:
            while after >= self.sequence:
                await asyncio.shield(self._more)
            async with self._reads.step(client):
                page = self._recent_after(after, _PAGE) or await self._page_after(after)
                batch = [moved for moved in page if wanted(moved)]
            after = page[-1].sequence if page else self.sequence
            if batch:
                yield batch

    def after(self, sequence: int, limit: int) -> Sequence[Transition]:
        """At most so many transitions after that one, at once. Raises sqlite3.Error."""
        return self._recent_after(sequence, limit) or self._reader.events(sequence, limit)

    def _recent_after(self, sequence: int, limit: int) -> Sequence[Transition]:
        if not self._recent or self._recent[0].sequence > sequence + 1:
            return ()
        skip = min(sequence + 1 - self._recent[0].sequence, len(self._recent))
        while skip and self._recent[skip - 1].sequence > sequence:  # a copied store might lack some
            skip -= 1
        return [self._recent[i] for i in range(skip, min(len(self._recent), skip + limit))]

    async def _page_after(self, sequence: int) -> Sequence[Transition]:
        page = self._pages.get(sequence)
        if page is None:
            # Up to where all pages end, so that those who began elsewhere go on with the same ones.
            limit = _PAGE - sequence % _PAGE
            page = await self._reads.read(lambda reader: reader.events(sequence, limit))
            if len(page) == limit and page[-1].sequence <= self.sequence:
                self._pages[sequence] = page
                if len(self._pages) > _PAGES_MAX:
                    del self._pages[next(iter(self._pages))]
        return [moved for moved in page if moved.sequence <= self.sequence]
