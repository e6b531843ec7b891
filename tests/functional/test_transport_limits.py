"""How many calls and connections there may be, and for how long."""

from __future__ import annotations

import socket
import time

import grpc
import pytest
from hyperframe.frame import (
    RstStreamFrame,
    WindowUpdateFrame,
)

from tests.support.fuzzing import varint
from tests.support.grpc_host import GrpcHost
from tests.support.raw_h2 import (
    PREFACE,
    QUERY,
    STREAM,
    Gone,
    RawClient,
    grpc_headers,
    head,
    prefixed,
)
from tests.support.transport import FOLLOW, PROTOCOL_ERROR, unary, works
from tests.support.waiting import PATIENCE_S, eventually_sync

WAIT = "/jobscheduler.Worker/WaitJob"

CANCEL = 8


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
        until_s = time.monotonic() + PATIENCE_S
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
        alive.socket.settimeout(PATIENCE_S)
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


@pytest.mark.parametrize("path", [STREAM, WAIT])
def test_a_request_has_one_message(host: GrpcHost, path: str) -> None:
    """More of them would be kept for nobody, as long as the call lasts."""
    with RawClient(host.address) as client:
        stream = client.open(grpc_headers(path))
        client.data(stream, prefixed(FOLLOW if path == STREAM else b"\x52\x01x"), end=False)
        assert works(client)
        client.data(stream, prefixed(b""), end=False)
        answer = client.answer(stream)
        assert (answer.status, answer.message) == (3, "the request has more than one message")
        both = client.open(grpc_headers(QUERY))
        client.data(both, prefixed(b"") * 2)
        assert client.answer(both).status == 3


def test_an_answer_that_its_window_does_not_hold_comes_whole_before_the_request_has_ended(host: GrpcHost) -> None:
    with RawClient(host.address) as client:
        stream = client.open(grpc_headers())
        text = b"x" * 100_000
        message = b"\x0a" + varint(len(text)) + text
        for begin in range(0, len(message) + 5, 16384):
            client.data(stream, prefixed(message)[begin : begin + 16384], end=False)
        while client.received(stream) < 65535:
            client.receive()
        assert works(client)
        assert not client.is_answered(stream)
        client.send(WindowUpdateFrame(stream, window_increment=100_000))
        answer = client.answer(stream)
        assert (answer.status, answer.data) == (0, prefixed(message))
