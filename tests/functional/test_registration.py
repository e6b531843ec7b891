"""Registration against a real scheduler, over real sockets."""

from __future__ import annotations

import asyncio
import datetime
import gc
import ipaddress
import itertools
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpclib.const import Status

from tests.support.fake_scheduler import FakeScheduler
from tests.support.waiting import eventually
from worker_svc.pb.jobscheduler import RegisterReq, SchedulerStub
from worker_svc.registration import Registration

ADVERTISED = "worker.example:50000"
# Longer than any test waits: what must come sooner cannot have come by it.
NEVER_S = 300.0


class Log:
    """Records lines as a structlog logger would write them."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, dict[str, Any]]] = []

    def debug(self, event: str, **fields: Any) -> None:
        self.lines.append(("debug", event, fields))

    def info(self, event: str, **fields: Any) -> None:
        self.lines.append(("info", event, fields))

    def warning(self, event: str, **fields: Any) -> None:
        self.lines.append(("warning", event, fields))

    def of(self, event: str, level: str | None = None) -> list[dict[str, Any]]:
        return [fields for lvl, name, fields in self.lines if name == event and level in (None, lvl)]


def registration(scheduler: FakeScheduler, log: Log, **options: Any) -> Registration:
    return Registration(
        ADVERTISED,
        log,
        **{
            "host": scheduler.host,
            "port": scheduler.port,
            "register_timeout_s": 20.0,
            "backoff_initial_s": 0.005,
            "backoff_max_s": 0.02,
            "keepalive_s": NEVER_S,
            **options,
        },
    )


@asynccontextmanager
async def running(subject: Registration) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(subject.run())
    try:
        yield task
    finally:
        assert not task.done() or task.cancelled(), "run() ended by itself"
        task.cancel()
        await asyncio.wait((task,))
        assert task.cancelled()


@pytest.fixture
async def scheduler() -> AsyncIterator[FakeScheduler]:
    async with FakeScheduler() as scheduler:
        yield scheduler


@pytest.fixture
async def absent() -> AsyncIterator[FakeScheduler]:
    """Its port is held, and refuses."""
    scheduler = FakeScheduler()
    yield scheduler
    await scheduler.close()


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
        await asyncio.sleep(0.3)  # some 30 PINGs
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


async def test_deregisters_with_its_id(scheduler: FakeScheduler) -> None:
    log = Log()
    subject = registration(scheduler, log)
    async with running(subject):
        await eventually(lambda: subject.registered)
        await subject.deregister(10.0)
        assert not subject.registered
        await subject.deregister(10.0)  # the second has nothing to do
        await scheduler.wait_for(lambda: scheduler.open_connections == 0)
        await scheduler.restart()
        await asyncio.sleep(0.1)  # many times the backoff: it does not register any more
    assert [call.worker_id for call in scheduler.deregister_calls] == ["worker-1.1"]
    assert len(scheduler.register_calls) == 1
    assert [name for _, name, _ in log.lines] == ["scheduler.registered", "scheduler.deregistered"]


async def test_deregisters_after_run_was_cancelled(scheduler: FakeScheduler) -> None:
    subject = registration(scheduler, Log())
    async with running(subject):
        await eventually(lambda: subject.registered)
    await scheduler.wait_for(lambda: scheduler.open_connections == 0)
    await subject.deregister(10.0)
    assert [call.worker_id for call in scheduler.deregister_calls] == ["worker-1.1"]
    await scheduler.wait_for(lambda: scheduler.open_connections == 0)


async def test_deregister_waits_for_the_registration_under_way(scheduler: FakeScheduler) -> None:
    """The scheduler has it before it: its answer must not leave a worker behind that is gone."""
    scheduler.hang_next()
    subject = registration(scheduler, Log())
    async with running(subject):
        await scheduler.wait_for(lambda: scheduler.hanging == 1)
        leaving = asyncio.create_task(subject.deregister(10.0))
        await asyncio.sleep(0)  # its first step
        scheduler.release()
        await leaving
    assert [call.worker_id for call in scheduler.deregister_calls] == ["worker-1.1"]


@pytest.mark.parametrize("run_on", [True, False], ids=["while running", "after run"])
async def test_deregister_with_the_scheduler_gone(scheduler: FakeScheduler, run_on: bool) -> None:
    log = Log()
    subject = registration(scheduler, log, backoff_initial_s=NEVER_S, backoff_max_s=NEVER_S)
    async with running(subject) as task:
        await eventually(lambda: subject.registered)
        if not run_on:
            task.cancel()
            await asyncio.wait((task,))
        await scheduler.stop()
        await subject.deregister(NEVER_S)
    [failed] = log.of("scheduler.deregister_failed", "warning")
    assert failed["scheduler_worker_id"] == "worker-1.1"


async def test_deregister_is_bounded(scheduler: FakeScheduler) -> None:
    log = Log()
    subject = registration(scheduler, log)
    async with running(subject):
        await eventually(lambda: subject.registered)
        scheduler.hang_next()
        await subject.deregister(0.1)
    assert log.of("scheduler.deregister_failed")[0]["reason"].startswith("no answer in")
    await scheduler.wait_for(lambda: scheduler.open_connections == 0)


async def test_deregister_before_any_registration(absent: FakeScheduler) -> None:
    log = Log()
    subject = registration(absent, log, backoff_initial_s=NEVER_S, backoff_max_s=NEVER_S)
    async with running(subject):
        await eventually(lambda: log.of("scheduler.unreachable"))
        await subject.deregister(NEVER_S)
    assert [name for _, name, _ in log.lines] == ["scheduler.unreachable"]


TURNS = itertools.count()


async def connecting(_: FakeScheduler, subject: Registration) -> None:
    await asyncio.sleep(0)


async def calling(scheduler: FakeScheduler, _: Registration) -> None:
    await scheduler.wait_for(lambda: scheduler.hanging == 1)


async def registered(_: FakeScheduler, subject: Registration) -> None:
    await eventually(lambda: subject.registered)


async def losing(scheduler: FakeScheduler, subject: Registration) -> None:
    await eventually(lambda: subject.registered)
    scheduler.drop_connections()  # takes effect in the turn of the loop in which run() is cancelled


async def losing_in_call(scheduler: FakeScheduler, _: Registration) -> None:
    """In one of these turns grpclib's own cancellation of the call and that of run() come together."""
    await scheduler.wait_for(lambda: scheduler.hanging == 1)
    scheduler.drop_connections()
    for _turn in range(next(TURNS) % 8):
        await asyncio.sleep(0)


