"""`worker-svc demo`: a real worker, its supervisor and a small scheduler run real jobs while one watches."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from worker_svc import __version__
from worker_svc.cli.command import ANSWER_DEADLINE_S, CANCELLED_STATUS, FAILED_STATUS, Failure, make_parser
from worker_svc.cli.demo_jobs import DemoJob, Run, check_end, check_output, demo_jobs, query_table
from worker_svc.cli.demo_parts import DemoScheduler, DemoWorker, has_ended
from worker_svc.cli.demo_view import View
from worker_svc.client import WorkerClient
from worker_svc.job import JobError

_START_LIMIT_S: Final = 15.0
_RUN_LIMIT_S: Final = 30.0
_END_LIMIT_S: Final = 10.0


def main(prog: str, argv: Sequence[str]) -> int:
    make_parser(
        prog,
        "Watch a worker run a bash script, a python script and an executable, and stop a job midway. Needs "
        "nothing else running, and leaves nothing behind. The exit status is 0 if all went as it should.",
    ).parse_args(argv)
    for program in ("bash", "python3", "sort"):
        if shutil.which(program) is None:
            raise Failure(f"{program} is missing: the demo runs jobs with it, so install it and try again")
    return asyncio.run(_demo(View()))


async def _demo(view: View) -> int:
    """The demo, and what it comes to; Ctrl-C and SIGTERM end it early, but not before it has cleaned up."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    began_s = time.monotonic()
    view.title(f"worker-svc {__version__}: a worker runs jobs for a scheduler")
    try:
        with tempfile.TemporaryDirectory(prefix="worker-svc-demo-") as directory:
            await _in_directory(Path(directory), view)
        view.check(not Path(directory).exists(), "the temporary directory is gone")
    except asyncio.CancelledError:
        view.note("Interrupted; everything was cleaned up.")
        return CANCELLED_STATUS
    view.verdict(time.monotonic() - began_s)
    return FAILED_STATUS if view.failures else 0


async def _in_directory(directory: Path, view: View) -> None:
    log = directory / "worker.log"
    try:
        async with DemoScheduler.serving() as scheduler:
            view.section("A scheduler, and a worker that registers with it")
            view.done(f"the scheduler listens on {scheduler.address}")
            async with DemoWorker.running(directory, log, scheduler) as worker:
                await _with_worker(worker, scheduler, directory, view)
    except (Failure, JobError, TimeoutError, OSError) as error:
        view.check(False, str(error) or type(error).__name__)
    if view.failures:
        view.log("the worker's log", log)


async def _with_worker(worker: DemoWorker, scheduler: DemoScheduler, directory: Path, view: View) -> None:
    began_s = time.monotonic()
    await worker.registered(_START_LIMIT_S)
    async with WorkerClient(worker.address) as client:
        status = await client.worker(deadline_s=ANSWER_DEADLINE_S)
        worker.supervisor_pid = status.supervisor_pid
        view.done(f"the worker (pid {worker.pid}) serves on {worker.address} and has registered", since_s=began_s)
        view.done(f"its supervisor (pid {status.supervisor_pid}) will be the parent of the jobs")
        jobs = demo_jobs(directory)
        runs: list[Run] = []
        try:
            async with asyncio.timeout(_RUN_LIMIT_S):
                await _run_jobs(client, jobs, runs, view)
                await _query_jobs(client, runs, view)
        except TimeoutError as error:
            raise Failure(f"the jobs did not end within {_RUN_LIMIT_S:g} s") from error
        except ExceptionGroup as group:
            # What ended one of the tasks ended the others too: the first one says it.
            raise group.exceptions[0] from group
        finally:
            await _kill_leftovers(client, runs)
    await _clean_up(worker, scheduler, view)


async def _run_jobs(client: WorkerClient, jobs: Sequence[DemoJob], runs: list[Run], view: View) -> None:
    view.section(f"{len(jobs)} jobs at once; what they write, as they write it")
    for job in jobs:
        started = await client.start(**job.request, deadline_s=ANSWER_DEADLINE_S)
        runs.append(Run(job, started.job_id))
        view.line(job.name, f"$ {job.title}", own=True)
    async with asyncio.TaskGroup() as group:
        for run in runs:
            group.create_task(_follow(client, run, view))
            if run.job.stop_after_s:
                group.create_task(_stop_midway(client, run, view))


async def _follow(client: WorkerClient, run: Run, view: View) -> None:
    async for chunk in client.output(run.job_id, follow=True):
        run.output += chunk.data
        for line in run.lines.feed(chunk.data):
            view.line(run.job.name, line)
    for line in run.lines.rest():
        view.line(run.job.name, line)


async def _stop_midway(client: WorkerClient, run: Run, view: View) -> None:
    await asyncio.sleep(run.job.stop_after_s)
    view.line(run.job.name, "# StopJob", own=True)
    await client.stop(run.job_id, wait=True, deadline_s=ANSWER_DEADLINE_S)


async def _query_jobs(client: WorkerClient, runs: Sequence[Run], view: View) -> None:
    view.section("What QueryJob says of each")
    for run in runs:
        await client.wait(run.job_id, timeout_s=_END_LIMIT_S)
        run.answer = await client.query(run.job_id, deadline_s=ANSWER_DEADLINE_S)
    view.table(query_table(runs))
    for run in runs:
        view.check(check_end(run), f"{run.job.name}: {run.job.expected}", but=run.how_it_ended)
    view.check(all(map(check_output, runs)), "every byte of their output was seen, and none was made up")


async def _kill_leftovers(client: WorkerClient, runs: Sequence[Run]) -> None:
    """After a failure or Ctrl-C: jobs outlive their worker by design, but not this demo."""
    for run in runs:
        if run.answer is None or not run.answer.done:
            with contextlib.suppress(JobError):
                await client.stop(run.job_id, grace_s=0, wait=True, deadline_s=_END_LIMIT_S)


async def _clean_up(worker: DemoWorker, scheduler: DemoScheduler, view: View) -> None:
    view.section("Cleaning up")
    status = await worker.end(_END_LIMIT_S)
    view.check(scheduler.deregistered, "the worker told the scheduler that it leaves")
    view.check(status == 0, "SIGTERM ended the worker, exit status 0", but=f"exit status {status}")
    gone = await has_ended(worker.supervisor_pid, _END_LIMIT_S)
    view.check(gone, "the supervisor, with no job and no worker left, went away by itself")
