"""Output streams beside plain grpclib streams of the same bytes, a job's writing beside writing by hand, live latency.

    scripts/bench stream [--rounds N] [--megabytes N] [--dir DIR] [--only one,fifty,write,live]

Interleaved: each round measures every contender once, and ratios are taken within a round. Server and clients are
processes of their own in all cases; files lie in --dir, which should be on tmpfs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any, Final

import grpclib.server

from tests.support.workers import ROOT, Worker
from worker_svc.client import WorkerClient
from worker_svc.output.reader import CHUNK_BYTES
from worker_svc.pb import jobscheduler as pb
from worker_svc.pb.jobscheduler import OutputVia

MIB: Final = 1 << 20
FOLLOWERS: Final = 50
LIVE_JOBS: Final = 20
LIVE_FOLLOWERS: Final = 100
LIVE_LINES: Final = 100

# Writes argv[1] MiB, and how many seconds that took into the file argv[2].
WRITER: Final = """
import os, sys, time
block = b"0123456789abcde\\n" * 4096
began = time.perf_counter()
for _ in range(int(sys.argv[1]) * 16): os.write(1, block)
took = time.perf_counter() - began
open(sys.argv[2], "w").write(str(took))
"""
# Writes argv[1] lines that say when, in nanoseconds, 50 ms apart.
TICKER: Final = """
import os, sys, time
time.sleep(1)
for _ in range(int(sys.argv[1])):
    os.write(1, b"%019d\\n" % time.monotonic_ns())
    time.sleep(0.05)
