"""Many jobs in one call. What handles a call for one job handles each of them; here is only what they share."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from enum import Enum, auto
from typing import Any, Final, NamedTuple

from grpclib.const import Status
from grpclib.exceptions import GRPCError

from worker_svc.access.guard import CALL, Call
from worker_svc.feed import Feed
from worker_svc.job import JobRecord, JobState, Outcome, Transition
from worker_svc.pb import jobscheduler as pb
from worker_svc.reading import LongReads
from worker_svc.record.reader import StoreReader
from worker_svc.wire import messages
from worker_svc.wire.codec import Encoded, encode

# Requests of one call that are handled side by side: so many share one transaction of the supervisor's.
_LANES: Final = 64
_IN_FLIGHT_MAX: Final = 4096
# What is done before others get their turn.
_STEP: Final = 16
# Results, and transitions, that are read and told together.
_TOLD_AT_ONCE: Final = 64
# Transitions that wait to be told, beyond which no more are read.
_UNTOLD_MAX: Final = 1024
_ANSWER_MAX_BYTES: Final = 2 * 1024 * 1024
_MESSAGE_BYTES: Final = 64 * 1024
_ID_TOLD_MAX: Final = 128

_FULL: Final = "the answer is full: ask again for this one"
_NO_ID: Final = "job_id: must be given: by it a start can be made again after a lost connection, and runs once"
_TWICE: Final = "job_id: is under way in this call already"


class Needs(NamedTuple):
    """What of the service the many have need of."""

    handle: Callable[[str, Any], Awaitable[Any]]
    """Handles one request as a call of this name; raises GRPCError."""
    feed: Feed
    reader: StoreReader
    reads: LongReads
    files_of: Callable[[JobRecord], messages.OutputFiles]
    whole: Callable[[JobRecord], Coroutine[Any, Any, JobRecord]]
    places: int
    """Jobs that can be in the worker at once, running and waiting."""


class Batches:
    def __init__(self, needs: Needs) -> None:
        self._needs = needs

    async def start(self, message: pb.StartJobsReq) -> Encoded:
        return await self._told(pb.StartJobsRes, await self._each("StartJob", message.starts, _LANES))

    async def stop(self, message: pb.StopJobsReq) -> Encoded:
        # One that waits for its end is not to keep others from being stopped.
        lanes = len(message.stops) if any(stop.wait for stop in message.stops) else _LANES
        return await self._told(pb.StopJobsRes, await self._each("StopJob", message.stops, lanes))

    async def query(self, message: pb.QueryJobsReq) -> Encoded:
        client, answer, is_full = CALL.get().caller.identity, bytearray(), False
        for number, job_id in enumerate(message.job_ids, 1):
            part = b""
            if not is_full:
                result = await _result(self._needs, "QueryJob", pb.QueryJobReq(job_id=job_id))
                part = encode(pb.QueryJobsRes(results=[result]))
                is_full = bool(answer) and len(answer) + len(part) > _ANSWER_MAX_BYTES
            if is_full:
                part = encode(pb.QueryJobsRes(results=[_failed(job_id, Status.RESOURCE_EXHAUSTED, _FULL)]))
            answer += part
            if number % _STEP == 0:
                await self._needs.reads.pause(client)
        return Encoded(pb.QueryJobsRes, bytes(answer))

    async def run(self, requests: AsyncIterator[pb.RunJobsReq]) -> AsyncIterator[Encoded]:
        run = _Run(self._needs, CALL.get())
        tasks = [asyncio.create_task(run.read(requests)), asyncio.create_task(run.follow())]
        tasks += [asyncio.create_task(run.start_some()) for _ in range(_LANES)]
        for task in tasks:
            task.add_done_callback(run.on_done)
        try:
            async for reply in run.replies():
                yield reply
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _told(self, reply: type[pb.StartJobsRes | pb.StopJobsRes], results: Sequence[pb.JobResult]) -> Encoded:
        data = bytearray()
        for at in range(0, len(results), _TOLD_AT_ONCE):
            data += encode(reply(results=[*results[at : at + _TOLD_AT_ONCE]]))
            await self._needs.reads.pause(CALL.get().caller.identity)
        return Encoded(reply, bytes(data))

    async def _each(self, name: str, requests: Sequence[Any], lanes: int) -> list[pb.JobResult]:
        results = [pb.JobResult()] * len(requests)
        client, todo = CALL.get().caller.identity, iter(enumerate(requests))

        async def lane() -> None:
            for number, request in todo:
                results[number] = await _result(self._needs, name, request)
                if number % _STEP == 0:
                    await self._needs.reads.pause(client)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(lanes, len(requests))):
                group.create_task(lane())
        return results


async def _result(needs: Needs, name: str, request: Any) -> pb.JobResult:
    try:
        answer = await needs.handle(name, request)
    except GRPCError as error:
        return _failed(request.job_id, error.status, error.message or "")
    if isinstance(answer, pb.StartJobRes):
        return pb.JobResult(job_id=answer.job_id, state=answer.state, existed=answer.existed)
    if isinstance(answer, pb.QueryJobRes):
        return pb.JobResult(job_id=request.job_id, job=answer.job)
    return pb.JobResult(job_id=request.job_id)


def _failed(job_id: str, status: Status, message: str) -> pb.JobResult:
    # What is no job id can be as long as a message.
    return pb.JobResult(job_id=job_id[:_ID_TOLD_MAX], code=status.value, message=message)


class _Stage(Enum):
    """How far a job is that has no result yet."""

    ASKED = auto()
    """Its start is not answered."""
    ENDED = auto()
    """Nor is it here, but the job has ended already."""
    STARTED = auto()


class _Run:
    """One call of RunJobs: a task reads requests, some start the jobs, one follows the feed for all of them, and the
    caller's own tells results. Jobs that are under way are known by their ids only: records are read when there is room
    to tell them."""

    def __init__(self, needs: Needs, call: Call) -> None:
        self._needs = needs
        self._call = call
        self._first_sequence = needs.reader.sequence() + 1
        self._in_flight_max = max(1, min(needs.places, _IN_FLIGHT_MAX))
        self._view = pb.JobView(pb.JobView.UNSPECIFIED)
        self._tells_transitions = False
        self._open = 0
        """Starts that were read and have no result that was sent."""
        self._starts: asyncio.Queue[pb.StartJobReq] = asyncio.Queue()
        self._under_way: dict[str, _Stage] = {}
        self._ended: deque[str] = deque()
        self._failures: deque[pb.JobResult] = deque()
        self._moves: deque[Transition] = deque()
        self._is_whole = False
        """Whether the client has sent all there is."""
        self._fault: BaseException | None = None
        self._has_news = asyncio.Event()
        self._has_room = asyncio.Event()

    def on_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self._fault = self._fault or task.exception()
            self._has_news.set()

    async def read(self, requests: AsyncIterator[pb.RunJobsReq]) -> None:
        is_first = True
        async for message in requests:
            if is_first:
                is_first = False
                self._view, self._tells_transitions = messages.view_from(message.view), message.transitions
                self._in_flight_max = min(message.in_flight or _IN_FLIGHT_MAX, self._in_flight_max)
            for start in message.starts:
                while self._open >= self._in_flight_max:
                    self._has_room.clear()
                    await self._has_room.wait()
                self._accept(start)
            await self._needs.reads.pause(
                self._call.caller.identity
            )  # a window holds thousands of messages without starts
        self._is_whole = True
        self._has_news.set()

    def _accept(self, start: pb.StartJobReq) -> None:
        self._open += 1
        job_id = start.job_id
        if not job_id:
            self._fail(_failed("", Status.INVALID_ARGUMENT, _NO_ID))
        elif job_id in self._under_way:
            self._fail(_failed(job_id, Status.ALREADY_EXISTS, _TWICE))
        else:
            # Before it is asked for: its transitions may be read before the answer is.
            self._under_way[job_id] = _Stage.ASKED
            self._starts.put_nowait(start)

    def _fail(self, result: pb.JobResult) -> None:
        self._failures.append(result)
        self._has_news.set()

    def _end(self, job_id: str) -> None:
        del self._under_way[job_id]
        self._ended.append(job_id)
        self._has_news.set()

    async def start_some(self) -> None:
        count, client = 0, self._call.caller.identity
        while True:
            start = await self._starts.get()
            result = await _result(self._needs, "StartJob", start)
            if result.code:
                del self._under_way[start.job_id]
                self._fail(result)
            elif result.state == pb.JobState.FINISHED or self._under_way[start.job_id] is _Stage.ENDED:
                self._end(start.job_id)
            else:
                self._under_way[start.job_id] = _Stage.STARTED
            count += 1
            if count % _STEP == 0:
                await self._needs.reads.pause(client)

    async def follow(self) -> None:
        identity = self._call.caller.identity

        def is_ours(moved: Transition) -> bool:
            return moved.job_id in self._under_way and moved.owner == identity

        async for batch in self._needs.feed.since(self._first_sequence, identity, is_ours):
            while len(self._moves) > _UNTOLD_MAX:
                self._has_room.clear()
                await self._has_room.wait()
            for moved in batch:
                self._follow_one(moved)

    def _follow_one(self, moved: Transition) -> None:
        stage = self._under_way.get(moved.job_id)
        if self._tells_transitions and stage is not None:
            self._moves.append(moved)
            self._has_news.set()
        if moved.to_state is not JobState.FINISHED:
            return
        if stage is _Stage.STARTED:
            self._end(moved.job_id)
        elif stage is _Stage.ASKED:
            self._under_way[moved.job_id] = _Stage.ENDED

    async def replies(self) -> AsyncIterator[Encoded]:
        while not self._is_whole or self._open:
            await self._has_news.wait()
            self._has_news.clear()
            if self._fault is not None:
                raise self._fault
            while self._moves or self._failures or self._ended:
                await self._call.room.take_room(_MESSAGE_BYTES)
                reply, told = await self._reply()
                if reply:
                    yield Encoded(pb.RunJobsRes, reply)
                self._call.room.give_room()
                self._open -= told
                self._has_room.set()

    async def _reply(self) -> tuple[bytes, int]:
        """Some of what there is to tell, and how many results that are."""
        moves = [self._moves.popleft() for _ in range(min(_TOLD_AT_ONCE, len(self._moves)))]
        if self._moves:  # those of a job come before its result
            return encode(pb.RunJobsRes(transitions=list(map(messages.transition_message, moves)))), 0
        results = [self._failures.popleft() for _ in range(min(_TOLD_AT_ONCE, len(self._failures)))]
        reply = bytearray(
            encode(pb.RunJobsRes(results=results, transitions=list(map(messages.transition_message, moves))))
        )
        told = len(results)
        job_ids = [self._ended.popleft() for _ in range(min(_TOLD_AT_ONCE, len(self._ended)))]
        records = self._needs.reader.get_all(job_ids) if job_ids else {}
        while job_ids and len(reply) < _MESSAGE_BYTES:
            job_id = job_ids.pop(0)
            record = records.get(job_id)
            if record is not None and record.state is not JobState.FINISHED:
                # What ended was another job of this id, deleted by now: this one will.
                self._under_way[job_id] = _Stage.STARTED
                continue
            part = encode(pb.RunJobsRes(results=[await self._result_of(job_id, record)]))
            if reply and len(part) > _MESSAGE_BYTES:  # a whole spec: it goes by itself
                job_ids.insert(0, job_id)
                break
            reply += part
            told += 1
        self._ended.extendleft(reversed(job_ids))
        return bytes(reply), told

    async def _result_of(self, job_id: str, record: JobRecord | None) -> pb.JobResult:
        if record is None or record.owner != self._call.caller.identity:
            return _failed(job_id, Status.NOT_FOUND, "the job has ended, and its record is gone")
        if self._view == pb.JobView.FULL:
            record = await self._needs.whole(record)
        shown, files = self._call.shown(record), self._needs.files_of(record)
        result = pb.JobResult(job_id=job_id, job=messages.job_message(shown, files, time.monotonic_ns(), self._view))
        if record.outcome is Outcome.START_FAILED:  # when it was not yet to be known as it was accepted, all the same
            result.code, result.message = Status.FAILED_PRECONDITION.value, shown.reason
        return result
