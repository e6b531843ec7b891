"""The gRPC adapters of the Worker service: message → call → message, and errors → statuses in one place."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

from worker_svc import __version__
from worker_svc.access.guard import CALL, Call, Gate, GuardedService
from worker_svc.access.policy import CommandPolicy, Decision, LookupThreads
from worker_svc.access.roles import Role
from worker_svc.batches import Batches, Needs
from worker_svc.feed import Feed, unreadable
from worker_svc.ipc import messages as ipc
from worker_svc.job import (
    DeadlineExceeded,
    InvalidArgument,
    JobExists,
    JobNotFound,
    JobRecord,
    JobSpec,
    JobState,
    OutOfRange,
    PermissionDenied,
    PreconditionFailed,
    Transition,
    Unavailable,
    check_job_id,
    name_of,
)
from worker_svc.job_files import JobFiles
from worker_svc.link import NoAnswer, SupervisorLink
from worker_svc.listing import Listing
from worker_svc.output import OutputReader
from worker_svc.output import Start as OutputStart
from worker_svc.pb import jobscheduler as pb
from worker_svc.reading import LongReads
from worker_svc.record.excess import KeepLimits
from worker_svc.record.reader import StoreReader
from worker_svc.record.schema import FinishedRow
from worker_svc.wire import messages
from worker_svc.wire.codec import Encoded
from worker_svc.wire.messages.defaults import Defaults
from worker_svc.wire.statuses import to_grpc

_PRUNED: Final = "pruned"
_REPEATED: Final = "repeated request"
# Transitions that are told in one turn of the loop: a millisecond.
_WATCH_STEP: Final = 16
# A program on a file system that does not answer may be reached tomorrow: its caller need not wait for that.
START_ANSWER_S: Final = 5.0
# What an answer that tells of jobs is reckoned to take, until it is made.
_ANSWER_BYTES: Final = 256 * 1024


class WorkerFacts(NamedTuple):
    """What GetWorker tells that does not change while the worker runs, or only rarely."""

    host: str
    slots: int
    queue_length: int
    started_monotonic_s: float
    advertise_address: Callable[[], str]
    log_state: Callable[[], pb.LogState]
    scheduler_worker_id: Callable[[], str]


class WorkerService(GuardedService):
    def __init__(
        self,
        state_dir: Path,
        link: SupervisorLink,
        reader: StoreReader,
        reads: LongReads,
        feed: Feed,
        output: OutputReader,
        defaults: Mapping[str, Defaults],
        identity: WorkerFacts,
        gate: Gate,
        policy: CommandPolicy,
    ) -> None:
        super().__init__(gate)
        self._policy = policy
        self._lookups = LookupThreads()
        self._files = JobFiles(str(state_dir))
        self._link = link
        self._reader = reader
        self._feed = feed
        self._output = output
        self._defaults = defaults
        """By role."""
        self._identity = identity
        self._reads = reads
        self._listing = Listing(reads, self._files.of)
        places = identity.slots + identity.queue_length
        self._batches = Batches(Needs(self.one_of_many, feed, reader, reads, self._files.of, self._whole, places))

    def _is_owned(self, job_id: str, owner: str) -> bool:
        return self._reader.is_owned(job_id, owner)

    def _denial_of(self, call: Call, request: Any) -> Decision | None:
        if not isinstance(request, pb.StopJobReq) or request.grace is None:
            return None
        return self._policy.denial_of_grace(call.role_label, request.grace.total_seconds())

    # The original RPCs

    async def start_job(self, message: pb.StartJobReq) -> pb.StartJobRes:
        messages.check_start_size(message)
        owner = CALL.get().caller.identity
        fingerprint = messages.fingerprint_of(message)
        if message.job_id:
            known = self._reader.ever_known(message.job_id)
            if known is not None and (known.owner, known.fingerprint) == (owner, fingerprint):
                # What was decided once is not judged again: policy, files and limits may be others by now.
                await CALL.get().allow(message.job_id, _REPEATED)
                with contextlib.suppress(JobNotFound):  # deleted meanwhile: this one is new
                    secrets = messages.secrets_from(message).pack()
                    return await self._start(ipc.Start(message.job_id, fingerprint, owner, secrets=secrets))
        start = messages.start_from(message, self._defaults[CALL.get().role_label])
        job_id = message.job_id or str(uuid.uuid4())
        text = (await self._allowed(job_id, start.spec)).to_text()
        secrets = start.secrets.pack()
        is_new = not message.job_id
        return await self._start(ipc.Start(job_id, fingerprint, owner, is_new, text.encode(), start.stdin, secrets))

    async def _start(self, request: ipc.Start) -> pb.StartJobRes:
        job_id = request.job_id
        try:
            answer = await self._link.ask(request, ipc.Started, patience_s=START_ANSWER_S)
        except JobExists as error:
            raise self._taken(job_id) or error from None
        except NoAnswer as silence:
            self._check_is_starting(job_id, silence)
            return pb.StartJobRes(job_id=job_id, state=pb.JobState(JobState.STARTING))
        return pb.StartJobRes(job_id=job_id, state=pb.JobState(answer.state), existed=answer.existed)

    def _check_is_starting(self, job_id: str, silence: NoAnswer) -> None:
        """Raises Unavailable where it is not the program that keeps the supervisor from answering."""
        record = self._reader.get(job_id)
        if record is None or record.owner != CALL.get().caller.identity or record.state is not JobState.STARTING:
            raise Unavailable(f"{silence}; ask again, for the job id {job_id}, and it starts once")

    def _taken(self, job_id: str) -> JobExists | None:
        """What an admin may be told of an id that is taken: whose job it is. To others every id is taken in one way."""
        caller = CALL.get().caller
        owner = self._reader.owner_of(job_id) if caller.role is Role.ADMIN else None
        if owner in (None, caller.identity):
            return None
        return JobExists(f"job_id: belongs to a job of {owner or 'nobody'}: choose another id")

    async def _allowed(self, job_id: str, spec: JobSpec) -> JobSpec:
        """With the files that the policy has looked at. Raises PermissionDenied, naming the rule."""
        call = CALL.get()
        call.is_about(job_id)
        judged = self._policy.judge_request(call.role_label, spec)
        if judged is None:
            judge = partial(self._policy.judge_files, call.role_label, spec)
            judged = await self._lookups.run(
                call.caller.identity, " ".join(map(name_of, filter(None, (spec.command, spec.path)))), judge
            )
        if not judged.decision.allowed:
            call.deny(job_id, judged.decision.rule, **call.told(spec))
            raise PermissionDenied(f"{judged.decision.reason} ({judged.decision.rule})")
        await call.allow(job_id, judged.decision.rule, **call.told(spec))
        if judged.problem:
            raise PreconditionFailed(judged.problem)
        return spec._replace(checked=judged.checked, cwd=judged.cwd or spec.cwd)

    async def stop_job(self, message: pb.StopJobReq) -> pb.StopJobRes:
        check_job_id(message.job_id)
        number = messages.signal_from("signal", message.signal, 0)
        grace_s = messages.seconds_from("grace", message.grace, -1.0)
        stop = ipc.Stop(message.job_id, CALL.get().owner, number or None, None if grace_s < 0 else grace_s)
        with self._end_of(message.job_id) as end:
            await self._ask(stop)
            if message.wait and self._record(message.job_id).state is not JobState.FINISHED:
                self._lasts()
                await end
        return pb.StopJobRes()

    async def query_job(self, message: pb.QueryJobReq) -> pb.QueryJobRes:
        await CALL.get().room.take_room(_ANSWER_BYTES)
        record = await self._whole(self._record(message.job_id))
        return messages.query_message(CALL.get().shown(record), self._files.of(record), time.monotonic_ns())

    # Ours

    async def list_jobs(self, message: pb.ListJobsReq) -> Encoded:  # type: ignore[override]
        return await self._listing.page(CALL.get(), message)

    async def watch_jobs(self, message: pb.WatchJobsReq) -> AsyncIterator[pb.JobTransition]:
        for job_id in message.job_ids:
            check_job_id(job_id, "job_ids")
        # The store's latest, since the feed may still be about to read what a client knows already from an answer.
        latest = self._reader.sequence()
        if message.from_sequence > latest + 1:
            raise OutOfRange(f"from_sequence: {message.from_sequence} is beyond the latest, {latest}")
        ids, call = frozenset(message.job_ids), CALL.get()
        client, owner = call.caller.identity, call.owner

        def is_wanted(moved: Transition) -> bool:
            return (not ids or moved.job_id in ids) and owner in (None, moved.owner)

        self._lasts()
        async for batch in self._feed.since(message.from_sequence or latest + 1, client, is_wanted):
            for number, moved in enumerate(batch, 1):
                yield messages.transition_message(moved._replace(reason=call.shown_reason(moved.reason, moved.owner)))
                if number % _WATCH_STEP == 0:
                    await self._reads.pause(client)

    async def wait_job(self, message: pb.WaitJobReq) -> pb.WaitJobRes:
        timeout_s = messages.seconds_from("timeout", message.timeout, 0.0)
        with self._end_of(message.job_id) as end:
            if self._record(message.job_id).state is not JobState.FINISHED:
                await self._wait_end(end, message.job_id, timeout_s)
            await CALL.get().room.take_room(_ANSWER_BYTES)
            record = await self._whole(self._record(message.job_id))
        shown = CALL.get().shown(record)
        return pb.WaitJobRes(job=messages.job_message(shown, self._files.of(record), time.monotonic_ns()))

    async def _wait_end(self, end: asyncio.Future[None], job_id: str, timeout_s: float) -> None:
        self._lasts()
        try:
            async with asyncio.timeout(timeout_s or None):
                await end
        except TimeoutError:
            state = self._record(job_id).state
            raise DeadlineExceeded(f"the job is {state.name} after {timeout_s:g} s") from None

    async def signal_job(self, message: pb.SignalJobReq) -> pb.SignalJobRes:
        check_job_id(message.job_id)
        if not message.signal:
            raise InvalidArgument("signal", "must not be empty: name one, such as SIGUSR1")
        number = messages.signal_from("signal", message.signal, 0)
        await self._ask(ipc.SendSignal(message.job_id, CALL.get().owner, number))
        return pb.SignalJobRes()

    async def pause_job(self, message: pb.PauseJobReq) -> pb.PauseJobRes:
        check_job_id(message.job_id)
        await self._ask(ipc.Pause(message.job_id, CALL.get().owner))
        return pb.PauseJobRes()

    async def resume_job(self, message: pb.ResumeJobReq) -> pb.ResumeJobRes:
        check_job_id(message.job_id)
        await self._ask(ipc.Resume(message.job_id, CALL.get().owner))
        return pb.ResumeJobRes()

    async def delete_job(self, message: pb.DeleteJobReq) -> pb.DeleteJobRes:
        check_job_id(message.job_id)
        await self._ask(ipc.Delete(message.job_id, CALL.get().owner))
        return pb.DeleteJobRes()

    async def prune_jobs(self, message: pb.PruneJobsReq) -> pb.PruneJobsRes:
        if message.max_age is None and message.max_count is None and message.max_bytes is None:
            raise InvalidArgument("max_age", "or max_count or max_bytes must be given: else nothing is too much")
        age_s = None if message.max_age is None else messages.seconds_from("max_age", message.max_age, 0.0)
        limits = KeepLimits(age_s, message.max_count, message.max_bytes)
        answer = pb.PruneJobsRes()
        async with contextlib.aclosing(self._listing.excess(CALL.get(), limits)) as excess:
            async for row in excess:
                if message.dry_run or await self._prune(row):
                    answer.jobs += 1
                    answer.bytes += row.stored_bytes
                    if answer.jobs <= messages.LIST_PAGE_MAX:
                        answer.job_ids.append(row.job_id)
        return answer

    async def _prune(self, row: FinishedRow) -> bool:
        call = CALL.get()
        await call.allow(row.job_id, _PRUNED)
        try:
            await self._ask(ipc.Delete(row.job_id, call.owner, remember=True))
        except JobNotFound as error:  # retention or another client was faster
            call.fail(to_grpc(error).status.name)
            return False
        return True

    async def stream_job(self, message: pb.StreamJobReq) -> AsyncIterator[pb.OutputChunk]:
        record = self._record(message.job_id)
        path = self._files.stream_path(record, message.stream)
        start = OutputStart(message.offset, message.tail_bytes, message.tail_lines)
        final_size = asyncio.create_task(self._final_size(record, path))
        self._lasts()
        try:
            chunks = self._output.stream(
                path, start=start, follow=message.follow, final_size=final_size, room=CALL.get().room
            )
            async with contextlib.aclosing(chunks):
                async for chunk in chunks:
                    yield pb.OutputChunk(offset=chunk.offset, data=chunk.data, gap_bytes=chunk.gap_bytes)
        finally:
            if not final_size.cancel() and not final_size.cancelled():
                final_size.exception()  # seen: a stream that had all it wanted does not ask

    async def shutdown_worker(self, message: pb.ShutdownWorkerReq) -> pb.ShutdownWorkerRes:
        answer = await self._link.shut_down(stop_jobs=message.stop_jobs)
        return pb.ShutdownWorkerRes(jobs=answer.jobs)

    async def get_worker(self, message: pb.GetWorkerReq) -> pb.GetWorkerRes:
        status = await self._link.ask(ipc.GetStatus(), ipc.Status, patience_s=START_ANSWER_S)
        owner = CALL.get().owner
        if owner is not None:
            running, queued = await self._reads.read_in_turn(owner, lambda reader: reader.live_of(owner))
            status = status._replace(running=running, queued=queued)
        return messages.worker_message(
            status,
            worker_id=self._link.info.state_id,
            scheduler_worker_id=self._identity.scheduler_worker_id(),
            version=__version__,
            host=self._identity.host,
            advertise_address=self._identity.advertise_address(),
            log=self._identity.log_state(),
            slots=self._identity.slots,
            queue_length=self._identity.queue_length,
            uptime=timedelta(seconds=time.monotonic() - self._identity.started_monotonic_s),
            draining=self.is_draining or status.is_shutting_down,
        )

    # Many jobs in one call

    async def run_jobs(self, messages: AsyncIterator[pb.RunJobsReq]) -> AsyncIterator[Encoded]:  # type: ignore[override]
        self._lasts()
        async with contextlib.aclosing(self._batches.run(messages)) as replies:  # type: ignore[type-var]
            async for reply in replies:
                yield reply

    async def start_jobs(self, message: pb.StartJobsReq) -> Encoded:  # type: ignore[override]
        return await self._batches.start(message)

    async def query_jobs(self, message: pb.QueryJobsReq) -> Encoded:  # type: ignore[override]
        return await self._batches.query(message)

    async def stop_jobs(self, message: pb.StopJobsReq) -> Encoded:  # type: ignore[override]
        if any(stop.wait for stop in message.stops):
            self._lasts()
        return await self._batches.stop(message)

    # What they have in common

    def _record(self, job_id: str) -> JobRecord:
        check_job_id(job_id)
        record = self._reader.get(job_id)
        # The guard has looked whose it is; after a wait it may be another job of this id.
        if record is None or CALL.get().owner not in (None, record.owner):
            raise JobNotFound
        return record

    async def _whole(self, record: JobRecord) -> JobRecord:
        """With all of its spec. A large one is read in the thread of the listings, one by one."""
        if not record.is_brief:
            return record
        read_whole = partial(StoreReader.get, job_id=record.job_id, whole=True)
        whole = await self._reads.read_in_turn(CALL.get().caller.identity, read_whole)
        if whole is None or whole.ordinal != record.ordinal:
            raise JobNotFound
        return whole

    async def _ask(self, request: ipc.OfJob) -> None:
        """Asks for something to be done with one job."""
        await self._link.ask(request, ipc.Done)

    @contextlib.contextmanager
    def _end_of(self, job_id: str) -> Iterator[asyncio.Future[None]]:
        """Done when the job is finished, if that is news: first ask for this, then look at the record."""
        check_job_id(job_id)
        end = self._feed.end_of(job_id)
        try:
            yield end
        finally:
            self._feed.forget(job_id, end)

    async def _final_size(self, record: JobRecord, path: Path) -> int | None:
        """Returns once the job is finished, at once if it is. Raises JobNotFound, Unavailable."""
        try:
            with self._end_of(record.job_id) as end:
                current = self._reader.get(record.job_id)
                if current is not None and current.state is not JobState.FINISHED:
                    await end
                    current = self._reader.get(record.job_id)
        except sqlite3.Error as error:
            raise Unavailable(unreadable(error)) from error
        if current is None:
            raise JobNotFound("the job was deleted")
        return current.stderr_size_bytes if path.suffix == ".err" else current.output_size_bytes
