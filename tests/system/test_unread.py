"""Clients that do not read what they asked for: the worker holds next to nothing of it, and serves others."""

from __future__ import annotations

from typing import Any

import pytest
from hyperframe.frame import WindowUpdateFrame

from tests.support.programs import rss_bytes
from tests.support.raw_h2 import QUERY, STREAM, RawClient, grpc_headers
from tests.support.workers import Worker
from worker_svc.client import WorkerClient
from worker_svc.pb import jobscheduler as pb
from worker_svc.wire.codec import encode

MIB = 2**20
WIDE = 2**31 - 1
DEFAULT = 65535
WAIT = "/jobscheduler.Worker/WaitJob"
LIST = "/jobscheduler.Worker/ListJobs"


def unread(worker: Worker, path: str, message: bytes, count: int, window: int) -> RawClient:
    """Many calls on one connection from which nothing is read, with windows of so many bytes."""
    raw = RawClient(worker.address, settings={4: window})
    raw.opens_windows = False
    if window > DEFAULT:
        raw.send(WindowUpdateFrame(0, window_increment=window - DEFAULT))
    for _ in range(count):
        raw.call(path, message)
    if window <= DEFAULT:
        raw.answer(raw.open(grpc_headers("/no/such"), end=True))  # the worker has come as far as this
    return raw


async def size_of(client: WorkerClient, job_id: str) -> int:
    return sum([len(chunk.data) async for chunk in client.output(job_id)])


@pytest.mark.parametrize("window", [0, 1, DEFAULT, WIDE])
async def test_streams_hold_nothing_until_their_window_opens(worker: Worker, client: WorkerClient, window: int) -> None:
    started = await client.start("head", args=["-c", str(3 * MIB), "/dev/zero"])
    job_id = started.job_id
    await client.wait(job_id)
    assert await size_of(client, job_id) == 3 * MIB
    before = rss_bytes(worker.pid)
    with unread(worker, STREAM, encode(pb.StreamJobReq(job_id=job_id, follow=True)), 1000, window) as raw:
        if window < WIDE:
            for _ in range(50):  # a byte each: for whom it is, all look
                raw.send(WindowUpdateFrame(0, window_increment=1))
            raw.answer(raw.open(grpc_headers("/no/such"), end=True))
        assert (await client.job(job_id)).exit_code == 0
        assert await size_of(client, job_id) == 3 * MIB
        assert rss_bytes(worker.pid) - before < 80 * MIB  # they would be 250 MiB, and as much again for each copy


async def test_one_stuck_connection_holds_up_no_other_of_the_same_client(worker: Worker, client: WorkerClient) -> None:
    """All that may be under way to it is; what comes next goes over another connection."""
    job_id = (await client.start("true", args=["x" * 100_000] * 15)).job_id
    await client.wait(job_id)
    output = (await client.start("head", args=["-c", str(3 * MIB), "/dev/zero"])).job_id
    await client.wait(output)
    with unread(worker, QUERY, encode(pb.QueryJobReq(job_id=job_id)), 50, DEFAULT):
        for _ in range(3):
            assert (await client.job(job_id)).exit_code == 0
            assert await size_of(client, output) == 3 * MIB


async def test_many_streams_that_stand_still_hold_up_no_other_of_their_connection(
    worker: Worker, client: WorkerClient
) -> None:
    output = (await client.start("head", args=["-c", str(3 * MIB), "/dev/zero"])).job_id
    await client.wait(output)
    follow = encode(pb.StreamJobReq(job_id=output, follow=True))
    with RawClient(worker.address) as raw:  # the window of the connection opens, those of the streams do not
        raw.send(WindowUpdateFrame(0, window_increment=256 * MIB))
        streams = [raw.call(STREAM, follow) for _ in range(600)]
        while not all(raw.received(stream) > 65_000 for stream in streams):
            raw.receive()
        assert raw.answer(raw.call(QUERY, encode(pb.QueryJobReq(job_id=output)))).status == 0


@pytest.mark.parametrize("path", [QUERY, WAIT, LIST])
async def test_answers_are_not_made_while_they_pile_up(worker: Worker, client: WorkerClient, path: str) -> None:
    job_id = (await client.start("true", args=["x" * 100_000] * 15)).job_id
    await client.wait(job_id)
    asked: dict[str, Any] = {
        QUERY: pb.QueryJobReq(job_id=job_id), WAIT: pb.WaitJobReq(job_id=job_id), LIST: pb.ListJobsReq(page_size=1)
    }  # fmt: skip
    before = rss_bytes(worker.pid)
    with unread(worker, path, encode(asked[path]), 200, DEFAULT):
        assert (await client.job(job_id)).exit_code == 0
        assert (await client.start("true")).job_id
        assert rss_bytes(worker.pid) - before < 80 * MIB  # of 300 MiB, and as much again for each copy


async def test_what_waits_comes_when_it_is_read(worker: Worker, client: WorkerClient) -> None:
    started = await client.start("head", args=["-c", str(3 * MIB), "/dev/zero"])
    await client.wait(started.job_id)
    with unread(worker, STREAM, encode(pb.StreamJobReq(job_id=started.job_id)), 3, DEFAULT) as raw:
        raw.send(*(WindowUpdateFrame(stream, window_increment=8 * MIB) for stream in (1, 3, 5)))
        raw.send(WindowUpdateFrame(0, window_increment=64 * MIB))
        answers = [raw.answer(stream) for stream in (1, 3, 5)]
    assert [answer.status for answer in answers] == [0, 0, 0]
    assert all(len(answer.data) > 3 * MIB for answer in answers)
