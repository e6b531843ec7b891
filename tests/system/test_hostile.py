"""All at once: while some do what they can to the worker, others are answered, and its memory is bounded."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.hostile import ATTACKS, JOB, hostile_mix
from tests.support.programs import status_field
from tests.support.raw_h2 import QUERY, START, RawClient
from tests.support.workers import PATIENCE_S, Worker
from worker_svc.pb import jobscheduler as pb
from worker_svc.wire.codec import encode

MIB = 2**20
HONEST = "127.0.0.3"
ROUNDS_MAX = 3000
LONG_S = 60.0
RATIO_MAX = 3.0


@pytest.fixture
def worker_keys() -> dict[str, Any]:
    return {"JOBS_SLOTS": "50"}


@pytest.fixture
def honest(worker: Worker) -> Iterator[RawClient]:
    with RawClient(worker.address, source=HONEST) as client:
        client.socket.settimeout(PATIENCE_S)
        start = pb.StartJobReq(command="head", args=["-c", str(3 * MIB), "/dev/zero"], job_id=JOB)
        assert client.answer(client.call(START, encode(start))).status == 0
        yield client


def peak_bytes(worker: Worker) -> tuple[int, int]:
    return tuple(status_field(pid, "VmHWM", 10) * 1024 for pid in (worker.pid, worker.supervisor_pid()))  # type: ignore[return-value]


def query_s(client: RawClient) -> float:
    began_s = time.monotonic()
    assert client.answer(client.call(QUERY, encode(pb.QueryJobReq(job_id=JOB)))).status == 0
    return time.monotonic() - began_s


def start_and_query(client: RawClient, number: int) -> None:
    start = pb.StartJobReq(command="true", job_id=f"honest-{number}")
    assert client.answer(client.call(START, encode(start))).status == 0
    query_s(client)


def assert_bounded(worker: Worker, before: tuple[int, int]) -> None:
    grown = [(after - former) // MIB for after, former in zip(peak_bytes(worker), before, strict=True)]
    print(f"memory at its peak: worker {grown[0]:+} MiB, supervisor {grown[1]:+} MiB")
    assert grown[0] < 256
    assert grown[1] < 64


@pytest.mark.timeout(240)
def test_who_is_honest_is_answered_while_others_are_hostile(worker: Worker, honest: RawClient) -> None:
    """Until each kind of attack was made: how long an answer takes is the long test's to say."""
    before = peak_bytes(worker)
    with hostile_mix(worker.address, yields=False) as done:
        for number in range(ROUNDS_MAX):
            start_and_query(honest, number)
            time.sleep(0.02)
            if number >= 50 and min(done()) >= 1:
                break
        assert min(done()) >= 1, dict(zip(ATTACKS, done(), strict=True))
    assert_bounded(worker, before)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_p99_of_who_is_honest(worker: Worker, honest: RawClient) -> None:
    """Within three times what it is when all is quiet, for a minute, on a machine with nothing else to do."""

    def p99_ms(seconds: float) -> float:
        taken, until_s = [], time.monotonic() + seconds
        while time.monotonic() < until_s:
            taken.append(query_s(honest))
            time.sleep(0.005)
        return statistics.quantiles(taken, n=100)[98] * 1000

    p99_ms(2.0)
    quiet_ms, before = p99_ms(10.0), peak_bytes(worker)
    with hostile_mix(worker.address, yields=True) as done:
        p99_ms(5.0)
        loud_ms = p99_ms(LONG_S)
        made = done()
    ratio = loud_ms / quiet_ms
    print(f"\np99 {quiet_ms:.2f} ms quiet, {loud_ms:.2f} ms in the mix: {ratio:.1f}×; attacks made: {made}")
    assert_bounded(worker, before)
    assert min(made) >= 1, "the machine is too busy for abusers that yield: nothing was measured"
    assert ratio <= RATIO_MAX