"""


class PlainService(pb.WorkerBase):
    """Streams bytes it has in memory, in the chunks the worker makes."""

    def __init__(self, size: int) -> None:
        self._content = b"0123456789abcde\n" * (size // 16)

    async def stream_job(self, message: pb.StreamJobReq) -> AsyncIterator[pb.OutputChunk]:
        for at in range(0, len(self._content), CHUNK_BYTES):
            yield pb.OutputChunk(offset=at, data=self._content[at : at + CHUNK_BYTES])


async def serve_plain(path: str, size: int) -> None:
    server = grpclib.server.Server([PlainService(size)])
    await server.start(path=path)
    print("ready", flush=True)
    await server.wait_closed()


async def read_whole(address: str, job_id: str, count: int) -> dict[str, float]:
    """Megabytes per second over `count` followers, each with a connection of its own."""

    async def read() -> int:
        async with WorkerClient(address) as client:
            return sum([len(chunk.data) async for chunk in client.output(job_id)])

    began_s = time.perf_counter()
    sizes = await asyncio.gather(*(read() for _ in range(count)))
    took_s = time.perf_counter() - began_s
    return {"bytes": sum(sizes), "mb_per_s": sum(sizes) / took_s / 1e6}


async def read_live(address: str, job_ids: list[str]) -> dict[str, list[float]]:
    """How many milliseconds after it was written each line was received; and of a small call meanwhile."""
    latencies: list[float] = []
    calls: list[float] = []

    async def follow(client: WorkerClient, job_id: str) -> None:
        async for chunk in client.output(job_id, follow=True):
            now_ns = time.monotonic_ns()
            latencies.extend((now_ns - int(line)) / 1e6 for line in chunk.data.split())

    async def call() -> None:
        async with WorkerClient(address) as client:
            while True:
                began_s = time.perf_counter()
                await client.query(job_ids[0])
                calls.append((time.perf_counter() - began_s) * 1000)
                await asyncio.sleep(0.01)

    calling = asyncio.create_task(call())
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(WorkerClient(address)) for _ in range(5)]
        async with asyncio.TaskGroup() as tasks:
            for number in range(LIVE_FOLLOWERS):
                tasks.create_task(follow(clients[number % len(clients)], job_ids[number % len(job_ids)]))
    calling.cancel()
    return {"latencies": latencies, "calls": calls}


def role(*arguments: object) -> dict[str, Any]:
    """What a client process of ours found."""
    printed = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(printed.stdout)
    return found


class Bench:
    def __init__(self, folder: Path, worker: Worker, rounds: int, megabytes: int) -> None:
        self._folder = folder
        self._worker = worker
        self._rounds = rounds
        self._megabytes = megabytes

    def throughput(self, followers: int) -> None:
        size = (self._megabytes if followers == 1 else max(4, self._megabytes // 16)) * MIB
        job_id = f"whole-{followers}"
        asyncio.run(self._run_job(job_id, size // MIB))
        path = f"{self._folder}/plain-{followers}"
        server = subprocess.Popen(
            [sys.executable, __file__, "serve-plain", path, str(size)],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
        )  # fmt: skip
        try:
            assert server.stdout is not None
            server.stdout.readline()
            found: dict[str, list[float]] = {"plain": [], "worker": []}
            for _ in range(self._rounds):
                for name, address in (("plain", f"unix:{path}"), ("worker", self._worker.address)):
                    read = role("read", address, job_id, followers)
                    assert read["bytes"] == size * followers
                    found[name].append(read["mb_per_s"])
        finally:
            server.kill()
            server.communicate()
        say(f"{followers} follower(s), {size // MIB} MiB each, chunks of {CHUNK_BYTES // 1024} KiB, MB/s")
        show("plain grpclib, from memory", found["plain"])
        show("worker, from the file", found["worker"])
        show_ratio("worker / plain", found["worker"], found["plain"])

    def writing(self) -> None:
        took = Path(f"{self._folder}/took")
        megabytes = self._megabytes * 4
        found: dict[str, list[float]] = {
            name: [] for name in ("by hand", "job, file", "job", "job, cap 64 MiB", "job, followed")
        }
        for number in range(self._rounds):
            for name, rates in found.items():
                if name == "by hand":
                    target = self._folder / "by-hand"
                    with target.open("ab", buffering=0) as file:
                        subprocess.run(
                            [sys.executable, "-S", "-E", "-c", WRITER, str(megabytes), str(took)],
                            stdout=file, check=True,
                        )  # fmt: skip
                    target.unlink()
                else:
                    asyncio.run(
                        self._run_job(f"{name.replace(', ', '-').replace(' ', '-')}-{number}", megabytes, took, name)
                    )
                rates.append(megabytes * MIB / float(took.read_text()) / 1e6)
                took.unlink()
        say(f"a job that writes {megabytes} MiB in blocks of 64 KiB, MB/s")
        for name, rates in found.items():
            show(name, rates)
            if name != "by hand":
                show_ratio(f"{name} / by hand", rates, found["by hand"])

    async def _run_job(self, job_id: str, megabytes: int, took: Path | None = None, how: str = "") -> None:
        async with self._worker.client() as client:
            await client.start(
                sys.executable,
                args=["-S", "-E", "-c", WRITER, str(megabytes), str(took or "/dev/null")],
                job_id=job_id,
                output_max_bytes=64 * MIB if "cap" in how else 0,
                output_via=OutputVia.FILE if "file" in how else OutputVia.PIPE,
            )
            if "followed" in how:
                # Left once the job has ended: to read on is not what is measured. With a connection of its own, which
                # what is not read may fill.
                async with self._worker.client() as other, aclosing(other.output(job_id, follow=True)) as chunks:
                    async for _ in chunks:
                        if took and took.exists():
                            break
            await client.wait(job_id)
            if took is not None:
                await client.delete(job_id)

    def live(self) -> None:
        latencies, calls = [], []
        for number in range(max(1, self._rounds // 3)):
            job_ids = asyncio.run(self._start_tickers(number))
            read = role("live", self._worker.address, json.dumps(job_ids))
            assert len(read["latencies"]) == LIVE_FOLLOWERS * LIVE_LINES
            latencies += read["latencies"]
            calls += read["calls"]
        say(f"{LIVE_FOLLOWERS} followers of {LIVE_JOBS} jobs that write a line every 50 ms, ms")
        show_quantiles("from write to receipt", latencies)
        show_quantiles("QueryJob meanwhile", calls)

    async def _start_tickers(self, number: int) -> list[str]:
        job_ids = [f"tick-{number}-{n}" for n in range(LIVE_JOBS)]
        async with self._worker.client() as client:
            for job_id in job_ids:
                await client.start(sys.executable, args=["-S", "-E", "-c", TICKER, str(LIVE_LINES)], job_id=job_id)
        return job_ids


def say(line: str) -> None:
    print(line, flush=True)


def show(name: str, values: list[float]) -> None:
    say(f"  {name:32} min {min(values):8.1f}  median {statistics.median(values):8.1f}  max {max(values):8.1f}")


def show_ratio(name: str, values: list[float], yardstick: list[float]) -> None:
    ratios = [value / unit for value, unit in zip(values, yardstick, strict=True)]
    say(f"  {name:32} min {min(ratios):8.2f}  median {statistics.median(ratios):8.2f}  max {max(ratios):8.2f}")


def show_quantiles(name: str, values: list[float]) -> None:
    ordered = sorted(values)
    p50, p99 = ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100]
    say(f"  {name:32} p50 {p50:8.2f}  p99 {p99:8.2f}  max {ordered[-1]:8.2f}  ({len(ordered)} samples)")


def main(argv: list[str]) -> int:
    match argv:
        case ["serve-plain", path, size]:
            asyncio.run(serve_plain(path, int(size)))
            return 0
        case ["read", address, job_id, count]:
            print(json.dumps(asyncio.run(read_whole(address, job_id, int(count)))))
            return 0
        case ["live", address, job_ids]:
            print(json.dumps(asyncio.run(read_live(address, json.loads(job_ids)))))
            return 0
    parser = argparse.ArgumentParser(prog="scripts/bench stream", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--megabytes", type=int, default=128, help="read by one follower; other sizes follow from it")
    parser.add_argument("--dir", default="/dev/shm", help="where the files lie: best a tmpfs")  # noqa: S108
    parser.add_argument("--only", default="one,fifty,write,live")
    options = parser.parse_args(argv)
    with (
        tempfile.TemporaryDirectory(dir=options.dir, prefix="stream-") as temporary,
        Worker(Path(temporary), GRPC_SERVER_ADDR=f"unix:{temporary}/w", JOBS_SLOTS="64") as worker,
    ):  # fmt: skip
        bench = Bench(Path(temporary), worker, options.rounds, options.megabytes)
        only = options.only.split(",")
        if "one" in only:
            bench.throughput(1)
        if "fifty" in only:
            bench.throughput(FOLLOWERS)
        if "write" in only:
            bench.writing()
        if "live" in only:
            bench.live()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
