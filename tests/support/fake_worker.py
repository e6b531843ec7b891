"""A worker without a supervisor: it answers as told, and remembers what it was asked."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from ssl import SSLContext
from typing import Any

from grpclib.const import Status
from grpclib.exceptions import GRPCError
from grpclib.server import Server

from worker_svc.pb.jobscheduler import (
    DeleteJobReq,
    DeleteJobRes,
    GetWorkerReq,
    GetWorkerRes,
    Job,
    JobSpec,
    JobState,
    JobTransition,
    ListJobsReq,
    ListJobsRes,
    Outcome,
    OutputChunk,
    OutputStream,
    PauseJobReq,
    PauseJobRes,
    PruneJobsReq,
    PruneJobsRes,
    QueryJobReq,
    QueryJobRes,
    ResumeJobReq,
    ResumeJobRes,
    SignalJobReq,
    SignalJobRes,
    StartJobReq,
    StartJobRes,
    StopJobReq,
    StopJobRes,
    StreamJobReq,
    WaitJobReq,
    WaitJobRes,
    WatchJobsReq,
    WorkerBase,
)

BEGAN = datetime(2026, 11, 24, 6, 0, tzinfo=UTC)
PAGE_SIZE = 2


def finished(job_id: str, outcome: int, **fields: Any) -> Job:
    """A finished job that ran `sh -c 'exit 3'` for 1.5 s."""
    return Job(
        job_id=job_id,
        spec=JobSpec(command="sh", args=["-c", "exit 3"]),
        state=JobState(JobState.FINISHED),
        outcome=Outcome(outcome),
        accepted_at=BEGAN,
        started_at=BEGAN,
        finished_at=BEGAN + timedelta(seconds=1.5),
        wall_time=timedelta(seconds=1.5),
        **fields,
    )


class FakeWorker(WorkerBase):
    """Jobs are those in `jobs`, or started; a started job runs until it is stopped, or ends at once as
    `next_end` says."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.jobs: dict[str, Job] = {}
        self.chunks: dict[int, list[OutputChunk]] = {}
        self.next_end: Job | None = None
        self.refusal: GRPCError | None = None
        self.hangs = False
        self.open_streams = 0
        self._ended: dict[str, asyncio.Event] = {}

    def took(self, kind: type) -> list[Any]:
        return [request for request in self.requests if isinstance(request, kind)]

    async def start_job(self, start_job_req: StartJobReq) -> StartJobRes:
        await self._take(start_job_req)
        job_id = start_job_req.job_id or "assigned"
        self._ended[job_id] = asyncio.Event()
        if self.next_end is None:
            self.jobs[job_id] = Job(job_id=job_id, state=JobState(JobState.RUNNING))
        else:
            self.next_end.job_id = job_id
            self.jobs[job_id] = self.next_end
            self._ended[job_id].set()
        return StartJobRes(job_id=job_id, state=JobState(JobState.RUNNING))

    async def stop_job(self, stop_job_req: StopJobReq) -> StopJobRes:
        await self._take(stop_job_req)
        job = self._find(stop_job_req.job_id)
        # Like a job that ignores SIGTERM: it takes SIGKILL, or a grace to wait for.
        if stop_job_req.signal == "SIGKILL" or stop_job_req.wait or not self.stubborn(job):
            signal = stop_job_req.signal or "SIGTERM"
            words = {"SIGTERM": "signal: terminated", "SIGKILL": "signal: killed"}
            self.jobs[job.job_id] = finished(
                job.job_id, Outcome.STOPPED, signal=signal, error_text=words.get(signal, signal)
            )
            if job.job_id in self._ended:
                self._ended[job.job_id].set()
        return StopJobRes()

    def stubborn(self, job: Job) -> bool:
        return "stubborn" in job.job_id

    async def query_job(self, query_job_req: QueryJobReq) -> QueryJobRes:
        await self._take(query_job_req)
        job = self._find(query_job_req.job_id)
        done = job.state == JobState.FINISHED
        return QueryJobRes(done, done and job.outcome != Outcome.SUCCEEDED, job.error_text, job)

    async def list_jobs(self, list_jobs_req: ListJobsReq) -> ListJobsRes:
        await self._take(list_jobs_req)
        begin = int(list_jobs_req.page_token or 0)
        jobs = list(self.jobs.values())
        end = begin + PAGE_SIZE
        return ListJobsRes(jobs[begin:end], str(end) if end < len(jobs) else "")

    async def watch_jobs(self, watch_jobs_req: WatchJobsReq) -> AsyncIterator[JobTransition]:
        await self._take(watch_jobs_req)
        for sequence in range(watch_jobs_req.from_sequence or 1, 4):
            yield JobTransition(sequence=sequence, job_id="a")
        self.open_streams += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.open_streams -= 1

    async def wait_job(self, wait_job_req: WaitJobReq) -> WaitJobRes:
        await self._take(wait_job_req)
        job = self._find(wait_job_req.job_id)
        if job.state != JobState.FINISHED:
            limit_s = wait_job_req.timeout.total_seconds() if wait_job_req.timeout else None
            try:
                await asyncio.wait_for(self._ended[job.job_id].wait(), limit_s)
            except TimeoutError:
                raise GRPCError(Status.DEADLINE_EXCEEDED, "the job is not finished") from None
        return WaitJobRes(self._find(job.job_id))

    async def signal_job(self, signal_job_req: SignalJobReq) -> SignalJobRes:
        await self._take(signal_job_req)
        return SignalJobRes()

    async def pause_job(self, pause_job_req: PauseJobReq) -> PauseJobRes:
        await self._take(pause_job_req)
        return PauseJobRes()

    async def resume_job(self, resume_job_req: ResumeJobReq) -> ResumeJobRes:
        await self._take(resume_job_req)
        return ResumeJobRes()

    async def delete_job(self, delete_job_req: DeleteJobReq) -> DeleteJobRes:
        await self._take(delete_job_req)
        return DeleteJobRes()

    async def prune_jobs(self, prune_jobs_req: PruneJobsReq) -> PruneJobsRes:
        await self._take(prune_jobs_req)
        return PruneJobsRes(jobs=1, bytes=5, job_ids=["a"])

    async def stream_job(self, stream_job_req: StreamJobReq) -> AsyncIterator[OutputChunk]:
        await self._take(stream_job_req)
        job = self._find(stream_job_req.job_id)
        for chunk in self.chunks.get(int(stream_job_req.stream), []):
            yield chunk
        if stream_job_req.follow and job.state != JobState.FINISHED:
            self.open_streams += 1
            try:
                await self._ended[job.job_id].wait()
            finally:
                self.open_streams -= 1

    async def get_worker(self, get_worker_req: GetWorkerReq) -> GetWorkerRes:
        await self._take(get_worker_req)
        return GetWorkerRes(worker_id="fake", slots=4)

    async def _take(self, request: Any) -> None:
        self.requests.append(request)
        if self.refusal is not None:
            raise self.refusal
        if self.hangs:
            await asyncio.Event().wait()

    def _find(self, job_id: str) -> Job:
        if job_id not in self.jobs:
            raise GRPCError(Status.NOT_FOUND, "job not found")
        return self.jobs[job_id]


