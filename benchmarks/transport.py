"""Server CPU a message and a call: betterproto's codec in grpclib's server, against ours. --seconds, --quick."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpclib.server

from worker_svc.pb import jobscheduler as pb

IN_FLIGHT = 64
START = pb.StartJobReq(command="bash", path="backup.sh", args=["-x"], job_id="job-1", timeout=timedelta(seconds=60))


def samples() -> dict[str, Any]:
    now = datetime(2026, 11, 24, tzinfo=UTC)
    spec = pb.JobSpec(command="bash", path="x.sh", cwd="/srv", timeout=timedelta(seconds=5), stop_signal="SIGTERM")
    job = pb.Job(
        job_id="j" * 36, spec=spec, state=pb.JobState(3), pid=7, accepted_at=now, started_at=now, last_sequence=9
    )
    return {
        "StartJobReq, two fields": pb.StartJobReq(command="bash", path="x.sh"),
        "StartJobReq, five fields": START,
        "StartJobReq, 20 variables": pb.StartJobReq(command="bash", env={f"NAME_{n}": "value" for n in range(20)}),
        "StartJobRes": pb.StartJobRes(job_id="j" * 36, state=pb.JobState(3)),
        "QueryJobRes": pb.QueryJobRes(job=job),
        "JobTransition": pb.JobTransition(sequence=5, job_id="j" * 36, at=now, pid=99),
        "OutputChunk, 64 KiB": pb.OutputChunk(offset=1, data=b"x" * 65536),
    }


def cpu_us(call: Callable[[], Any], seconds: float) -> float:
    best, until = float("inf"), time.process_time() + seconds
    while time.process_time() < until:
        started = time.process_time()
        for _ in range(200):
            call()
        best = min(best, (time.process_time() - started) / 200 * 1e6)
    return best


def measure_messages(seconds: float) -> None:
    # First as betterproto is: our codec makes the classes lean once it has met them.
    rows = []
    for name, message in samples().items():
        kind, data = type(message), bytes(message)
        theirs = [
            cpu_us(lambda kind=kind, data=data: kind().parse(data), seconds),  # type: ignore[misc]
            cpu_us(lambda message=message: bytes(message), seconds),  # type: ignore[misc]
        ]
        rows.append((name, kind, data, theirs))
    from worker_svc.wire.codec import decode, encode

    print(f"{'CPU, µs':28}{'decode: betterproto':>20}{'ours':>8}{'encode: betterproto':>22}{'ours':>8}")
    for name, kind, data, theirs in rows:
        message = decode(data, kind)
        ours = [
            cpu_us(lambda kind=kind, data=data: decode(data, kind), seconds),  # type: ignore[misc]
            cpu_us(lambda message=message: encode(message), seconds),  # type: ignore[misc]
        ]
        print(f"{name:28}{theirs[0]:20.1f}{ours[0]:8.1f}{theirs[1]:22.1f}{ours[1]:8.1f}")


class Service(pb.WorkerBase):
    async def start_job(self, message: pb.StartJobReq) -> pb.StartJobRes:
        return pb.StartJobRes(job_id=message.job_id, state=pb.JobState(3))

    async def drain(self, grace_s: float) -> None:
        return None


async def serve(which: str) -> None:
    from worker_svc.config import Address
    from worker_svc.server import GrpcServer

    if which == "grpclib":
        plain = grpclib.server.Server([Service()])
        await plain.start("127.0.0.1", 0)
        assert isinstance(plain._server, asyncio.Server)
        print(plain._server.sockets[0].getsockname()[1], flush=True)
    else:
        ours = GrpcServer(Service())
        print((await ours.listen(Address(host="127.0.0.1", port=0), None)).port, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


async def calls(port: int, seconds: float) -> int:
    from grpclib.client import Channel

    channel = Channel("127.0.0.1", port)
    stub, done, until = pb.WorkerStub(channel), 0, time.monotonic() + seconds

    async def one_after_another() -> None:
        nonlocal done
        while time.monotonic() < until:
            await stub.start_job(START)
            done += 1

    await asyncio.gather(*(one_after_another() for _ in range(IN_FLIGHT)))
    channel.close()
    return done


def cpu_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure_calls(which: str, seconds: float) -> None:
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve", which], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    try:
        port = int(server.stdout.readline())
        asyncio.run(calls(port, 0.5))
        before = cpu_of(server.pid)
        done = asyncio.run(calls(port, seconds))
        print(f"{which:12}{(cpu_of(server.pid) - before) / done * 1e6:8.0f} µs of server CPU a call, {done} calls")
    finally:
        server.communicate()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(serve(options.serve))
        return 0
    seconds = 0.5 if options.quick else options.seconds
    measure_messages(seconds / 20)
    print(f"\nStartJob without a job, {IN_FLIGHT} in flight on one connection:")
    for _ in range(1 if options.quick else 3):
        for which in ("grpclib", "ours"):
            measure_calls(which, seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
