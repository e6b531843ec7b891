"""Many jobs over one stream, for `WorkerClient.run_many`: what was sent and has no result is sent again when the
connection was lost, under the same ids, so that each job runs once and has one result."""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable, Mapping
from contextlib import aclosing
from typing import Any, Final, NamedTuple, cast

from grpclib.const import Cardinality, Status
from grpclib.exceptions import GRPCError

from worker_svc.client.codec import ClientCodec
from worker_svc.client.fields import start_request
from worker_svc.job import InvalidArgument, JobError, Unavailable
from worker_svc.pb.jobscheduler import Job, JobView, Outcome, RunJobsReq, RunJobsRes, StartJobReq, WorkerStub
from worker_svc.wire.codec import LARGE_BYTES, Encoded
from worker_svc.wire.statuses import from_grpc

Spec = StartJobReq | Mapping[str, Any]
Specs = Iterable[Spec] | AsyncIterable[Spec]
Call = Callable[[AsyncIterator[Encoded]], AsyncGenerator[RunJobsRes, None]]

# Specs that are taken from who gives them before others get their turn.
_STEP: Final = 64
# More in one message than this, and the worker has to look at it for longer.
_MESSAGE_BYTES: Final = LARGE_BYTES - 16
_PATH: Final = "/jobscheduler.Worker/RunJobs"
_RETRY_S: Final = 0.1
_RETRY_MAX_S: Final = 2.0


class RunResult(NamedTuple):
    """What came of one of many jobs."""

    job_id: str
    job: Job | None
    """The finished job; None: there is none, as `error` says."""
    error: JobError | GRPCError | None
    """What `WorkerClient.start` would have raised."""

    @property
    def succeeded(self) -> bool:
        return self.job is not None and self.job.outcome == Outcome.SUCCEEDED


class ManyRuns:
    def __init__(self, specs: Specs, in_flight: int, view: JobView, patience_s: float) -> None:
        self._specs = specs
        self._in_flight = in_flight
        self._head = RunJobsReq(in_flight=in_flight, view=view)
        self._patience_s = patience_s
        self._codec = ClientCodec()
        self._untaken = 0
        """Specs that were taken, and whose results were not."""
        self._open: dict[str, bytes] = {}
        """Starts without a result, as they are sent."""
        self._unsent: deque[bytes] = deque()
        self._results: deque[RunResult] = deque()
        self._has_all = False
        self._has_news = asyncio.Event()
        self._has_room = asyncio.Event()
        self._has_results = asyncio.Event()

    async def results(self, call: Call) -> AsyncGenerator[RunResult, None]:
        """`call` opens a stream, and raises Unavailable when it is lost."""
        feeding = asyncio.create_task(self._feed())
        running = asyncio.create_task(self._run(call))
        running.add_done_callback(lambda _: self._has_results.set())
        try:
            while not running.done() or self._results:
                await self._has_results.wait()
                self._has_results.clear()
                while self._results:
                    yield self._results.popleft()
                    self._untaken -= 1
                    self._has_room.set()
            await running
            await feeding
        finally:
            for task in (running, feeding):
                task.cancel()
            await asyncio.gather(running, feeding, return_exceptions=True)

    async def _run(self, call: Call) -> None:
        loop = asyncio.get_running_loop()
        retry_s, heard_s = _RETRY_S, loop.time()
        while not self._has_all or self._open:
            self._unsent = deque(self._open.values())
            try:
                async with aclosing(call(self._requests())) as replies:
                    async for reply in replies:
                        retry_s, heard_s = _RETRY_S, loop.time()
                        self._take(reply)
                if self._open:
                    raise Unavailable("the worker has ended the call before all jobs had a result")
            except Unavailable:
                if loop.time() - heard_s > self._patience_s:
                    raise
                await asyncio.sleep(retry_s)
                retry_s = min(_RETRY_MAX_S, 2 * retry_s)

    def _take(self, reply: RunJobsRes) -> None:
        for result in reply.results:
            if self._open.pop(result.job_id, None) is not None:
                error = from_grpc(GRPCError(Status(result.code), result.message)) if result.code else None
                self._tell(RunResult(result.job_id, None if error else result.job, error))

    def _tell(self, result: RunResult) -> None:
        self._results.append(result)
        self._has_results.set()

    async def _feed(self) -> None:
        """Takes specs for as long as not too many results are to be taken."""
        try:
            async for spec in _each(self._specs):
                while self._untaken >= self._in_flight:
                    self._has_room.clear()
                    await self._has_room.wait()
                self._untaken += 1
                self._add(spec)
        finally:
            self._has_all = True
            self._has_news.set()

    def _add(self, spec: Spec) -> None:
        job_id = spec.job_id if isinstance(spec, StartJobReq) else spec.get("job_id", "")
        try:
            request = spec if isinstance(spec, StartJobReq) else start_request(**spec)
            request.job_id = job_id = request.job_id or str(uuid.uuid4())
            if job_id in self._open:
                raise InvalidArgument("job_id", "is that of a job under way: give each an id of its own")
            start = _as_field(self._codec.encode(request, StartJobReq))
        except JobError as error:
            self._tell(RunResult(job_id, None, error))
            return
        self._open[job_id] = start
        self._unsent.append(start)
        self._has_news.set()

    async def _requests(self) -> AsyncIterator[Encoded]:
        """The requests of one stream, each with as many starts as are there."""
        message = bytearray(self._codec.encode(self._head, RunJobsReq))
        while True:
            while not self._unsent and not self._has_all:
                self._has_news.clear()
                await self._has_news.wait()
            if not self._unsent:
                return
            message += self._unsent.popleft()
            while self._unsent and len(message) + len(self._unsent[0]) <= _MESSAGE_BYTES:
                message += self._unsent.popleft()
            yield Encoded(RunJobsReq, bytes(message))
            message.clear()


def _as_field(start: bytes) -> bytes:
    """As one of RunJobsReq.starts (https://protobuf.dev/programming-guides/encoding), whose number is 10."""
    head, size = bytearray(b"\x52"), len(start)
    while size > 0x7F:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    head.append(size)
    return bytes(head) + start


async def exchange(stub: WorkerStub, requests: AsyncIterator[Encoded]) -> AsyncGenerator[RunJobsRes, None]:
    """One stream. The stub's own method leaves the task that sends to itself, and what that met untold."""
    async with stub.channel.request(
        _PATH, Cardinality.STREAM_STREAM, RunJobsReq, RunJobsRes, metadata=stub.metadata
    ) as stream:
        await stream.send_request()

        async def send() -> None:
            async for request in requests:
                await stream.send_message(cast(RunJobsReq, request))
            await stream.end()

        sending = asyncio.create_task(send())
        try:
            async for reply in stream:
                yield reply
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)


async def _each(specs: Specs) -> AsyncIterator[Spec]:
    if isinstance(specs, AsyncIterable):
        async for spec in specs:
            yield spec
        return
    for number, spec in enumerate(specs, 1):
        yield spec
        if number % _STEP == 0:
            await asyncio.sleep(0)