@asynccontextmanager
async def serving(worker: FakeWorker, context: SSLContext | None = None) -> AsyncIterator[str]:
    """Serves on a free loopback port; the address."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = Server([worker])
    await server.start(sock=listener, ssl=context)
    try:
        host, port = listener.getsockname()
        yield f"{host}:{port}"
    finally:
        server.close()
        await server.wait_closed()


@contextmanager
def serving_in_thread(worker: FakeWorker, context: SSLContext | None = None) -> Iterator[str]:
    """The same for a test that is not async: `worker-svc` has a loop of its own."""
    address = ""
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    end = asyncio.Event()

    async def serve() -> None:
        nonlocal address
        async with serving(worker, context) as address:
            ready.set()
            await end.wait()

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(serve())

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(10)
    try:
        yield address
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join(10)


def chunks(*parts: bytes | int) -> list[OutputChunk]:
    """Bytes are data, a number is a gap of so many bytes."""
    offset = 0
    made = []
    for part in parts:
        if isinstance(part, int):
            made.append(OutputChunk(offset=offset, gap_bytes=part))
            offset += part
        else:
            made.append(OutputChunk(offset=offset, data=part))
            offset += len(part)
    return made


MERGED = int(OutputStream.UNSPECIFIED)
STDOUT = int(OutputStream.STDOUT)
STDERR = int(OutputStream.STDERR)