@pytest.mark.parametrize("moment", [connecting, calling, registered, losing, losing_in_call])
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
async def test_cancellation_leaves_nothing_behind(moment: Callable[..., Any], tls: bool, tmp_path: Path) -> None:
    server_context, client_context = tls_contexts(tmp_path) if tls else (None, None)
    async with FakeScheduler(ssl_context=server_context) as scheduler:
        tasks_before = asyncio.all_tasks()
        for _ in range(8):
            if moment in (calling, losing_in_call):
                scheduler.hang_next()
            subject = registration(scheduler, Log(), ssl_context=client_context)
            task = asyncio.create_task(subject.run())
            await moment(scheduler, subject)
            task.cancel()
            await asyncio.wait((task,), timeout=10)
            assert task.cancelled()
            await scheduler.wait_for(lambda: scheduler.open_connections == 0 and scheduler.hanging == 0)
        await eventually(lambda: asyncio.all_tasks() == tasks_before)  # the server's own end a turn later
    gc.collect()  # a ResourceWarning would fail the test


def test_nothing_left_when_the_loop_ends() -> None:
    """As the worker ends: no connection outlives run() that asyncio.run() would have to warn of."""

    async def main() -> None:
        async with FakeScheduler() as scheduler:
            subject = registration(scheduler, Log())
            task = asyncio.create_task(subject.run())
            await eventually(lambda: subject.registered)
            task.cancel()
            await asyncio.wait((task,))

    asyncio.run(main())
    gc.collect()


