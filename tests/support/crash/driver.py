"""A client that retries by job id until it has an answer, as schedulers should."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import TypeVar

from tests.support.crash.jobs import CrashJob, Ending
from tests.support.waiting import eventually
from tests.support.workers import ROOT, Worker
from worker_svc import DeadlineExceeded, JobError, PreconditionFailed, Unavailable, WorkerClient
from worker_svc.job import Outcome, parse_signal

T = TypeVar("T")

# Longer than a worker is ever stopped: what takes as long is tried again.
_DEADLINE_S = 5.0
_CLIENTS = 4


class Driver:
    def __init__(self, address: str, rng: random.Random) -> None:
        self._address = address
        self._rng = rng
        self.told: dict[str, Ending] = {}
        """How each job ended, as the worker told it."""
        self.stop_asked_ns: dict[str, int] = {}
        self.problems: list[str] = []
        self.retries = 0

    async def run(self, jobs: list[CrashJob], at_once: int) -> None:
        """Runs them all to their ends."""
        waiting = iter(jobs)

        async def work(client: WorkerClient) -> None:
            for job in waiting:
                await self._run_job(client, job)

        async with asyncio.TaskGroup() as group:
            clients = [WorkerClient(self._address) for _ in range(_CLIENTS)]
            for client in clients:
                await client.__aenter__()
            workers = [group.create_task(work(clients[n % _CLIENTS])) for n in range(at_once)]
            await asyncio.wait(workers)
            for client in clients:
                await client.__aexit__(None, None, None)

    async def _run_job(self, client: WorkerClient, job: CrashJob) -> None:
        try:
            await self._retry(
                lambda: client.start(
                    job.argv[0], args=job.argv[1:], job_id=job.job_id, deadline_s=_DEADLINE_S, **job.options
                )
            )
        except PreconditionFailed as error:
            if Ending(Outcome.START_FAILED) not in job.endings:
                self.problems.append(f"{job.job_id} was refused: {error}")
        if job.stop_after_s is not None:
            await asyncio.sleep(job.stop_after_s)
            self.stop_asked_ns[job.job_id] = time.time_ns()
            await self._retry(lambda: client.stop(job.job_id, deadline_s=_DEADLINE_S))
        ended = await self._retry(lambda: client.wait(job.job_id))
        number = parse_signal(ended.signal) if ended.signal else None
        self.told[job.job_id] = Ending(Outcome(ended.outcome), ended.exit_code, number)
        if job.output is not None and ended.outcome == Outcome.SUCCEEDED and not ended.output_loss:
            output = await self._retry(lambda: _read(client, job.job_id))
            if output != job.output:
                self.problems.append(f"{job.job_id}: {len(output)} bytes of output, not the {len(job.output)} it wrote")

    async def _retry(self, call: Callable[[], Awaitable[T]]) -> T:
        while True:
            try:
                return await call()
            except (Unavailable, DeadlineExceeded):
                self.retries += 1
                await asyncio.sleep(self._rng.uniform(0.02, 0.2))
            except PreconditionFailed:
                raise
            except JobError as error:
                self.problems.append(f"a call was refused: {error!r}")
                raise


async def _read(client: WorkerClient, job_id: str) -> bytes:
    async with aclosing(client.output(job_id, follow=True)) as chunks:
        return b"".join([chunk.data async for chunk in chunks])


async def shut_down(
    worker: Worker, address: str, *options: str, spare: Callable[[int], None] = lambda pid: None
) -> list[str]:
    """`worker-svc shutdown`, until both have left. Returns what was not as it should be."""
    supervisor = worker.supervisor_pid()
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "worker_svc", "shutdown", "--addr", address, *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    spare(process.pid)
    said, _ = await process.communicate()
    await eventually(lambda: not {worker.pid, supervisor} & worker.processes().keys(), 30.0, "they do not leave")
    is_good = b"the worker and its supervisor have left" in said
    return [] if is_good else [f"worker-svc shutdown said {said.decode()!r}"]
