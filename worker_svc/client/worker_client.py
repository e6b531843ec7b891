"""The async client for schedulers: typed calls, and the errors of `job` instead of gRPC statuses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from datetime import UTC, datetime
from ssl import SSLContext, SSLError
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from grpclib.config import Configuration
from grpclib.exceptions import GRPCError, StreamTerminatedError

from worker_svc.address import Address
from worker_svc.client.codec import ClientCodec
from worker_svc.client.connection import ClientChannel
from worker_svc.client.errors import lost, not_reached, not_trusted, too_late
from worker_svc.client.fields import UINT64_MAX, count, duration, member, start_request
from worker_svc.job import DeadlineExceeded, Unavailable
from worker_svc.pb.jobscheduler import (
    DeleteJobReq,
    GetWorkerReq,
    GetWorkerRes,
    Identity,
    Job,
    JobState,
    JobTransition,
    JobView,
    LeaderExit,
    Limits,
    ListJobsReq,
    OutputChunk,
    OutputPolicy,
    OutputStream,
    OutputVia,
    PauseJobReq,
    PruneJobsReq,
    PruneJobsRes,
    QueryJobReq,
    QueryJobRes,
    ResumeJobReq,
    RunJobsRes,
    Sandbox,
    ShutdownWorkerReq,
    ShutdownWorkerRes,
    SignalJobReq,
    StartJobRes,
    StopJobReq,
    StreamJobReq,
    WaitJobReq,
    WatchJobsReq,
    WorkerStub,
)
from worker_svc.wire.statuses import from_grpc

if TYPE_CHECKING:
    from worker_svc.client.many import RunResult, Specs

T = TypeVar("T")

# On the wire a wait of zero means "no limit"; here it means "do not wait".
_SHORTEST_WAIT_S: Final = 0.001
_STREAM_WINDOW_BYTES: Final = 1024 * 1024


class WorkerClient:
    """Talks to one worker, over one connection that is made when needed and made again when it was lost.

        async with WorkerClient("127.0.0.1:50000") as worker:
            started = await worker.start("bash", "backup.sh", timeout_s=600)
            async for chunk in worker.output(started.job_id, follow=True):
                ...
            job = await worker.wait(started.job_id)

    Every method that calls the worker can raise, besides what it names itself:

    * `Unreachable`: no connection could be made, nothing was asked; `Untrusted` is one whose TLS came to nothing.
    * `Unavailable` (the two above are also this): the connection was lost, or the worker cannot serve now. Whether the
      call was carried out is not known: a start with a `job_id` can simply be made again.
    * `PermissionDenied`: the caller's role, or the worker's policy, does not allow it; the text names the rule.
    * `ResourceExhausted`: too many calls, jobs in the queue, or bytes; later, or fewer.
    * `InvalidArgument`: a field is malformed; the text names it.
    * `DeadlineExceeded`: no answer within `deadline_s` seconds (a float). Without it a call waits as long as it takes.
    * `grpclib.GRPCError`, for a status that the table in `worker_svc.wire.statuses` has no error for.
    * `RuntimeError`, outside `async with`.

    All but the last two are `JobError`s, and all of these names can be imported from `worker_svc`.

    A call or stream that is cancelled ends at the worker too. Leaving an `async for` early, close the stream at once
    with `contextlib.aclosing`.

    Calls may run side by side in one event loop; a client belongs to the loop in which it was entered, and is not for
    other threads. A program that is not asynchronous puts what it has to do with the worker into one coroutine and
    calls `asyncio.run`; one that keeps a client open runs a loop in a thread of its own, and hands calls over with
    `asyncio.run_coroutine_threadsafe(worker.query(job_id), loop).result()`.
    """

    def __init__(
        self,
        address: str,
        *,
        ssl: SSLContext | None = None,
        server_name: str = "",
        metadata: Mapping[str, str | bytes] | None = None,
    ) -> None:
        """Connects to nothing yet.

        Args:
            address: "host:port", "[ipv6]:port" or "unix:/path".
            ssl: for TLS: what to verify the worker with, and the certificate to show to it.
            server_name: the name that the worker's certificate must carry, if it is not the host.
            metadata: goes with every call; values are bytes where the key ends in "-bin".

        Raises:
            ValueError: the address cannot be one.
        """
        try:
            self._address = Address.parse(address)
        except ValueError as error:
            raise ValueError(f"{address!r} is not a worker's address: {error}") from None
        self._ssl = ssl
        self._server_name = server_name
        self._metadata = dict(metadata) if metadata else None
        self._channel: ClientChannel | None = None

    @property
    def address(self) -> str:
        """As given, in the form that is usual: "127.0.0.1:50000"."""
        return str(self._address)

    async def __aenter__(self) -> Self:
        config = Configuration(
            # What is not read of one stream must not hold up the others: only its own window is bounded.
            http2_connection_window_size=2**31 - 1,
            http2_stream_window_size=_STREAM_WINDOW_BYTES,
            ssl_target_name_override=self._server_name or None,
        )
        where: dict[str, Any] = {"path": self._address.unix_path}
        if not self._address.is_unix:
            where = {"host": self._address.host or "127.0.0.1", "port": self._address.port}
        self._channel = ClientChannel(**where, ssl=self._ssl, config=config, codec=ClientCodec())
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._channel is not None:
            protocol = self._channel._protocol
            transport = None if protocol is None else getattr(protocol.connection, "_transport", None)
            self._channel.close()
            self._channel = None
            if transport is not None and self._ssl is not None:
                transport.abort()  # else TLS would wait for the worker to say goodbye too
            # The transport closes in the loop's next turns, which may otherwise be none; that of TLS after its own.
            for _ in range(3):
                await asyncio.sleep(0)

    async def start(
        self,
        command: str,
        path: str = "",
        *,
        args: Iterable[str] = (),
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        stdin: bytes = b"",
        timeout_s: float | None = None,
        stop_signal: str = "",
        stop_grace_s: float | None = None,
        labels: Mapping[str, str] | None = None,
        separate_stderr: bool = False,
        job_id: str = "",
        output_max_bytes: int | None = None,
        output_policy: int = OutputPolicy.UNSPECIFIED,
        output_via: int = OutputVia.UNSPECIFIED,
        limits: Limits | None = None,
        identity: Identity | None = None,
        sandbox: Sandbox | None = None,
        leader_exit: int = LeaderExit.UNSPECIFIED,
        secret_env: Mapping[str, str] | None = None,
        deadline_s: float | None = None,
    ) -> StartJobRes:
        """Start a job: `command`, `path` (if not empty), `args`. What is left out is the worker's default.

        With a `job_id` of your own the call is idempotent: after a doubtful failure, make the very same again.

        Args:
            command: a path on the worker's machine, or a name looked up in the job's PATH.
            env: variables beside those that the worker passes on; `secret_env`: more of them, whose values are
                delivered to the job and recorded nowhere.
            cwd: absolute.
            stdin: what it reads, at most 1 MiB.
            timeout_s: seconds after which it is stopped; 0: never.
            stop_signal: what asks it to stop ("SIGINT"); `stop_grace_s`: seconds from that to SIGKILL.
            output_max_bytes: how much of its output is kept; 0: all. `output_policy`, an OutputPolicy, says what
                happens beyond; `output_via`, an OutputVia, how output gets into the file.
            limits: `Limits(memory_max_bytes=2**30, pids_max=100)`; `identity`: as whom it runs; `sandbox`: what
                it sees.
            leader_exit: a LeaderExit: what becomes of its other processes when the first has exited.

        Returns:
            The job's id and state (RUNNING, or QUEUED), and whether the job existed.

        Raises:
            JobExists: the `job_id` is another job's.
            PreconditionFailed: the machine cannot give a limit, user or sandbox, or the command cannot be executed.
        """
        request = start_request(
            command,
            path,
            args=args,
            env=env,
            cwd=cwd,
            stdin=stdin,
            timeout_s=timeout_s,
            stop_signal=stop_signal,
            stop_grace_s=stop_grace_s,
            labels=labels,
            separate_stderr=separate_stderr,
            job_id=job_id,
            output_max_bytes=output_max_bytes,
            output_policy=output_policy,
            output_via=output_via,
            limits=limits,
            identity=identity,
            sandbox=sandbox,
            leader_exit=leader_exit,
            secret_env=secret_env,
        )
        return await self._call(self._stub.start_job(request, timeout=deadline_s))

    async def run_many(
        self, specs: Specs, *, in_flight: int = 256, view: int = JobView.NO_SPEC, patience_s: float = 60.0
    ) -> AsyncGenerator[RunResult, None]:
        """Run jobs to their end over one stream; yields the result of each as it finishes, in no particular order.

            specs = ({"command": "convert", "args": [name], "timeout_s": 60} for name in names)
            async for result in worker.run_many(specs):
                print(result.job_id, result.error or result.job.outcome)

        No more than `in_flight` jobs are without a result at any time, and no more specs are taken, nor jobs started,
        while results are not. When the connection is lost it is made again, and what has no result yet is asked for
        again: a job runs once and has one result. What goes wrong with one job is its result's `error`.

        Args:
            specs: the arguments of `start` for each job, as a mapping, or a StartJobReq; any iterable or asynchronous
                iterable of them. A job without a `job_id` is given one: with ids of your own, the same specs can be run
                again after this program ended too, and only what was not run before is run.
            view: a JobView: how much is told of a finished job; by default all but the spec.
            patience_s: for how many seconds a worker may be out of reach until Unavailable is raised.
        """
        from worker_svc.client.many import ManyRuns

        runs = ManyRuns(
            specs,
            max(1, count("in_flight", in_flight, 2**32 - 1)),
            member(JobView, "view", view),
            patience_s,
        )
        async with aclosing(runs.results(self._run_jobs)) as results:
            async for result in results:
                yield result

    async def _run_jobs(self, requests: AsyncIterator[Any]) -> AsyncGenerator[RunJobsRes, None]:
        from worker_svc.client.many import exchange

        with self._errors():
            async with aclosing(exchange(self._stub, requests)) as replies:
                async for reply in replies:
                    yield reply

    async def stop(
        self,
        job_id: str,
        *,
        signal: str = "",
        grace_s: float | None = None,
        wait: bool = False,
        deadline_s: float | None = None,
    ) -> None:
        """Ask a job to stop; with `wait`, return when it is finished. A finished job stays as it is.

        `signal` ("SIGINT", "INT" or "2") and `grace_s`, the seconds until SIGKILL (0: at once), are the job's own
        unless given. Raises JobNotFound.
        """
        request = StopJobReq(job_id=job_id, signal=signal, grace=duration("grace", grace_s), wait=wait)
        await self._call(self._stub.stop_job(request, timeout=deadline_s))

    async def query(self, job_id: str, *, deadline_s: float | None = None) -> QueryJobRes:
        """A job in the three original fields, `done`, `error` and `error_text`, and as `job`, all that is known of it.
        Raises JobNotFound."""
        request = QueryJobReq(job_id=job_id)
        return await self._call(self._stub.query_job(request, timeout=deadline_s))

    async def job(self, job_id: str, *, deadline_s: float | None = None) -> Job:
        """All that is known of a job. Raises JobNotFound."""
        return (await self.query(job_id, deadline_s=deadline_s)).job

    async def list(
        self,
        *,
        states: Iterable[int] = (),
        labels: Mapping[str, str] | None = None,
        accepted_since: datetime | None = None,
        accepted_before: datetime | None = None,
        page_size: int = 0,
        view: int = JobView.UNSPECIFIED,
        deadline_s: float | None = None,
    ) -> AsyncGenerator[Job, None]:
        """The jobs that fit all of this, newest first; pages are fetched as needed, each within `deadline_s`.

        `states` are of JobState; a datetime without a zone means local time. `view` is a JobView: without one, large
        `spec.args` and `spec.env` are left out, as `left_out` of a job then says.
        """
        request = ListJobsReq(
            states=[member(JobState, "states", state) for state in states],
            labels=dict(labels or {}),
            # betterproto would take a datetime without a zone for UTC.
            accepted_since=accepted_since and accepted_since.astimezone(UTC),
            accepted_before=accepted_before and accepted_before.astimezone(UTC),
            page_size=count("page_size", page_size, 2**31 - 1),
            view=member(JobView, "view", view),
        )
        while True:
            page = await self._call(self._stub.list_jobs(request, timeout=deadline_s))
            for job in page.jobs:
                yield job
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def watch(self, from_sequence: int = 0, job_ids: Iterable[str] = ()) -> AsyncGenerator[JobTransition, None]:
        """Transitions from a sequence number on (0: only new ones, 1: all), live after catching up, without end; of
        some jobs only, if `job_ids` names any. Raises OutOfRange for a number that was never given out."""
        request = WatchJobsReq(from_sequence=count("from_sequence", from_sequence, UINT64_MAX), job_ids=[*job_ids])
        with self._errors():
            async with aclosing(self._stub.watch_jobs(request)) as transitions:  # type: ignore[type-var]
                async for transition in transitions:
                    yield transition

    async def wait(self, job_id: str, timeout_s: float | None = None) -> Job:
        """The job when it is finished. Raises JobNotFound, and DeadlineExceeded if it is not finished within
        `timeout_s` seconds (0: only look; None: without end)."""
        if timeout_s is not None:
            timeout_s = max(timeout_s, _SHORTEST_WAIT_S)
        request = WaitJobReq(job_id=job_id, timeout=duration("timeout", timeout_s))
        return (await self._call(self._stub.wait_job(request))).job

    async def signal(self, job_id: str, signal: str, *, deadline_s: float | None = None) -> None:
        """Send a signal ("SIGUSR1", "USR1", "10") to a running job's process group. Raises JobNotFound, and
        PreconditionFailed if the job does not run."""
        request = SignalJobReq(job_id=job_id, signal=signal)
        await self._call(self._stub.signal_job(request, timeout=deadline_s))

    async def pause(self, job_id: str, *, deadline_s: float | None = None) -> None:
        """Make all processes of a running job stand still; its timeout goes on. Raises JobNotFound, and
        PreconditionFailed if the job does not run."""
        request = PauseJobReq(job_id=job_id)
        await self._call(self._stub.pause_job(request, timeout=deadline_s))

    async def resume(self, job_id: str, *, deadline_s: float | None = None) -> None:
        """Let a paused job go on. Raises JobNotFound, and PreconditionFailed if the job does not run."""
        request = ResumeJobReq(job_id=job_id)
        await self._call(self._stub.resume_job(request, timeout=deadline_s))

    async def delete(self, job_id: str, *, deadline_s: float | None = None) -> None:
        """Remove the record and the output of a finished job. Raises JobNotFound, and PreconditionFailed if the job is
        not finished."""
        request = DeleteJobReq(job_id=job_id)
        await self._call(self._stub.delete_job(request, timeout=deadline_s))

    async def prune(
        self,
        *,
        max_age_s: float | None = None,
        max_count: int | None = None,
        max_bytes: int | None = None,
        dry_run: bool = False,
        deadline_s: float | None = None,
    ) -> PruneJobsRes:
        """Remove finished jobs, oldest first, until what is given holds; with `dry_run` only tell which.

        At least one of: `max_age_s`, seconds since they ended; `max_count`, how many may stay; `max_bytes`, what their
        output may take on disk. The answer tells how many went, their bytes, and the ids of the first 1000.
        """
        request = PruneJobsReq(
            max_age=duration("max_age", max_age_s),
            max_count=count("max_count", max_count, UINT64_MAX),
            max_bytes=count("max_bytes", max_bytes, UINT64_MAX),
            dry_run=dry_run,
        )
        return await self._call(self._stub.prune_jobs(request, timeout=deadline_s))

    async def shutdown(self, *, stop_jobs: bool = False, deadline_s: float | None = None) -> ShutdownWorkerRes:
        """Ends the worker and its supervisor once no job is left; the answer comes at once."""
        request = ShutdownWorkerReq(stop_jobs=stop_jobs)
        return await self._call(self._stub.shutdown_worker(request, timeout=deadline_s))

    async def worker(self, *, deadline_s: float | None = None) -> GetWorkerRes:
        """What the worker is and how busy."""
        request = GetWorkerReq()
        return await self._call(self._stub.get_worker(request, timeout=deadline_s))

    async def output(
        self,
        job_id: str,
        *,
        stream: int = OutputStream.UNSPECIFIED,
        offset: int | None = None,
        tail_bytes: int | None = None,
        tail_lines: int | None = None,
        follow: bool = False,
    ) -> AsyncGenerator[OutputChunk, None]:
        """A job's output from its beginning, or from at most one of `offset`, `tail_bytes` and `tail_lines`.

        `stream` is an OutputStream; unspecified, it is the output file, which has both unless they are
        separate. With `follow` it ends when the job has and its last byte was read, otherwise at the end as
        it is now. A chunk with `gap_bytes` stands for bytes that are gone. To resume after Unavailable:
        `offset` of the last chunk, plus the length of its data or gap.

        Raises JobNotFound, and OutOfRange for an `offset` beyond the end of the output as it is now.
        """
        request = StreamJobReq(
            job_id=job_id,
            stream=member(OutputStream, "stream", stream),
            offset=count("offset", offset, UINT64_MAX),
            tail_bytes=count("tail_bytes", tail_bytes, UINT64_MAX),
            tail_lines=count("tail_lines", tail_lines, UINT64_MAX),
            follow=follow,
        )
        with self._errors():
            async with aclosing(self._stub.stream_job(request)) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    yield chunk

    @property
    def _stub(self) -> WorkerStub:
        if self._channel is None:
            raise RuntimeError("not connected: use `async with WorkerClient(...)`")
        return WorkerStub(self._channel, metadata=self._metadata)

    async def _call(self, call: Awaitable[T]) -> T:
        with self._errors():
            return await call

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn what grpclib raises into what callers are promised."""
        task = asyncio.current_task()
        cancels = task.cancelling() if task else 0
        try:
            yield
        except GRPCError as error:
            raise from_grpc(error) from error
        except StreamTerminatedError as error:
            _forget_cancel(cancels)
            raise self._lost() from error
        except AttributeError as error:
            # grpclib takes its connection apart when it is lost, also under a call that is just about to be sent.
            if error.name != "_transport":
                raise
            raise self._lost() from error
        except SSLError as error:
            raise not_trusted(self.address, error) from error
        except OSError as error:
            if isinstance(error, TimeoutError) and error.errno is None:
                _forget_cancel(cancels)
                raise DeadlineExceeded(too_late(self.address)) from error
            raise not_reached(self.address, error) from error

    def _lost(self) -> Unavailable:
        return lost(self.address, self._channel.why_lost() if self._channel is not None else "")


def _forget_cancel(cancels_before: int) -> None:
    """grpclib wakes a call by cancelling its task and never takes that back, which `asyncio.timeout`, task
    groups and Ctrl-C would later mistake for a cancellation of their own."""
    task = asyncio.current_task()
    if task is not None and task.cancelling() > cancels_before:
        task.uncancel()
