"""What a client can do to the transport, with frames built by hand over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import socket
import time
from collections.abc import Callable, Iterator
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

from tests.support.fuzzing import varint
from tests.support.grpc_host import GrpcHost
from tests.support.raw_h2 import (
    PREFACE,
    QUERY,
    START,
    STREAM,
    Answer,
    Gone,
    RawClient,
    grpc_headers,
    head,
    prefixed,
    replaced,
    without,
)
from tests.support.waiting import eventually_sync
from worker_svc.client import WorkerClient

FOLLOW = b"\x78\x01"  # StreamJobReq.follow
WAIT = "/jobscheduler.Worker/WaitJob"
CALM = 11  # ENHANCE_YOUR_CALM
REFUSED = 7
INTERNAL_ERROR = 2
CANCEL = 8
PROTOCOL_ERROR = 1


@pytest.fixture(scope="module")
def host() -> Iterator[GrpcHost]:
    with GrpcHost() as started:
        yield started


@pytest.fixture
def client(host: GrpcHost) -> Iterator[RawClient]:
    with RawClient(host.address) as connected:
        yield connected


def works(client: RawClient) -> bool:
    answer = client.answer(client.call())
    return (answer.status, answer.data) == (0, prefixed(b"\x0a\x02hi"))


def unary(channel: grpc.Channel, path: str) -> Callable[[bytes], bytes]:
    call: Any = channel.unary_unary(path)
    return call  # type: ignore[no-any-return]


def test_a_plain_call(client: RawClient) -> None:
    assert works(client)
    assert client.settings[3] == 2048  # MAX_CONCURRENT_STREAMS
    assert client.settings[6] == 65536  # MAX_HEADER_LIST_SIZE


# Headers


@pytest.mark.parametrize(
    "pairs,status,words",
    [
        (replaced(":method", "GET"), 12, "the method must be POST"),
        (without("content-type"), 2, "content-type"),
        (replaced("content-type", "text/plain"), 2, "content-type"),
        (replaced("content-type", "application/grpc+json"), 2, "content-type"),
        (without("te"), 2, "te: trailers"),
        (grpc_headers("/jobscheduler.Worker/Nothing"), 12, "there is no method"),
        ([*grpc_headers(), ("grpc-timeout", "0")], 3, "grpc-timeout"),
        ([*grpc_headers(), ("grpc-timeout", "soon")], 3, "grpc-timeout"),
        ([*grpc_headers(), ("grpc-timeout", "123456789S")], 3, "grpc-timeout"),
        ([*grpc_headers(), ("grpc-timeout", "-1S")], 3, "grpc-timeout"),
        ([*grpc_headers(), ("grpc-timeout", "0m")], 4, "time was up"),
        ([*grpc_headers(), ("grpc-timeout", "0H")], 4, "time was up"),
        ([*grpc_headers(), ("x-name", b"caf\xc3\xa9")], 3, "x-name: must be printable ASCII"),
        ([*grpc_headers(), ("user-agent", b"\xff")], 3, "user-agent"),
        (replaced(":path", b"/\xff"), 3, ":path"),
        ([*grpc_headers(), ("x-bin", "!!!")], 3, "x-bin: is not base64"),
        ([*grpc_headers(), ("x-bin", "AAAAA")], 3, "x-bin: is not base64"),
        ([*grpc_headers(), ("x-long", "v" * 70_000)], 8, "the headers take"),
        ([*grpc_headers(), *((f"x-{number}", "v") for number in range(65))], 8, "65 entries of metadata"),
    ],
)
def test_headers_that_are_refused(client: RawClient, pairs: list[Any], status: int, words: str) -> None:
    block = client.encoder.encode(pairs)
    first = HeadersFrame(1, block[:16384])
    rest = [ContinuationFrame(1, block[at : at + 16384]) for at in range(16384, len(block), 16384)]
    (rest[-1] if rest else first).flags.add("END_HEADERS")
    client._next_id = 3
    client.send(first, *rest)
    answer = client.answer(1)
    assert (answer.status, words in answer.message.replace("%25", "%")) == (status, True), answer
    assert works(client)


@pytest.mark.parametrize(
    "pairs",
    [
        without(":method"),
        without(":path"),
        without(":scheme"),
        replaced(":path", ""),
        [*grpc_headers(), (":path", "/late")],
        [(":path", "/twice"), *grpc_headers()],
        [(":unknown", "x"), *grpc_headers()],
        [*grpc_headers(), ("X-Upper", "x")],
        [*grpc_headers(), ("connection", "close")],
        [*grpc_headers(), ("transfer-encoding", "chunked")],
        [*grpc_headers(), ("x-name", b"a\r\nb: c")],
        [*grpc_headers(), ("x-name", b"a\0")],
        [*grpc_headers(), ("", "x")],
        [*grpc_headers(), (b"\xc3\xa9", "x")],
        [],
    ],
    ids=str,
)
def test_what_is_no_request_ends_its_stream_only(client: RawClient, pairs: list[Any]) -> None:
    other = client.open(grpc_headers())
    stream = client.open(pairs)
    assert client.answer(stream).reset == PROTOCOL_ERROR
    client.data(other, prefixed(b"\x0a\x02hi"))
    assert client.answer(other).status == 0


@pytest.mark.parametrize("value,expected", [("AAEC/w", b"\0\1\2\xff"), ("AAEC/w==", b"\0\1\2\xff"), ("AAA,AAE", None)])
def test_good_metadata_is_read(client: RawClient, value: str, expected: bytes | None) -> None:
    assert client.answer(client.call(START, b"\x0a\x02hi", ("x-bin", value))).status == 0


# Messages


def ask(client: RawClient, body: bytes, *extra: tuple[Any, Any], end: bool = True, path: str = START) -> Answer:
    stream = client.open([*grpc_headers(path), *extra])
    for at in range(0, len(body), 16384):
        client.data(stream, body[at : at + 16384], end=False)
    if end:
        client.data(stream, b"")
    return client.answer(stream)


@pytest.mark.parametrize(
    "body,status,words",
    [
        (b"", 3, "the request has no message"),
        (b"\0", 3, "cut off"),
        (b"\0\0\0\0\x05he", 3, "cut off"),
        (b"\0\0\0\0\x05", 3, "cut off"),
        (prefixed(b"\x0a\x05he"), 3, "command: is cut off"),
        (prefixed(b"\x08\x05"), 3, "command: must be sent as"),
        (prefixed(b"\x0b\x0c"), 3, "group"),
        (prefixed(b"\x0a\x01\xff"), 3, "command: is not valid UTF-8"),
        (prefixed(gzip.compress(b"\x0a\x02hi", mtime=0), 1), 3, "no encoding is named"),
        (prefixed(b"\x0a\x02hi", 2), 3, "marked as compressed"),
    ],
)
@pytest.mark.parametrize("path", [START, STREAM])
def test_messages_that_are_refused(client: RawClient, body: bytes, status: int, words: str, path: str) -> None:
    if path == STREAM:
        body, words = body.replace(b"\x0a", b"\x52").replace(b"\x08", b"\x50"), words.replace("command", "jobID")
    answer = ask(client, body, path=path)
    assert (answer.status, words in answer.message) == (status, True), answer
    assert works(client)


def test_a_compression_that_is_not_known(client: RawClient) -> None:
    answer = ask(client, prefixed(gzip.compress(b"\x0a\x02hi", mtime=0), 1), ("grpc-encoding", "gzip"))
    assert (answer.status, answer.headers["grpc-accept-encoding"]) == (12, "identity")
    assert ask(client, prefixed(b"\x0a\x02hi"), ("grpc-encoding", "gzip")).status == 0  # it is not used
    assert works(client)


def test_an_empty_frame_in_a_message_means_nothing(client: RawClient) -> None:
    stream = client.open(grpc_headers())
    for piece in (b"", b"\0\0", b"", b"\0\0\x04\x0a", b"\x02hi", b""):
        client.data(stream, piece, end=False)
    client.data(stream, b"")
    assert client.answer(stream).status == 0


def test_a_fault_of_ours_is_internal_and_told_to_the_log() -> None:
    with GrpcHost() as own, RawClient(own.address) as client:
        answer = client.answer(client.call("/jobscheduler.Worker/DeleteJob", b"\x52\x01x"))
        assert (answer.status, answer.message) == (13, "internal error: see the worker's log")
        assert works(client)
        own.process.stdin.close()  # type: ignore[union-attr]
        assert "a fault of ours" in own.process.stderr.read()  # type: ignore[union-attr]
        own.process.stdin = None


@pytest.mark.parametrize("size", [4 * 1024 * 1024 + 1, 2**32 - 1])
def test_what_is_too_large_is_refused_unread(host: GrpcHost, client: RawClient, size: int) -> None:
    before = host.rss_bytes()
    stream = client.open(grpc_headers())
    client.data(stream, b"\0" + size.to_bytes(4, "big"), end=False)
    answer = client.answer(stream)
    assert (answer.status, f"{size} bytes" in answer.message) == (8, True)
    assert host.rss_bytes() - before < 4_000_000
    assert works(client)


def test_the_largest_message_is_read(client: RawClient) -> None:
    stdin = b"i" * (4 * 1024 * 1024 - 16)
    message = b"\x0a\x02hi\x6a" + varint(len(stdin)) + stdin
    with grpc.insecure_channel("{}:{}".format(*client.socket.getpeername())) as channel:
        assert unary(channel, START)(message) == b"\x0a\x02hi"


def test_memory_for_what_is_arriving_is_shared_out() -> None:
    with GrpcHost(max_receiving_bytes=1_000_000) as host, RawClient(host.address) as client:
        big = prefixed(b"x" * 200_000)
        held = [client.open(grpc_headers()) for _ in range(2)]
        client.data(held[0], big[:1000], end=False)
        eventually_sync(lambda: host.ask("claimed") == "200000")
        client.data(held[1], big[:1000], end=False)
        refused = client.answer(held[1])
        assert (refused.status, "arriving" in refused.message) == (8, True)
        assert host.ask("claimed") == "200000"
        client.send(RstStreamFrame(held[0], error_code=8))
        eventually_sync(lambda: host.ask("claimed") == "0")
        assert works(client)


# Frames


def test_frames_that_http2_does_not_know_are_ignored(client: RawClient) -> None:
    stream = client.open(grpc_headers())
    client.send(head(0x42, 5, 0xFF, 0) + b"hello", head(0xFE, 0, 0, stream), head(0x0A, 4, 0, 0) + b"\0\0ab")
    client.data(stream, prefixed(b"\x0a\x02hi"))
    assert client.answer(stream).status == 0


def test_a_wrong_content_length_ends_its_stream_only(client: RawClient) -> None:
    stream = client.open([*grpc_headers(), ("content-length", "3")])
    client.data(stream, prefixed(b"\x0a\x02hi"))
    assert client.answer(stream).reset == PROTOCOL_ERROR
    for _ in range(100):  # nor does it cost the connection its window
        stream = client.open([*grpc_headers(), ("content-length", "3")])
        client.data(stream, b"x" * 16000)
        client.answer(stream)
    assert works(client)


@pytest.mark.parametrize(
    "sent,codes",
    [
        (head(0, 5, 0, 0) + b"hello", {PROTOCOL_ERROR}),  # DATA on stream 0
        (head(0, 16385, 0, 1), {6}),  # larger than any frame may be
        (head(1, 2**24 - 1, 4, 1), {6}),
        (head(1, 3, 4, 1) + b"\xff\xff\xff", {PROTOCOL_ERROR, 9}),  # no HPACK
        (head(9, 3, 4, 1) + b"abc", {PROTOCOL_ERROR}),  # CONTINUATION of nothing
        (head(6, 7, 0, 0) + b"seven b", {PROTOCOL_ERROR, 6}),  # PING of another size
        (head(4, 5, 0, 0) + b"abcde", {PROTOCOL_ERROR, 6}),
        (head(8, 4, 0, 0) + b"\0\0\0\0", {PROTOCOL_ERROR}),  # WINDOW_UPDATE by nothing
        (head(5, 4, 4, 1) + b"\0\0\0\2", {PROTOCOL_ERROR}),  # PUSH_PROMISE of a client
        (head(0, 3, 8, 1) + b"\xff\0\0", {PROTOCOL_ERROR, 5}),  # padding longer than the frame
        (head(1, 1, 4, 2) + b"\x82", {PROTOCOL_ERROR}),  # a server's stream
    ],
)
def test_what_is_no_http2_ends_its_connection_only(host: GrpcHost, sent: bytes, codes: set[int]) -> None:
    with RawClient(host.address) as other, RawClient(host.address) as client:
        waiting = other.call(QUERY, b"\x0a\x030.2")
        client.send(sent)
        assert client.wait_goaway().error_code in codes
        client.wait_gone()
        assert other.answer(waiting).status == 0


def test_what_is_not_even_http(host: GrpcHost) -> None:
    for greeting in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\0\xa5" + b"\0" * 200, b"\0" * 100_000):
        with RawClient(host.address, begin=False) as client:
            try:
                client.send(greeting)
                client.wait_gone()
            except OSError:  # hung up while we were sending
                continue


# Floods


def flood(client: RawClient, frames: list[Frame], rounds: int) -> int:
    """Sends them again and again until the server hangs up; returns the code of its GOAWAY."""
    data = b"".join(frame.serialize() for frame in frames)
    client.socket.settimeout(20)
    try:
        for _ in range(rounds):
            client.send(data)
    except OSError:  # hung up while we were sending
        pass
    try:
        return client.wait_goaway().error_code
    except Gone:
        return -1


def resets(client: RawClient, count: int = 100) -> list[Frame]:
    made: list[Frame] = []
    for _ in range(count):
        made += [client.headers_frame(client._next_id, grpc_headers()), RstStreamFrame(client._next_id, error_code=8)]
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


def test_rapid_reset_ends_the_connection(host: GrpcHost) -> None:
    with RawClient(host.address) as client:
        assert flood(client, resets(client, 300), 1) == CALM


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


# Limits


def test_followers_never_starve_a_stop() -> None:
    with GrpcHost(max_streams=16) as host, RawClient(host.address) as client:
        lasting = [client.call(STREAM, FOLLOW) for _ in range(13)] + [client.call(WAIT, b"\x52\x01x")]
        one_more = client.answer(client.call(STREAM, FOLLOW))
        assert (one_more.status, "use another one" in one_more.message) == (8, True)
        assert client.answer(client.call(WAIT, b"\x52\x01x")).status == 8
        assert works(client)
        plain = [client.call(QUERY, b"\x0a\x0210") for _ in range(2)]
        assert not any(client.is_answered(stream) for stream in lasting + plain)
        client.send(*(RstStreamFrame(stream, error_code=8) for stream in lasting))
        again = client.call(STREAM, FOLLOW)
        assert works(client)
        assert not client.is_answered(again)


def test_who_opens_more_streams_than_it_was_told_it_may() -> None:
    with GrpcHost(max_streams=8) as host, RawClient(host.address) as client:
        assert works(client)  # so that it has said that it knows
        for _ in range(9):
            client.call(QUERY, b"\x0a\x0210")
        assert client.wait_goaway().error_code == PROTOCOL_ERROR


def test_connections_of_one_peer_and_in_all() -> None:
    with GrpcHost(max_connections=5, max_connections_per_peer=3) as host:
        host.warns = "too many connections (transport.max_connections, max_connections_per_peer): 1 refused"
        mine = [RawClient(host.address) for _ in range(3)]
        assert all(works(client) for client in mine)
        with RawClient(host.address, begin=False) as refused:
            refused.wait_gone()
        others = [RawClient(host.address, source="127.0.0.2") for _ in range(2)]
        assert all(works(client) for client in others)
        with RawClient(host.address, begin=False, source="127.0.0.3") as refused:
            refused.wait_gone()
        mine.pop().close()
        eventually_sync(lambda: host.ask("connections") == "4")
        with RawClient(host.address) as client:
            assert works(client)
        for client in mine + others:
            client.close()


def is_served(host: GrpcHost, source: str) -> bool:
    try:
        with RawClient(host.address, source=source) as client:
            return works(client)
    except (Gone, OSError):
        return False


def silent(host: GrpcHost, count: int, source: str) -> list[RawClient]:
    return [RawClient(host.address, begin=False, source=source) for _ in range(count)]


def test_who_says_nothing_makes_way() -> None:
    """For whoever comes, of the same address or another; who has begun to speak stays."""
    with GrpcHost(max_connections=16, max_connections_per_peer=8, connect_timeout_s=60.0) as host:
        host.warns = "too many connections"
        with RawClient(host.address) as first, RawClient(host.address, source="127.0.0.2") as second:
            assert works(first)
            assert works(second)
            held = [one for source in ("127.0.0.2", "127.0.0.3") for one in silent(host, 30, source)]
            for source in ("127.0.0.1", "127.0.0.4"):
                with RawClient(host.address, source=source) as client:
                    assert works(client)
            for source in ("127.0.0.2", "127.0.0.3"):  # once the silent ones of its own address had time to speak
                eventually_sync(lambda source=source: is_served(host, source))  # type: ignore[misc]
            assert works(first)
            assert works(second)
            assert int(host.ask("connections")) <= 16
        for one in held:
            one.close()


def test_requests_a_second() -> None:
    with (
        GrpcHost(requests_per_s=1, requests_burst=5) as host,
        RawClient(host.address) as client,
        RawClient(host.address) as second,
        RawClient(host.address, source="127.0.0.2") as other,
    ):
        assert all(works(client) for _ in range(5))
        refused = second.answer(second.call())  # another connection, the same peer
        assert (refused.status, "slow down" in refused.message) == (8, True)
        assert works(other)
        time.sleep(1.2)
        assert works(client)
        answers = [client.answer(stream).status for stream in [client.call() for _ in range(100)]]
        assert answers.count(8) > 50


# Time


def test_a_connection_that_never_begins() -> None:
    with GrpcHost(connect_timeout_s=0.5) as host, RawClient(host.address) as good:
        with RawClient(host.address, begin=False) as silent, RawClient(host.address, begin=False) as slow:
            slow.send(PREFACE[:10])
            silent.wait_gone()
            slow.wait_gone()
        assert works(good)


def test_a_request_that_never_comes() -> None:
    with GrpcHost(request_timeout_s=0.5) as host, RawClient(host.address) as client:
        follower = client.call(STREAM, FOLLOW)
        headers_only = client.open(grpc_headers())
        half = client.open(grpc_headers(STREAM))
        client.data(half, prefixed(b"x" * 100)[:50], end=False)
        for stream in (headers_only, half):
            answer = client.answer(stream)
            assert (answer.status, "did not arrive in time" in answer.message) == (4, True)
        assert not client.is_answered(follower)
        assert host.ask("claimed") == "0"
        assert works(client)


def test_an_answer_that_is_not_read() -> None:
    """A large one does not stay for ever."""
    with GrpcHost(request_timeout_s=0.5) as host, RawClient(host.address) as client:
        client.opens_windows = False
        command = b"x" * 200_000  # which is what StartJob answers here
        stream = client.open(grpc_headers())
        body = prefixed(b"\x0a" + varint(len(command)) + command)
        for at in range(0, len(body), 16384):
            client.data(stream, body[at : at + 16384], end=at + 16384 >= len(body))
        eventually_sync(lambda: int(host.ask("sending")) > 100_000)  # what its window has no room for
        assert client.answer(stream).reset == CANCEL
        eventually_sync(lambda: host.ask("sending") == "0")


@pytest.mark.parametrize("sent", [head(1, 100, 4, 1) + b"\x82", head(6, 8)[:5], head(1, 1, 0, 1) + b"\x82"])
def test_a_frame_that_never_ends(sent: bytes) -> None:
    """Nor can such a client answer a PING: it is taken for dead."""
    with GrpcHost(keepalive_s=0.2, keepalive_timeout_s=0.3) as host, RawClient(host.address) as client:
        assert works(client)
        client.send(sent)
        client.wait_gone()


def test_an_idle_connection() -> None:
    with GrpcHost(idle_timeout_s=0.5) as host, RawClient(host.address) as idle, RawClient(host.address) as busy:
        follower = busy.call(STREAM, FOLLOW)
        assert idle.wait_goaway().error_code == 0
        idle.wait_gone()
        time.sleep(1.5)
        assert works(busy)
        assert not busy.is_answered(follower)


def test_keepalive() -> None:
    with (
        GrpcHost(keepalive_s=0.3, keepalive_timeout_s=0.5) as host,
        RawClient(host.address) as alive,
        RawClient(host.address) as dead,
    ):
        dead.answers_pings = False
        dead.call(STREAM, FOLLOW)
        for client in (alive, dead):
            client.socket.settimeout(0.05)
        until_s = time.monotonic() + 10
        is_gone = False
        while time.monotonic() < until_s and not (is_gone and alive.pings >= 4):
            for client in (alive, dead):
                try:
                    client.receive()
                except TimeoutError:
                    continue
                except Gone:
                    assert client is dead
                    is_gone = True
        assert is_gone
        assert dead.pings == 1
        alive.socket.settimeout(20)
        assert works(alive)


def test_keepalive_of_the_client(host: GrpcHost) -> None:
    options = [("grpc.keepalive_time_ms", 1000), ("grpc.keepalive_permit_without_calls", 1)]
    with grpc.insecure_channel(host.address, options=options) as channel:
        assert unary(channel, QUERY)(b"\x0a\x013") == b"\x08\x01"


def test_a_client_that_does_not_read_costs_little(host: GrpcHost) -> None:
    before = host.rss_bytes()
    with RawClient(host.address, settings={4: 2**31 - 1}) as client:
        client.send(WindowUpdateFrame(0, window_increment=2**31 - 1 - 65535))
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for _ in range(20):
            client.call(STREAM, b"\x70\xff\xff\x03")  # a gigabyte each
        time.sleep(1.0)
        assert host.rss_bytes() - before < 16_000_000
        with RawClient(host.address) as other:
            assert works(other)


# Leaving


def test_leaving_tells_everyone() -> None:
    with (
        GrpcHost() as host,
        RawClient(host.address) as idle,
        RawClient(host.address) as busy,
        RawClient(host.address) as follower,
    ):
        assert works(idle)
        short = busy.call(QUERY, b"\x0a\x030.5")
        following = follower.call(STREAM, FOLLOW)
        assert works(follower)
        assert works(busy)
        host.tell("leave 1.0")
        assert idle.wait_goaway().error_code == 0
        assert busy.answer(busy.call()).reset == REFUSED
        assert busy.answer(short).status == 0
        told = follower.answer(following)
        assert (told.status, "connect again" in told.message) == (14, True)
        for client in (idle, busy, follower):
            assert client.wait_goaway().error_code == 0
            client.wait_gone()
        assert host.answer() == "0"
        with pytest.raises(ConnectionRefusedError):
            RawClient(host.address)


def test_leaving_with_clients_that_stay() -> None:
    """They neither read nor hang up; and ones of grpcio, which connect again when they can."""
    with GrpcHost() as host:
        silent = [RawClient(host.address) for _ in range(5)]
        half_open = RawClient(host.address, begin=False)
        for client in silent:
            client.call(STREAM, b"\x70\xff\xff\x03\x78\x01")
        with grpc.insecure_channel(host.address) as channel:
            stream: Any = channel.unary_stream(STREAM)
            follow = stream(b"\x70\x01\x78\x01")
            assert next(follow)
            host.tell("leave 0.2")
            with pytest.raises(grpc.RpcError) as caught:
                next(follow)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "connect again" in str(caught.value.details())
            assert host.answer() == "0"  # with none of them left, though they are all there
        for client in [*silent, half_open]:
            client.close()


async def test_the_last_answer_reaches_a_client_of_grpclib() -> None:
    """Which drops an answer that it reads together with a GOAWAY."""
    with GrpcHost() as host:
        async with WorkerClient(host.address) as client:
            calls = [asyncio.create_task(client.query(f"0.{number}")) for number in range(3, 8)]
            await client.query("0.2")
            host.tell("leave 5")
            assert all(answer.done for answer in await asyncio.gather(*calls))
        assert host.answer() == "0"


def test_a_connection_leaves_nothing_for_the_collector_to_find() -> None:
    """To look through what thousands left behind takes 50 ms, in which nobody is served."""
    connections = 20
    with GrpcHost() as host:
        host.ask("garbage")
        for number in range(connections):
            with RawClient(host.address) as client:
                assert client.answer(client.call()).status == 0
                if number % 3 == 1:
                    client.call(QUERY, b"\x0a\x043600")  # is left while it runs
                if number % 3 == 2:
                    client.send(head(0, 2**24 - 1, 0, 1))
                    client.wait_gone()
        eventually_sync(lambda: host.ask("connections") == "0")
        # asyncio's transport is one with its socket and the like: 6 each. Ours would be 50 more.
        assert int(host.ask("garbage")) < connections * 15


def test_connections_that_wait_for_their_turn_are_closed_when_the_server_leaves() -> None:
    with GrpcHost() as host:
        made = [socket.create_connection(("127.0.0.1", host.port), timeout=20) for _ in range(200)]
        host.tell("leave 0")
        for one in made:
            with one, contextlib.suppress(ConnectionResetError):  # by the kernel, where it was not even accepted
                while one.recv(4096):
                    pass
        assert host.answer() == "0"
