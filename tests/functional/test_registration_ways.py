"""How often and by which way a worker registers: backoff, names, addresses, TLS."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_scheduler import FakeScheduler
from tests.support.registering import ADVERTISED, NEVER_S, Log, registration, running, tls_contexts
from tests.support.waiting import eventually, stays
from worker_svc.registration import Registration


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
            assert await asyncio.to_thread(stays, lambda: subject.registered, 0.5)  # ten PINGs, were there any
    finally:
        await server.stop(None)
    assert registrations == 2
    assert len(log.of("scheduler.keepalive_refused")) == 1
