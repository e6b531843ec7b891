"""What floods the transport ends, and honest use of it does not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from tests.support.grpc_host import GrpcHost
from tests.support.raw_h2 import (
    QUERY,
    STREAM,
    Gone,
    RawClient,
    grpc_headers,
    without,
)
from tests.support.transport import FOLLOW, PROTOCOL_ERROR, works
from tests.support.waiting import PATIENCE_S
from worker_svc.client import WorkerClient

CALM = 11  # ENHANCE_YOUR_CALM

INTERNAL_ERROR = 2


# Floods


def flood(client: RawClient, frames: list[Frame], rounds: int) -> int:
    """Sends them again and again until the server hangs up; returns the code of its GOAWAY."""
    data = b"".join(frame.serialize() for frame in frames)
    client.socket.settimeout(PATIENCE_S)
    try:
        for _ in range(rounds):
            client.send(data)
    except OSError:  # hung up while we were sending
        pass
    try:
        return client.wait_goaway().error_code
    except Gone:
        return -1


def resets(client: RawClient, count: int = 100, code: int = 8) -> list[Frame]:
    made: list[Frame] = []
    for _ in range(count):
        reset = RstStreamFrame(client._next_id, error_code=code)
        made += [client.headers_frame(client._next_id, grpc_headers()), reset]
        client._next_id += 2
    return made


FLOODS: dict[str, Callable[[RawClient], list[Frame]]] = {
    "ping": lambda client: [PingFrame(0, opaque_data=b"12345678")] * 100,
    "ping acks": lambda client: [PingFrame(0, opaque_data=b"12345678", flags=["ACK"])] * 100,
    "settings": lambda client: [SettingsFrame(0, settings={4: 65535})] * 100,
    "priority": lambda client: [PriorityFrame(1, depends_on=3, stream_weight=1)] * 100,
    "window": lambda client: [WindowUpdateFrame(0, window_increment=1)] * 100,
    "resets of nothing": lambda client: [*resets(client, 1), *([RstStreamFrame(1, error_code=8)] * 99)],
    "empty data": lambda client: [client.headers_frame(1, grpc_headers()), *([DataFrame(1, b"")] * 99)],
}


@pytest.mark.parametrize("name", FLOODS)
def test_floods_end_the_connection(host: GrpcHost, name: str) -> None:
    with RawClient(host.address) as client:
        first = FLOODS[name](client)
        client.send(first[0])
        assert flood(client, first[1:], 100) in (CALM, INTERNAL_ERROR)
    with RawClient(host.address) as client:
        assert works(client)


@pytest.mark.parametrize("code", [0, 7, 8])
def test_rapid_reset_ends_the_connection(host: GrpcHost, code: int) -> None:
    """Whatever is given as its reason; 0 and 7 (REFUSED_STREAM) are those that we give for streams of theirs."""
    with RawClient(host.address) as client:
        assert flood(client, resets(client, 300, code), 1) == CALM


def test_a_stream_is_charged_once_however_often_it_is_reset() -> None:
    """HTTP/2 libraries do so for each frame that was under way when they closed it."""
    with GrpcHost(resets_per_s=10, control_frames_per_s=1) as host, RawClient(host.address) as client:
        streams = [client.call(STREAM, b"\x70\x03" + FOLLOW) for _ in range(20)]  # three frames each
        while not all(client.received(stream) > 3 * 16384 for stream in streams):
            client.receive()
        client.send(*[RstStreamFrame(stream, error_code=8) for stream in streams for _ in range(3)])
        assert works(client)
        more_than_we_sent: list[Frame] = [RstStreamFrame(streams[0], error_code=8)] * 100
        assert flood(client, more_than_we_sent, 100) in (CALM, INTERNAL_ERROR)


def test_calls_whose_time_is_up_are_not_charged() -> None:
    with GrpcHost(resets_per_s=10) as host, RawClient(host.address) as client:
        streams = [client.call(QUERY, b"\x0a\x043600", ("grpc-timeout", "90m")) for _ in range(100)]
        client.send(*(RstStreamFrame(stream, error_code=8) for stream in streams))
        assert works(client)


async def test_closing_many_streams_of_a_client_library_ends_no_other_call() -> None:
    with GrpcHost(resets_per_s=10, control_frames_per_s=1) as host:
        async with WorkerClient(host.address) as client:

            async def follow() -> None:
                async for _ in client.output("x", tail_lines=10_000):
                    started.release()

            started = asyncio.Semaphore(0)
            waiting = asyncio.create_task(client.query("1"))
            followers = [asyncio.create_task(follow()) for _ in range(20)]
            for _ in range(500):
                await started.acquire()
            for follower in followers:
                follower.cancel()
            await asyncio.wait(followers)
            assert (await waiting).done


def test_streams_that_we_have_to_reset_count_too(host: GrpcHost) -> None:
    with RawClient(host.address) as client:
        frames: list[Frame] = [client.headers_frame(number, without(":path")) for number in range(1, 801, 2)]
        assert flood(client, frames, 1) == CALM


def test_a_header_block_without_end(host: GrpcHost) -> None:
    before = host.rss_bytes()
    with RawClient(host.address) as client:
        client.send(HeadersFrame(1, client.encoder.encode(grpc_headers())))
        assert flood(client, [ContinuationFrame(1, b"\0" * 16384)], 100) in (CALM, -1)
    with RawClient(host.address) as client:
        client.send(HeadersFrame(1, client.encoder.encode(grpc_headers())))
        assert flood(client, [ContinuationFrame(1, b"")], 5000) in (CALM, PROTOCOL_ERROR)
    assert host.rss_bytes() - before < 8_000_000


def test_a_header_bomb(host: GrpcHost) -> None:
    """A large entry of the table, named thousands of times: much made of little."""
    with RawClient(host.address) as client:
        big = client.encoder.encode([("x-big", "v" * 4000)])
        frame = HeadersFrame(1, client.encoder.encode(grpc_headers()) + big + b"\xbe" * 10_000)
        frame.flags.add("END_HEADERS")
        assert flood(client, [frame], 1) in (CALM, PROTOCOL_ERROR)


def test_headers_that_are_large_and_come_in_few_bytes(host: GrpcHost) -> None:
    """Each request is within its limit, a byte for each 3 kB: of all of them only some are held at once."""
    with RawClient(host.address) as client:
        large = ("x-large", "v" * 3000)
        assert client.answer(client.open([*grpc_headers(QUERY), large], end=True)).status == 3
        before = host.rss_bytes(peak=True)
        frames = [
            client.headers_frame(number, [*grpc_headers(QUERY), *([large] * 15)], end=True)
            for number in range(3, 1600, 2)
        ]
        client.send(*frames)  # 20 kB that are 38 MB
        assert client.answer(frames[-1].stream_id).status == 3
        assert host.rss_bytes(peak=True) - before < 12_000_000


def test_who_makes_honest_use_of_it_is_not_taken_for_an_abuser(host: GrpcHost) -> None:
    with RawClient(host.address) as client:
        followers = [client.call(STREAM, FOLLOW) for _ in range(1000)]
        assert works(client)
        time.sleep(1.1)
        client.send(*(RstStreamFrame(stream, error_code=8) for stream in followers))  # all at once
        assert works(client)
    with grpc.insecure_channel(host.address) as channel:
        stream: Any = channel.unary_stream(STREAM)
        assert sum(len(chunk) for chunk in stream(b"\x70\xd0\x0f")) > 2000 * 16384
