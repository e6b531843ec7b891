"""A server that leaves."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

import grpc
import pytest

from tests.support.grpc_host import GrpcHost
from tests.support.raw_h2 import (
    QUERY,
    STREAM,
    RawClient,
    head,
)
from tests.support.transport import FOLLOW, works
from tests.support.waiting import PATIENCE_S, eventually_sync
from worker_svc.client import WorkerClient

REFUSED = 7


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
        made = [socket.create_connection(("127.0.0.1", host.port), timeout=PATIENCE_S) for _ in range(200)]
        host.tell("leave 0")
        for one in made:
            with one, contextlib.suppress(ConnectionResetError):  # by the kernel, where it was not even accepted
                while one.recv(4096):
                    pass
        assert host.answer() == "0"
