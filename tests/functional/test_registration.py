"""Registration against a real scheduler, over real sockets."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest
from grpclib.const import Status

from tests.support.fake_scheduler import FakeScheduler
from tests.support.registering import ADVERTISED, NEVER_S, Log, registration, running, tls_contexts
from tests.support.waiting import eventually, stays
from worker_svc.pb.jobscheduler import RegisterReq, SchedulerStub
from worker_svc.registration import Registration


async def test_registers_and_says_so(scheduler: FakeScheduler) -> None:
    log = Log()
    subject = registration(scheduler, log)
    assert not subject.registered
    assert subject.scheduler_worker_id == ""
    async with running(subject):
        await eventually(lambda: subject.registered)
        assert subject.scheduler_worker_id == "worker-1.1"
        assert [call.address for call in scheduler.register_calls] == [ADVERTISED]
    assert log.lines == [
        (
            "info",
            "scheduler.registered",
            {
                "scheduler_worker_id": "worker-1.1",
                "address": ADVERTISED,
                "scheduler": scheduler.address,
                "attempt": 1,
            },
        )
    ]


async def test_absent_scheduler_comes(absent: FakeScheduler) -> None:
    log = Log()
    subject = registration(absent, log)
    async with running(subject):
        await eventually(lambda: len(log.of("scheduler.unreachable")) >= 5)
        assert not subject.registered
        await absent.start()
        await eventually(lambda: subject.registered)
    [first] = log.of("scheduler.unreachable", "warning")  # and the others are debug: logs are not flooded
    assert first["attempt"] == 1
    assert first["reason"] == "Connection refused"
    assert 0 <= first["retry_in_s"] <= 0.005
    [registered] = log.of("scheduler.registered")
    assert registered["attempt"] == len(log.of("scheduler.unreachable")) + 1
    assert len(absent.register_calls) == 1


async def test_restart_is_noticed_at_once_and_registered_once(scheduler: FakeScheduler) -> None:
    log = Log()
    subject = registration(scheduler, log)
    async with running(subject):
        for generation in range(1, 6):
            await eventually(lambda: subject.registered)
            assert subject.scheduler_worker_id.startswith(f"worker-{generation}.")
            assert len(scheduler.registered) == generation
            await scheduler.stop()
            # No PING could tell (NEVER_S): this is the connection's end itself.
            await eventually(lambda: not subject.registered)
            assert subject.scheduler_worker_id == ""
            await scheduler.start()
        await eventually(lambda: subject.registered)
    assert len(log.of("scheduler.lost", "warning")) == 5
    assert log.of("scheduler.lost")[0]["reason"] in ("closed by the scheduler", "Connection reset by peer")
    assert log.of("scheduler.lost")[0]["scheduler_worker_id"] == "worker-1.1"


async def test_lost_connection_of_a_living_scheduler(scheduler: FakeScheduler) -> None:
    subject = registration(scheduler, Log())
    async with running(subject):
        await eventually(lambda: subject.registered)
        scheduler.drop_connections()
        await scheduler.wait_for(lambda: len(scheduler.registered) == 2)
        await eventually(lambda: subject.scheduler_worker_id == "worker-1.2")
        assert scheduler.open_connections == 1


async def test_no_second_registration_without_an_outage(scheduler: FakeScheduler) -> None:
    log = Log()
    subject = registration(scheduler, log, keepalive_s=0.01, register_timeout_s=NEVER_S)
    async with running(subject):
        await eventually(lambda: subject.registered)
        assert await asyncio.to_thread(stays, lambda: len(scheduler.register_calls) == 1, 0.3)  # some 30 PINGs
    assert len(scheduler.register_calls) == 1
    assert len(log.lines) == 1


@pytest.mark.parametrize("status", [Status.UNIMPLEMENTED, Status.INTERNAL, Status.UNAVAILABLE])
async def test_failures_then_success(scheduler: FakeScheduler, status: Status) -> None:
    log = Log()
    scheduler.fail_next(3, status)
    subject = registration(scheduler, log)
    async with running(subject):
        await eventually(lambda: subject.registered)
    assert len(scheduler.register_calls) == 4
    assert {line["reason"] for line in log.of("scheduler.unreachable")} == {f"{status.name}: told to fail"}


async def test_answer_without_worker_id_is_a_refusal(scheduler: FakeScheduler) -> None:
    log = Log()
    scheduler.leave_unnamed_next(2)
    subject = registration(scheduler, log)
    async with running(subject):
        await eventually(lambda: subject.registered)
    assert len(scheduler.register_calls) == 3
    assert "no worker id" in log.of("scheduler.unreachable", "warning")[0]["reason"]


async def test_hanging_call_is_given_up(scheduler: FakeScheduler) -> None:
    log = Log()
    scheduler.hang_next()
    subject = registration(scheduler, log, register_timeout_s=0.3)
    async with running(subject):
        await eventually(lambda: subject.registered)
    assert log.of("scheduler.unreachable")[0]["reason"] == "no answer in 0.3 s"


async def test_half_open_connection_is_given_up() -> None:
    """Accepted by the kernel, served by nobody."""
    log = Log()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        subject = Registration(
            ADVERTISED, log, host="127.0.0.1", port=listener.getsockname()[1], register_timeout_s=0.05
        )
        async with running(subject):
            await eventually(lambda: log.of("scheduler.unreachable"))
    assert log.of("scheduler.unreachable")[0]["reason"] == "no answer in 0.05 s"


async def test_peer_that_speaks_another_protocol() -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    log = Log()
    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        subject = Registration(
            ADVERTISED, log, host="127.0.0.1", port=server.sockets[0].getsockname()[1], backoff_max_s=0.01
        )
        async with running(subject):
            await eventually(lambda: len(log.of("scheduler.unreachable")) >= 3)


class BlackHole:
    """A TCP proxy that can stop forwarding while it keeps the connections open."""

    def __init__(self, target: FakeScheduler) -> None:
        self._target = target
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = asyncio.Event()
        self._open.set()
        self.host = "127.0.0.1"
        self.port = 0

    def swallow(self) -> None:
        self._open.clear()

    def forward(self) -> None:
        self._open.set()

    async def __aenter__(self) -> BlackHole:
        self._server = await asyncio.start_server(self._serve, self.host, 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        far_reader, far_writer = await asyncio.open_connection(self._target.host, self._target.port)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, far_writer))
                group.create_task(self._pump(far_reader, writer))
        except* (OSError, asyncio.CancelledError):
            pass
        finally:
            for end in (writer, far_writer):
                end.transport.abort()
            self._tasks.discard(task)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            await self._open.wait()
            writer.write(data)
            await writer.drain()
        writer.close()


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
async def test_black_hole_is_found_by_ping(tls: bool, tmp_path: Path) -> None:
    log = Log()
    server_context, client_context = tls_contexts(tmp_path) if tls else (None, None)
    scheduler = FakeScheduler(ssl_context=server_context)
    async with scheduler, BlackHole(scheduler) as hole:
        subject = registration(
            scheduler,
            log,
            port=hole.port,
            keepalive_s=0.1,
            register_timeout_s=1.0,
            ssl_context=client_context,
            backoff_max_s=0.01,
        )
        async with running(subject):
            await eventually(lambda: subject.registered)
            hole.swallow()
            await eventually(lambda: not subject.registered)
            hole.forward()
            await eventually(lambda: subject.registered)
    assert log.of("scheduler.lost")[0]["reason"] == "no answer to a keepalive PING"


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
async def test_cancellation_does_not_wait_for_a_black_hole(tls: bool, tmp_path: Path) -> None:
    server_context, client_context = tls_contexts(tmp_path) if tls else (None, None)
    scheduler = FakeScheduler(ssl_context=server_context)
    async with scheduler, BlackHole(scheduler) as hole:
        subject = registration(scheduler, Log(), port=hole.port, ssl_context=client_context)
        async with running(subject):
            await eventually(lambda: subject.registered)
            assert subject._link is not None
            assert subject._link._link_protocol is not None
            sock = subject._link._link_protocol.transport.get_extra_info("socket")
            assert sock.fileno() != -1
            hole.swallow()
        # Not even a TLS farewell that nobody answers keeps it open.
        assert sock.fileno() == -1


async def test_lost_link_does_not_connect_anew(scheduler: FakeScheduler) -> None:
    """As a Channel would: unnoticed, the registration would then hang on a connection nobody watches."""
    subject = registration(scheduler, Log())
    link = await subject._open_link()
    scheduler.drop_connections()
    await eventually(lambda: link.lost_reason)
    with pytest.raises(ConnectionError, match=r"closed by the scheduler|reset by peer"):
        await SchedulerStub(link).register_worker(RegisterReq())
    await subject._drop_link()
    assert scheduler.register_calls == []
