"""What is asked about many jobs: done in steps, between which others get their turn, and with which it ends when the
caller leaves; bounded, whatever there is."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import Final

from worker_svc.access.guard import Call
from worker_svc.job import JobRecord, check_labels
from worker_svc.pb import jobscheduler as pb
from worker_svc.reading import LongReads
from worker_svc.record.excess import KeepLimits, Kept, excess
from worker_svc.record.query import FoundJobs, JobQuery
from worker_svc.record.reader import StoreReader
from worker_svc.record.schema import FinishedRow
from worker_svc.wire import messages
from worker_svc.wire.codec import Encoded, encode

# A step of a listing: read in the thread for it, then told in one turn of the loop; some milliseconds each.
_STEP_JOBS: Final = 16
_STEP_BYTES: Final = 256 * 1024
_STEPS_MAX: Final = 80
# But for a single job's, whose spec may have more: below the 4 MiB that gRPC clients take by default, all the same.
_PAGE_MAX_BYTES: Final = 2 * 1024 * 1024
# Rows that have only what retention must know.
_STEP_ROWS: Final = 256


class Listing:
    def __init__(self, reads: LongReads, files_of: Callable[[JobRecord], messages.OutputFiles]) -> None:
        self._reads = reads
        self._files_of = files_of

    async def page(self, call: Call, message: pb.ListJobsReq) -> Encoded:
        size, view = messages.page_size_from(message.page_size), messages.view_from(message.view)
        check_labels(message.labels)
        call.check_filter(message.labels)
        query = JobQuery(
            states=messages.states_from(message.states),
            labels=message.labels,
            accepted_since_ns=messages.ns_from(message.accepted_since),
            accepted_before_ns=messages.ns_from(message.accepted_before),
            owner=call.owner,
        )
        await call.room.take_room(_PAGE_MAX_BYTES // 4)
        below, jobs, page = messages.page_token_from(message.page_token), 0, bytearray()
        for _ in range(_STEPS_MAX):
            async with self._reads.step(call.caller.identity):
                found, part = await self._step(call, query, below, min(_STEP_JOBS, size - jobs), view)
            if jobs and len(page) + len(part) > _PAGE_MAX_BYTES:
                break
            page += part
            jobs, below = jobs + len(found.records), found.below
            if below is None or jobs >= size:
                break
        page += encode(pb.ListJobsRes(next_page_token="" if below is None else str(below)))
        return Encoded(pb.ListJobsRes, bytes(page))

    async def _step(
        self, call: Call, query: JobQuery, below: int | None, limit: int, view: pb.JobView
    ) -> tuple[FoundJobs, bytes]:
        """The next jobs, and the part of the page that they are."""
        whole = view == pb.JobView.FULL
        found = await self._reads.read(lambda reader: reader.find(query, below, limit, _STEP_BYTES, whole=whole))
        now_ns = time.monotonic_ns()
        jobs = [messages.job_message(call.shown(one), self._files_of(one), now_ns, view) for one in found.records]
        return found, encode(pb.ListJobsRes(jobs=jobs))

    async def excess(self, call: Call, limits: KeepLimits) -> AsyncGenerator[FinishedRow, None]:
        """The finished jobs that are too much, oldest first."""
        client, owner = call.caller.identity, call.owner
        now_ns = await self._reads.read_in_turn(client, StoreReader.steady_ns)
        kept = Kept(*await self._reads.read_in_turn(client, lambda reader: reader.finished_totals(owner)))
        last: FinishedRow | None = None
        while True:
            oldest = partial(StoreReader.oldest_finished, limit=_STEP_ROWS, after=last, owner=owner)
            gone = excess(kept, await self._reads.read_in_turn(client, oldest), limits, now_ns)
            kept = Kept(kept.jobs - len(gone), kept.bytes - sum(row.stored_bytes for row in gone))
            for row in gone:
                yield row
            if len(gone) < _STEP_ROWS:
                return
            last = gone[-1]