async def test_backoff_is_full_jitter_within_bounds(absent: FakeScheduler) -> None:
    asked: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        asked.append((low, high))
        return high / 1000

    log = Log()
    subject = registration(absent, log, backoff_initial_s=0.2, backoff_max_s=3.0, uniform=uniform)
    async with running(subject):
        await eventually(lambda: len(asked) >= 7)
    assert asked[:7] == [(0, high) for high in (0.2, 0.4, 0.8, 1.6, 3.0, 3.0, 3.0)]
    assert [line["retry_in_s"] for line in log.of("scheduler.unreachable")][:3] == [0.0, 0.0, 0.001]


async def test_flapping_scheduler_is_backed_off_from(scheduler: FakeScheduler) -> None:
    """Each registration succeeds, and no connection lasts."""
    asked: list[float] = []

    def uniform(_: float, high: float) -> float:
        asked.append(high)
        return 0.0

    subject = registration(scheduler, Log(), backoff_initial_s=1.0, backoff_max_s=NEVER_S, uniform=uniform)
    async with running(subject):
        for n in range(1, 5):
            await eventually(lambda n=n: len(scheduler.registered) == n and subject.registered)  # type: ignore[misc]
            scheduler.drop_connections()
            await eventually(lambda n=n: len(asked) == n)  # type: ignore[misc]
    assert asked == [1.0, 2.0, 4.0, 8.0]


