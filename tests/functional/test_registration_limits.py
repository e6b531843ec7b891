"""What a scheduler can send: no more than a registration takes, whatever it is made of."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    HeadersFrame,
    PingFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from tests.support.fake_scheduler import FakeScheduler
from tests.support.raw_h2 import head
from tests.support.registering import Log, registration, running
from tests.support.waiting import eventually

FLOODS: dict[str, list[Frame]] = {
    "settings": [SettingsFrame(0, settings={4: 65535})] * 1000,
    "pings": [PingFrame(0, opaque_data=b"12345678")] * 1000,
    "windows": [WindowUpdateFrame(0, window_increment=1)] * 1000,
    "headers without end": [HeadersFrame(1, b"\x88"), *[ContinuationFrame(1, b"\0\1a\1b" * 200)] * 1000],
    "empty continuations": [HeadersFrame(1, b"\x88"), *[ContinuationFrame(1, b"")] * 4000],
    "a huge answer": [DataFrame(1, b"\0" + struct.pack("!I", 2**20) + b"x" * 16000)] * 8,
}
UNKNOWN = head(0x42, 5, 0xFF, 0) + b"hello"


@asynccontextmanager
async def flooding(data: bytes) -> AsyncIterator[tuple[FakeScheduler, Callable[[], int]]]:
    """A scheduler that sends it to whoever connects, again and again; and how many bytes of it went out at most."""
    most = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal most
        sent = 0
        try:
            writer.write(SettingsFrame(0).serialize())
            while True:
                await reader.read(4096)
                while not writer.is_closing():
                    writer.write(data)
                    await writer.drain()
                    sent += len(data)
                    most = max(most, sent)
                return
        except ConnectionError:
            return
        finally:
            writer.close()

    scheduler = FakeScheduler()
    server = await asyncio.start_server(serve, scheduler.host, scheduler.port, reuse_address=True)
    try:
        yield scheduler, lambda: most
    finally:
        server.close()
        await scheduler.close()


@pytest.mark.parametrize("name", [*FLOODS, "unknown frames"])
async def test_a_flood_instead_of_an_answer(name: str) -> None:
    data = UNKNOWN * 1000 if name == "unknown frames" else b"".join(frame.serialize() for frame in FLOODS[name])
    log = Log()
    async with flooding(data) as (scheduler, most_sent), running(registration(scheduler, log)):
        await eventually(lambda: len(log.of("scheduler.unreachable")) >= 3)
    [first] = log.of("scheduler.unreachable", "warning")
    assert most_sent() < 16 * 2**20  # what the kernel's buffers took, and no more
    foreseen = ("it sends more than the 32768 bytes that a registration may take", "Protocol error")
    assert first["reason"] in foreseen
    assert "exc_info" not in first


@pytest.mark.parametrize("name", ["settings", "pings"])
async def test_a_flood_after_the_answer(name: str) -> None:
    log = Log()
    async with FakeScheduler() as scheduler:
        subject = registration(scheduler, log)
        async with running(subject):
            await eventually(lambda: subject.registered)
            assert scheduler.server is not None
            [protocol] = scheduler.server.protocols
            for _ in range(3):
                protocol.transport.write(b"".join(frame.serialize() for frame in FLOODS[name]))
            await eventually(lambda: subject.scheduler_worker_id == "worker-1.2")
    [lost] = log.of("scheduler.lost")
    assert lost["reason"] == "it sends more than the 32768 bytes that a registration may take"


async def test_frames_that_http2_does_not_know_are_ignored() -> None:
    log = Log()
    async with FakeScheduler() as scheduler:
        subject = registration(scheduler, log)
        async with running(subject):
            await eventually(lambda: subject.registered)
            assert scheduler.server is not None
            [protocol] = scheduler.server.protocols
            protocol.transport.write(UNKNOWN)
            pings = len(log.lines)
            await asyncio.sleep(0)
            await subject.deregister(20.0)  # over the same connection
        assert [call.worker_id for call in scheduler.deregister_calls] == ["worker-1.1"]
        assert len(log.lines) == pings + 1
