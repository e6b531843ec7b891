"""StartJob of other jobs while some hang: their programs lie on a file system that does not answer (FUSE, as root).

    scripts/bench stalled [--rounds N] [--hanging N] [--starts N]

Each round measures StartJob of /bin/true, and how long until it is finished, with nothing hanging and with so many
hanging jobs; ratios are taken within a round. Threads for starting are added as the first of these hang.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tests.support import stalled_fs
from tests.support.workers import Worker
from worker_svc.client import WorkerClient
from worker_svc.job import JobState

Latencies = tuple[list[float], list[float]]
"""Of StartJob, and to the end of the job, in ms."""


class BenchWorker(Worker):
    def recorded(self, job_id: str) -> JobState | None:
        with self.reader() as reader:
            record = reader.get(job_id)
        return record and record.state


async def measure(client: WorkerClient, starts: int, mark: str) -> Latencies:
    accepted, finished = [], []
    for number in range(starts):
        began_s = time.perf_counter()
        await client.start("/bin/true", job_id=f"{mark}-{number}")
        accepted.append((time.perf_counter() - began_s) * 1000)
        await client.wait(f"{mark}-{number}")
        finished.append((time.perf_counter() - began_s) * 1000)
    return accepted, finished


async def bench(worker: BenchWorker, program: str, rounds: int, hanging: int, starts: int) -> None:
    quiet: list[Latencies] = []
    stalled: list[Latencies] = []
    async with worker.client() as client:
        await measure(client, starts, "warm")
        for number in range(rounds):
            quiet.append(await measure(client, starts, f"quiet-{number}"))
            hung = [f"hung-{number}-{index}" for index in range(hanging)]
            starting = [asyncio.create_task(client.start(program, job_id=job_id)) for job_id in hung]
            while [worker.recorded(job_id) for job_id in hung] != [JobState.STARTING] * hanging:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            stalled.append(await measure(client, starts, f"stalled-{number}"))
            for job_id in hung:
                assert worker.recorded(job_id) is JobState.STARTING
                await client.stop(job_id, grace_s=0)
                await client.wait(job_id)
            await asyncio.gather(*starting, return_exceptions=True)
    print(
        f"{rounds} rounds of {starts} starts, with and without {hanging} jobs that hang; ms, medians over the rounds\n"
    )
    print(f"{'':28}{'p50':>8}{'p99':>8}{'hanging: p50':>15}{'p99':>8}{'p99 ratio':>12}   quartiles")
    for at, name in enumerate(("StartJob", "StartJob until finished")):
        pairs = [(quantiles(calm[at]), quantiles(loud[at])) for calm, loud in zip(quiet, stalled, strict=True)]
        middle = [statistics.median(values) for values in zip(*((*calm, *loud) for calm, loud in pairs), strict=True)]
        low, ratio, high = statistics.quantiles([loud[1] / calm[1] for calm, loud in pairs], n=4)
        print(f"{name:28}{middle[0]:8.2f}{middle[1]:8.2f}{middle[2]:15.2f}{middle[3]:8.2f}{ratio:12.2f}", end="")
        print(f"   {low:.2f}–{high:.2f}")


def quantiles(values: list[float]) -> tuple[float, float]:
    """p50 and p99."""
    cuts = statistics.quantiles(values, n=100)
    return cuts[49], cuts[98]


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench stalled", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--hanging", type=int, default=16)
    parser.add_argument("--starts", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="stalled-") as temporary:
        mount_point = Path(temporary, "mnt")
        mount_point.mkdir()
        with (
            stalled_fs.mounted(str(mount_point)),
            BenchWorker(Path(temporary), GRPC_SERVER_ADDR=f"unix:{temporary}/w", JOBS_SLOTS="64") as worker,
        ):
            asyncio.run(bench(worker, str(mount_point / "program"), options.rounds, options.hanging, options.starts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