async def test_warns_again_of_a_long_outage(absent: FakeScheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker_svc.registration._WARN_EVERY_S", 0.05)
    log = Log()
    async with running(registration(absent, log)):
        await eventually(lambda: len(log.of("scheduler.unreachable", "warning")) >= 3)
    assert len(log.of("scheduler.unreachable", "debug")) >= 1


async def test_unknown_host_name(absent: FakeScheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(*_: object, **__: object) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    log = Log()
    async with running(registration(absent, log, host="scheduler.invalid")):
        await eventually(lambda: len(log.of("scheduler.unreachable")) >= 3)
    assert "Name or service not known" in log.of("scheduler.unreachable")[0]["reason"]


async def test_impossible_host_name(absent: FakeScheduler) -> None:
    log = Log()
    async with running(registration(absent, log, host="a" * 64 + ".invalid")):
        await eventually(lambda: len(log.of("scheduler.unreachable")) >= 3)


async def test_second_address_is_tried(scheduler: FakeScheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of "localhost", where nothing listens at ::1."""

    def getaddrinfo(*_: object, **__: object) -> Any:
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, scheduler.port)) for host in ("127.0.0.2", "127.0.0.1")
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    subject = registration(scheduler, Log(), host="scheduler.invalid")
    async with running(subject):
        await eventually(lambda: subject.registered)


def test_hanging_resolver_does_not_delay_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    lookups = 0

    def getaddrinfo(*_: object, **__: object) -> Any:
        nonlocal lookups
        lookups += 1
        release.wait()
        return []

    async def main() -> None:
        log = Log()
        subject = Registration(
            ADVERTISED, log, host="scheduler.invalid", port=1, register_timeout_s=0.01, backoff_max_s=0.01
        )
        async with running(subject):
            await eventually(lambda: len(log.of("scheduler.unreachable")) >= 3)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    asyncio.run(main())
    assert lookups == 1  # one thread, however many attempts
    release.set()  # and the thread ends by itself, though the loop is gone


async def test_unix_socket(tmp_path: Path) -> None:
    from grpclib.server import Server

    scheduler = FakeScheduler()
    server = Server([scheduler])
    path = str(tmp_path / "s.sock")
    await server.start(path=path)
    subject = Registration(ADVERTISED, Log(), unix_path=path)
    async with running(subject):
        await eventually(lambda: subject.registered)
    server.close()
    await server.wait_closed()
    await scheduler.close()


async def test_run_twice_is_an_error(absent: FakeScheduler) -> None:
    subject = registration(absent, Log())
    async with running(subject):
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="runs already"):
            await subject.run()


def test_impossible_targets() -> None:
    with pytest.raises(ValueError, match="unix_path"):
        Registration(ADVERTISED, Log())
    with pytest.raises(ValueError, match="server_name"):
        Registration(ADVERTISED, Log(), unix_path="/s", ssl_context=ssl.create_default_context())


async def test_over_tls(tmp_path: Path) -> None:
    server_context, client_context = tls_contexts(tmp_path)
    log = Log()
    async with FakeScheduler(ssl_context=server_context) as scheduler:
        subject = registration(scheduler, log, ssl_context=client_context)
        async with running(subject):
            await eventually(lambda: subject.registered)
            await scheduler.stop()
            await eventually(lambda: not subject.registered)
            await scheduler.start()
            await eventually(lambda: subject.registered)
            await subject.deregister(10.0)
        assert [call.worker_id for call in scheduler.deregister_calls] == ["worker-2.2"]


async def test_tls_checks_the_name(tmp_path: Path) -> None:
    server_context, client_context = tls_contexts(tmp_path)
    log = Log()
    async with FakeScheduler(ssl_context=server_context) as scheduler:
        wrong = registration(scheduler, log, ssl_context=client_context, server_name="other.example")
        async with running(wrong):
            await eventually(lambda: log.of("scheduler.unreachable"))
        assert "other.example" in log.of("scheduler.unreachable")[0]["reason"]
        right = registration(scheduler, log, ssl_context=client_context, server_name="scheduler.example")
        async with running(right):
            await eventually(lambda: right.registered)


async def test_an_authority_that_was_taken_away_is_not_trusted_any_more(tmp_path: Path) -> None:
    server_context, client_context = tls_contexts(tmp_path)
    (tmp_path / "other").mkdir()
    _, others = tls_contexts(tmp_path / "other")
    log = Log()
    async with FakeScheduler(ssl_context=server_context) as scheduler:
        subject = registration(scheduler, log, ssl_context=client_context, backoff_max_s=0.01)
        async with running(subject):
            await eventually(lambda: subject.registered)
            subject.use_context(others)
            await asyncio.sleep(0)
            assert len(scheduler.register_calls) == 1  # what is open lives on
            await scheduler.stop()
            await scheduler.start()
            await eventually(lambda: "certificate verify failed" in str(log.of("scheduler.unreachable")))
            assert len(scheduler.register_calls) == 1
            subject.use_context(client_context)
            await eventually(lambda: subject.registered)


async def test_pings_unwelcome_are_left_off() -> None:
    """gRPC servers, by default, end idle connections that PING more than a few times in two hours."""
    grpc = pytest.importorskip("grpc", reason="the foreign peer, grpcio, is not installed")
    registrations = 0

    async def register(request: bytes, context: Any) -> bytes:
        nonlocal registrations
        registrations += 1
        return b"\x12\x02w1"  # workerID = "w1"

    log = Log()
    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(register)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("jobscheduler.Scheduler", {"RegisterWorker": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        subject = Registration(ADVERTISED, log, host="127.0.0.1", port=port, keepalive_s=0.05, backoff_max_s=0.01)
        async with running(subject):
            await eventually(lambda: log.of("scheduler.keepalive_refused"))
            await eventually(lambda: subject.registered)
            await asyncio.sleep(0.5)  # ten PINGs, were there any
            assert subject.registered
    finally:
        await server.stop(None)
    assert registrations == 2
    assert len(log.of("scheduler.keepalive_refused")) == 1


def tls_contexts(directory: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The server's and the client's, of a self-signed certificate for 127.0.0.1 and scheduler.example."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "scheduler.example")])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName(
        [x509.DNSName("scheduler.example"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    crt_file, key_file = directory / "crt.pem", directory / "key.pem"
    crt_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(crt_file, key_file)
    client = ssl.create_default_context(cafile=str(crt_file))
    for context in (server, client):
        context.set_alpn_protocols(["h2"])
    return server, client
