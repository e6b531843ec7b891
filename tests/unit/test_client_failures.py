"""The client, when something fails."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from grpclib.server import Server

from tests.support.fake_worker import FakeWorker, serving
from tests.support.waiting import PATIENCE_S, eventually
from worker_svc import (
    DeadlineExceeded,
    InvalidArgument,
    Job,
    JobNotFound,
    JobState,
    Limits,
    Outcome,
    Unavailable,
    Unreachable,
    WorkerClient,
)
from worker_svc.client.codec import ClientCodec
from worker_svc.client.errors import why_refused
from worker_svc.pb.jobscheduler import (
    WaitJobReq,
)


async def test_statuses_become_errors(faked: WorkerClient, fake_worker: FakeWorker) -> None:
    with pytest.raises(JobNotFound, match="job not found"):
        await faked.query("nobody")
    with pytest.raises(JobNotFound):
        await anext(faked.output("nobody"))
    fake_worker.refusal = GRPCError(Status.INVALID_ARGUMENT, "command: must not be empty")
    with pytest.raises(InvalidArgument, match=r"^command: must not be empty$"):
        await faked.start("")
    fake_worker.refusal = GRPCError(Status.ABORTED, "rule 3")
    with pytest.raises(GRPCError) as refused:
        await faked.start("ls")
    assert refused.value.status is Status.ABORTED


async def test_wait_gives_up_in_time(faked: WorkerClient) -> None:
    job_id = (await faked.start("sleep")).job_id
    for limit_s in (0, 0.05):
        with pytest.raises(DeadlineExceeded, match="the job is not finished"):
            await faked.wait(job_id, timeout_s=limit_s)


async def test_a_worker_that_does_not_answer(faked: WorkerClient, fake_worker: FakeWorker) -> None:
    fake_worker.hangs = True
    with pytest.raises(DeadlineExceeded, match="in time"):
        await faked.query("a", deadline_s=0.1)
    # What grpclib did to the task to wake it must not look like a cancellation later.
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.sleep(0)


async def test_a_timeout_of_the_callers_own(faked: WorkerClient, fake_worker: FakeWorker) -> None:
    fake_worker.hangs = True
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await faked.query("a")


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.start("ls", timeout_s=-1),
        lambda client: client.start("ls", stop_grace_s=float("nan")),
        lambda client: client.start("ls", stop_grace_s=float("inf")),
        lambda client: client.stop("a", grace_s=-0.1),
        lambda client: anext(client.output("a", offset=-1)),
        lambda client: anext(client.output("a", tail_lines=2**64)),
        lambda client: anext(client.output("a", stream=9)),
        lambda client: anext(client.watch(-1)),
        lambda client: anext(client.list(states=[17])),
    ],
)
async def test_what_betterproto_would_garble_is_refused(
    faked: WorkerClient, fake_worker: FakeWorker, call: Callable[[WorkerClient], Awaitable[Any]]
) -> None:
    with pytest.raises(InvalidArgument):
        await call(faked)
    assert fake_worker.requests == []


async def test_text_that_is_not_unicode(faked: WorkerClient) -> None:
    with pytest.raises(InvalidArgument, match=r"^args: is not valid Unicode$"):
        await faked.start("ls", args=["fine", "\udcff"])
    with pytest.raises(InvalidArgument, match=r"^env: is not valid Unicode$"):
        await faked.start("ls", env={"SECRET": "hunter2\udcff"})


async def test_a_number_that_its_field_cannot_carry(faked: WorkerClient, fake_worker: FakeWorker) -> None:
    with pytest.raises(InvalidArgument, match=r"^limits: "):
        await faked.start("ls", limits=Limits(pids_max=-1))
    assert fake_worker.requests == []


def test_what_a_newer_worker_tells_more() -> None:
    codec = ClientCodec()
    newer = codec.encode(Job(job_id="a", outcome=Outcome(Outcome.LOST)), Job)
    # The outcome is a number that we have no name for, and field 2000 is none that we know.
    job = codec.decode(newer.replace(b"\x68\x08", b"\x68\x63") + b"\x80\x7d\x01", Job)
    assert (job.job_id, int(job.outcome), job.outcome.name) == ("a", 99, None)
    assert isinstance(job.outcome, Outcome)
    assert job.started_at is None
    assert job.spec.args == []


def test_an_answer_that_is_none() -> None:
    with pytest.raises(GRPCError, match="the answer is no Job") as caught:
        ClientCodec().decode(b"\x52\x7fcut off", Job)
    assert caught.value.status is Status.INTERNAL


async def test_no_worker_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    async with WorkerClient(f"127.0.0.1:{port}") as client:
        with pytest.raises(Unreachable, match=f"at 127.0.0.1:{port}: Connection refused$"):
            await client.worker()
        with pytest.raises(Unavailable):
            await anext(client.watch())


async def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "worker.sock"
    server = Server([FakeWorker()])
    await server.start(path=str(path))
    async with WorkerClient(f"unix:{path}") as client:
        assert client.address == f"unix:{path}"
        assert (await client.worker()).worker_id == "fake"
    server.close()
    await server.wait_closed()
    path.unlink(missing_ok=True)
    async with WorkerClient(f"unix:{path}") as client:
        with pytest.raises(Unreachable, match="No such file"):
            await client.worker()


async def test_a_connection_that_breaks_and_a_worker_that_comes_back() -> None:
    worker = FakeWorker()
    async with serving(worker) as address, Relay.to(address) as relay, WorkerClient(relay.address) as client:
        watching = asyncio.create_task(_watch(client))
        calling = asyncio.create_task(client.wait((await client.start("sleep")).job_id))
        await eventually(lambda: worker.open_streams == 1 and len(worker.took(WaitJobReq)) == 1)
        relay.cut()
        for broken in (watching, calling):
            with pytest.raises(Unavailable, match="lost"):
                await broken
        assert (await client.worker()).worker_id == "fake"


async def _watch(client: WorkerClient) -> None:
    try:
        async for _ in client.watch():
            pass
    finally:
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0


class Relay:
    """Passes bytes between client and worker, until it is cut."""

    def __init__(self, target: str) -> None:
        self._target = target.split(":")
        self._writers: list[asyncio.StreamWriter] = []
        self.address = ""

    @classmethod
    @asynccontextmanager
    async def to(cls, target: str) -> AsyncIterator[Relay]:
        relay = cls(target)
        server = await asyncio.start_server(relay._connect, "127.0.0.1", 0)
        relay.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server:
            yield relay
            relay.cut()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(*self._target)
        self._writers += [writer, far_writer]
        await asyncio.gather(self._pass(reader, far_writer), self._pass(far_reader, writer))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    def cut(self) -> None:
        for writer in self._writers:
            writer.close()
        self._writers.clear()


def test_a_peer_that_is_no_grpc_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1024)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()

        async def call() -> None:
            async with WorkerClient(f"127.0.0.1:{listener.getsockname()[1]}") as client:
                await client.worker(deadline_s=10)

        with pytest.raises(Unavailable, match="lost"):
            asyncio.run(call())
        thread.join()


@pytest.mark.parametrize("address", ["", "host", "host:port", "host:70000", "::1:5", "unix:"])
def test_an_address_that_cannot_be_one(address: str) -> None:
    with pytest.raises(ValueError, match="is not a worker's address"):
        WorkerClient(address)


async def test_use_outside_of_async_with() -> None:
    client = WorkerClient("127.0.0.1:1")
    with pytest.raises(RuntimeError, match="async with"):
        await client.worker()


async def test_metadata_goes_with_every_call(fake_worker: FakeWorker) -> None:
    from grpclib.events import RecvRequest, listen

    seen: list[Any] = []

    async def remember(event: RecvRequest) -> None:
        seen.append(event.metadata.get("token"))

    listener = socket.create_server(("127.0.0.1", 0))
    server = Server([fake_worker])
    listen(server, RecvRequest, remember)
    await server.start(sock=listener)
    port = listener.getsockname()[1]
    async with WorkerClient(f"127.0.0.1:{port}", metadata={"token": "t"}) as client:
        await client.worker()
        fake_worker.jobs["a"] = Job(job_id="a", state=JobState(JobState.FINISHED))
        assert [chunk async for chunk in client.output("a")] == []
    server.close()
    await server.wait_closed()
    assert seen == ["t", "t"]


@pytest.mark.parametrize(
    "alert, text",
    [
        ("TLSV13_ALERT_CERTIFICATE_REQUIRED", "it wants a certificate"),
        ("SSLV3_ALERT_CERTIFICATE_REVOKED", "the certificate was refused"),
        ("TLSV1_ALERT_UNKNOWN_CA", "the certificate was refused"),
        ("TLSV1_ALERT_PROTOCOL_VERSION", "another version of TLS"),
        ("SOMETHING_ELSE", "TLS: SOMETHING_ELSE"),
    ],
)
def test_what_an_alert_means(alert: str, text: str) -> None:
    error = ssl.SSLError(1, "x")
    error.reason = alert
    assert text in why_refused(error)
