"""A mix of abusers: each kind of what one client can do to the others, again and again, until told to stop."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import socket
from collections.abc import Callable, Iterator
from typing import Any, Final

import grpc
from hyperframe.frame import PingFrame, RstStreamFrame, SettingsFrame

from tests.support.fuzzing import varint
from tests.support.raw_h2 import QUERY, STREAM, Gone, RawClient, grpc_headers, head, prefixed
from worker_svc.pb import jobscheduler as pb
from worker_svc.wire.codec import encode

SOURCE: Final = "127.0.0.2"
JOB: Final = "everybodys"
"""A job with some output that is there for all of them."""
_SERVICE: Final = "/jobscheduler.Worker/"
_BODY_BYTES: Final = 3_000_000


def _raw(address: str) -> RawClient:
    return RawClient(address, source=SOURCE)


def _call(address: str, method: str, *bodies: bytes) -> None:
    with grpc.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)]) as channel:
        call: Any = channel.unary_unary(_SERVICE + method)
        for body in bodies:
            with contextlib.suppress(grpc.RpcError):
                call(body, timeout=20)


def _parse_bombs(address: str) -> None:
    _call(address, "ListJobs", b"\x50\x05" * (_BODY_BYTES // 2), b"\xf8\x07\x01" * (_BODY_BYTES // 3))
    _call(address, "StartJob", b"\x0a\x01a" + b"\x5a\x00" * (_BODY_BYTES // 2))
    _call(address, "ListJobs", b"\x52" + varint(_BODY_BYTES) + b"\x05" * _BODY_BYTES)


def _texts(address: str) -> None:
    """That are long to look through, in what is stored and in what is refused."""
    for part in ("a=", '\\"token\\":', "--password ", "://u:"):
        text = (part * 100_000)[:100_000]
        start = encode(pb.StartJobReq(command="true", args=[text] * 10, labels={"a": text[:1000]}))
        _call(address, "StartJob", start, encode(pb.StartJobReq(command=text)))


def _lists(address: str) -> None:
    _call(address, "ListJobs", *([encode(pb.ListJobsReq(page_size=1000))] * 5))
    _call(address, "ListJobs", *([encode(pb.ListJobsReq(page_size=1000, labels={"no": "such"}))] * 5))


def _watches(address: str) -> None:
    with _raw(address) as raw:
        for _ in range(50):
            raw.call(_SERVICE + "WatchJobs", encode(pb.WatchJobsReq(from_sequence=1)))
        for _ in range(50):
            raw.receive()


def _unread(address: str) -> None:
    with _raw(address) as raw:
        raw.opens_windows = False
        for _ in range(300):
            raw.call(STREAM, encode(pb.StreamJobReq(job_id=JOB, follow=True)))
            raw.call(QUERY, encode(pb.QueryJobReq(job_id=JOB)))
        raw.answer(raw.open(grpc_headers("/no/such"), end=True))


def _silent(address: str) -> None:
    host, _, port = address.rpartition(":")
    with contextlib.ExitStack() as held:
        for _ in range(150):
            held.enter_context(socket.create_connection((host, int(port)), timeout=20, source_address=(SOURCE, 0)))


def _half_open(address: str) -> None:
    with _raw(address) as raw:
        raw.send(head(1, 16000, 0, 1) + b"x" * 100)


def _rapid_resets(address: str) -> None:
    with _raw(address) as raw:
        for _ in range(500):
            stream = raw.call(STREAM, encode(pb.StreamJobReq(job_id=JOB, follow=True)))
            raw.send(RstStreamFrame(stream, error_code=8))
        raw.wait_gone()


def _control_frames(address: str) -> None:
    for frame in (PingFrame(0, opaque_data=b"12345678"), SettingsFrame(0, settings={4: 65535})):
        with _raw(address) as raw:
            raw.send(*([frame] * 2000))
            raw.wait_gone()


def _refused(address: str) -> None:
    with _raw(address) as raw:
        for _ in range(300):
            raw.open(grpc_headers("/no/such"), end=True)
        raw.receive()


def _headers_of_little(address: str) -> None:
    """Each within its limit, of a byte of HPACK for each 3 kB; and messages that nobody asks for."""
    with _raw(address) as raw:
        large = ("x-large", "v" * 3000)
        raw.answer(raw.open([*grpc_headers(QUERY), large], end=True))
        for _ in range(20):
            few = [raw.open([*grpc_headers(QUERY), *([large] * 15)], end=True) for _ in range(100)]
            raw.answer(few[-1])
        watch = raw.open(grpc_headers(_SERVICE + "WatchJobs"))
        for _ in range(1000):
            raw.data(watch, prefixed(b"x" * 10_000), end=False)


ATTACKS: Final[tuple[Callable[[str], None], ...]] = (
    _parse_bombs, _texts, _lists, _watches, _unread, _silent, _half_open, _rapid_resets, _control_frames, _refused,
    _headers_of_little,
)  # fmt: skip


def _attack(address: str, seed: int, done: Any) -> None:
    """In turn, in an order of its own. Abusers are on other machines as a rule: here they may yield to all else."""
    os.sched_setscheduler(0, os.SCHED_IDLE if seed >= 0 else os.SCHED_OTHER, os.sched_param(0))
    order = list(enumerate(ATTACKS))
    random.Random(seed).shuffle(order)
    while True:
        for number, attack in order:
            with contextlib.suppress(OSError, Gone):
                attack(address)
            done[number] += 1


@contextlib.contextmanager
def hostile_mix(address: str, processes: int = 2, *, yields: bool) -> Iterator[Callable[[], list[int]]]:
    """Yields how often each of ATTACKS was made, as far as is known."""
    context = multiprocessing.get_context("spawn")
    done = context.Array("L", len(ATTACKS))
    started = [
        context.Process(target=_attack, args=(address, seed if yields else -1 - seed, done), daemon=True)
        for seed in range(processes)
    ]
    for process in started:
        process.start()
    try:
        yield lambda: [done[number] for number in range(len(ATTACKS))]
    finally:
        for process in started:
            process.kill()
            process.join()
