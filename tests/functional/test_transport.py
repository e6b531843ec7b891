"""Headers, messages and frames, built by hand over real sockets."""

from __future__ import annotations

import gzip
from typing import Any

import grpc
import pytest
from hyperframe.frame import (
    ContinuationFrame,
    HeadersFrame,
    RstStreamFrame,
)

from tests.support.fuzzing import varint
from tests.support.grpc_host import GrpcHost
from tests.support.raw_h2 import (
    QUERY,
    START,
    STREAM,
    Answer,
    RawClient,
    grpc_headers,
    head,
    prefixed,
    replaced,
    without,
)
from tests.support.transport import PROTOCOL_ERROR, unary, works
from tests.support.waiting import eventually_sync


def test_a_plain_call(raw: RawClient) -> None:
    assert works(raw)
    assert raw.settings[3] == 2048  # MAX_CONCURRENT_STREAMS
    assert raw.settings[6] == 65536  # MAX_HEADER_LIST_SIZE


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
        (grpc_headers("/" + "%" * 50_000), 12, "there is no method"),
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
def test_headers_that_are_refused(raw: RawClient, pairs: list[Any], status: int, words: str) -> None:
    block = raw.encoder.encode(pairs)
    first = HeadersFrame(1, block[:16384])
    rest = [ContinuationFrame(1, block[at : at + 16384]) for at in range(16384, len(block), 16384)]
    (rest[-1] if rest else first).flags.add("END_HEADERS")
    raw._next_id = 3
    raw.send(first, *rest)
    answer = raw.answer(1)
    assert (answer.status, words in answer.message.replace("%25", "%")) == (status, True), answer
    assert len(answer.message) < 7000  # clients take no more than 8 KiB of trailers
    assert works(raw)


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
def test_what_is_no_request_ends_its_stream_only(raw: RawClient, pairs: list[Any]) -> None:
    other = raw.open(grpc_headers())
    stream = raw.open(pairs)
    assert raw.answer(stream).reset == PROTOCOL_ERROR
    raw.data(other, prefixed(b"\x0a\x02hi"))
    assert raw.answer(other).status == 0


@pytest.mark.parametrize("value,expected", [("AAEC/w", b"\0\1\2\xff"), ("AAEC/w==", b"\0\1\2\xff"), ("AAA,AAE", None)])
def test_good_metadata_is_read(raw: RawClient, value: str, expected: bytes | None) -> None:
    assert raw.answer(raw.call(START, b"\x0a\x02hi", ("x-bin", value))).status == 0


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
def test_messages_that_are_refused(raw: RawClient, body: bytes, status: int, words: str, path: str) -> None:
    if path == STREAM:
        body, words = body.replace(b"\x0a", b"\x52").replace(b"\x08", b"\x50"), words.replace("command", "jobID")
    answer = ask(raw, body, path=path)
    assert (answer.status, words in answer.message) == (status, True), answer
    assert works(raw)


def test_a_compression_that_is_not_known(raw: RawClient) -> None:
    answer = ask(raw, prefixed(gzip.compress(b"\x0a\x02hi", mtime=0), 1), ("grpc-encoding", "gzip"))
    assert (answer.status, answer.headers["grpc-accept-encoding"]) == (12, "identity")
    assert ask(raw, prefixed(b"\x0a\x02hi"), ("grpc-encoding", "gzip")).status == 0  # it is not used
    assert works(raw)


def test_an_empty_frame_in_a_message_means_nothing(raw: RawClient) -> None:
    stream = raw.open(grpc_headers())
    for piece in (b"", b"\0\0", b"", b"\0\0\x04\x0a", b"\x02hi", b""):
        raw.data(stream, piece, end=False)
    raw.data(stream, b"")
    assert raw.answer(stream).status == 0


def test_a_fault_of_ours_is_internal_and_told_to_the_log() -> None:
    with GrpcHost() as own, RawClient(own.address) as client:
        answer = client.answer(client.call("/jobscheduler.Worker/DeleteJob", b"\x52\x01x"))
        assert (answer.status, answer.message) == (13, "internal error: see the worker's log")
        assert works(client)
        own.process.stdin.close()  # type: ignore[union-attr]
        assert "a fault of ours" in own.process.stderr.read()  # type: ignore[union-attr]
        own.process.stdin = None


@pytest.mark.parametrize("size", [4 * 1024 * 1024 + 1, 2**32 - 1])
def test_what_is_too_large_is_refused_unread(host: GrpcHost, raw: RawClient, size: int) -> None:
    before = host.rss_bytes()
    stream = raw.open(grpc_headers())
    raw.data(stream, b"\0" + size.to_bytes(4, "big"), end=False)
    answer = raw.answer(stream)
    assert (answer.status, f"{size} bytes" in answer.message) == (8, True)
    assert host.rss_bytes() - before < 4_000_000
    assert works(raw)


def test_the_largest_message_is_read(raw: RawClient) -> None:
    stdin = b"i" * (4 * 1024 * 1024 - 16)
    message = b"\x0a\x02hi\x6a" + varint(len(stdin)) + stdin
    with grpc.insecure_channel("{}:{}".format(*raw.socket.getpeername())) as channel:
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


def test_frames_that_http2_does_not_know_are_ignored(raw: RawClient) -> None:
    stream = raw.open(grpc_headers())
    raw.send(head(0x42, 5, 0xFF, 0) + b"hello", head(0xFE, 0, 0, stream), head(0x0A, 4, 0, 0) + b"\0\0ab")
    raw.data(stream, prefixed(b"\x0a\x02hi"))
    assert raw.answer(stream).status == 0


def test_a_wrong_content_length_ends_its_stream_only(raw: RawClient) -> None:
    stream = raw.open([*grpc_headers(), ("content-length", "3")])
    raw.data(stream, prefixed(b"\x0a\x02hi"))
    assert raw.answer(stream).reset == PROTOCOL_ERROR
    for _ in range(100):  # nor does it cost the connection its window
        stream = raw.open([*grpc_headers(), ("content-length", "3")])
        raw.data(stream, b"x" * 16000)
        raw.answer(stream)
    assert works(raw)


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
