"""What the example does: jobs of four kinds at once, what they write as they write it, and what became of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from worker_svc import JobError, QueryJobRes, WorkerClient, __version__
from worker_svc_demo.scheduler import Scheduler, supervisor_is_gone, worker_process

_START_LIMIT_S = 15.0
_RUN_LIMIT_S = 30.0
_END_LIMIT_S = 10.0


class _Job(NamedTuple):
    name: str
    title: str
    start: dict[str, Any]
    """What WorkerClient.start is called with."""
    outcome: str
    error_text: str
    output: bytes
    """All of it; of a job that is stopped, its beginning."""
    stop_after_s: float = 0.0


_PYTHON = """\
import os, sys, time
print("hello", os.environ["GREET"], flush=True)
for n in (1, 2):
    time.sleep(0.4)
    print(f"{n}/2 done", flush=True)
print("and now a failure, on purpose", file=sys.stderr)
sys.exit(3)
"""


def _jobs(directory: Path) -> list[_Job]:
    ticks, fails, miles = directory / "ticks.sh", directory / "fails.py", directory / "long.sh"
    ticks.write_text('for n in 1 2 3 4; do echo "tick $n of 4"; sleep 0.5; done\n')
    fails.write_text(_PYTHON)
    miles.write_text('for n in $(seq 1 60); do echo "mile $n of 60"; sleep 0.3; done\n')
    greeted = {"command": "python3", "path": str(fails), "env": {"GREET": "world"}}
    said = b"hello world\n1/2 done\n2/2 done\nand now a failure, on purpose\n"
    sort = {"command": "sort", "args": ["-n"], "stdin": b"10\n9\n2\n"}
    bash, long = ({"command": "bash", "path": str(path)} for path in (ticks, miles))
    ticked = b"".join(b"tick %d of 4\n" % n for n in (1, 2, 3, 4))
    return [
        _Job("bash", "bash ticks.sh", bash, "succeeded", "", ticked),
        _Job("python", "GREET=world python3 fails.py", greeted, "failed", "exit status 3", said),
        _Job("sort", "sort -n, with 10 9 2 on its standard input", sort, "succeeded", "", b"2\n9\n10\n"),
        _Job("long", "bash long.sh, for 18 s", long, "stopped", "signal: terminated", b"mile 1 of 60\n", 1.3),
    ]


class DemoFailed(Exception):
    """Its text says what did not come about."""


class _View:
    """Prints, in colour on a terminal, and counts the checks that failed."""

    def __init__(self) -> None:
        self.failures = 0
        self._in_colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        is_unicode = "utf" in (sys.stdout.encoding or "").lower()
        self._tick, self._cross, self._bar = ("✓", "✗", "│") if is_unicode else ("ok", "FAILED:", "|")

    def title(self, text: str) -> None:
        print(self._painted(text, "1"), flush=True)

    def check(self, good: bool, text: str, but: str = "") -> None:
        self.failures += not good
        mark = self._painted(self._tick, "32") if good else self._painted(self._cross, "31")
        print(f"   {mark} {text}{f', but: {but}' if but and not good else ''}", flush=True)

    def line(self, job: str, text: str) -> None:
        shown = "".join(char if char.isprintable() else "�" for char in text)
        print(f"   {job:<8}{self._painted(self._bar, '2')} {shown}", flush=True)

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("   " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
        print(flush=True)

    def _painted(self, text: str, style: str) -> str:
        return f"\x1b[{style}m{text}\x1b[0m" if self._in_colour else text


async def run(program: str) -> int:
    """The demo, and its exit status: 0, 1 if something was not as it should be, 130 after Ctrl-C or SIGTERM, which end
    it early, but not before it has cleaned up. `program`: how the reader can call the command line."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    began_s = time.monotonic()
    view = _View()
    view.title(f"worker-svc {__version__}: a worker runs jobs for a scheduler")
    try:
        with tempfile.TemporaryDirectory(prefix="worker-svc-demo-") as directory:
            await _in_directory(Path(directory), view)
    except asyncio.CancelledError:
        print("\nInterrupted; everything was cleaned up.", flush=True)
        return 130
    view.check(not Path(directory).exists(), "the temporary directory is gone")
    if view.failures:
        view.title(f"\nNot all went as it should: {view.failures} of the above failed.")
        return 1
    view.title(f"\nAll went as it should, in {time.monotonic() - began_s:.1f} s. Now by hand:")
    print(f"   {program} serve                            # in one terminal; a scheduler may be there or not")
    print(f"   {program} run bash -c 'echo hi; exit 3'    # in another; then: {program} list", flush=True)
    return 0


async def _in_directory(directory: Path, view: _View) -> None:
    scheduler = Scheduler()
    try:
        async with scheduler.serving():
            view.title("\n1  A scheduler, and a worker that registers with it")
            view.check(True, f"the scheduler listens on {scheduler.address}")
            async with worker_process(directory, scheduler) as worker:
                address = await _registered(worker, scheduler)
                async with WorkerClient(address) as client:
                    status = await client.worker(deadline_s=_END_LIMIT_S)
                    view.check(True, f"the worker (pid {worker.pid}) serves on {address} and has registered")
                    view.check(True, f"its supervisor (pid {status.supervisor_pid}) will be the parent of the jobs")
                    try:
                        await _with_jobs(client, _jobs(directory), view)
                    finally:
                        # Jobs outlive their worker by design, but not this demo: not after Ctrl-C either.
                        await client.shutdown(stop_jobs=True, deadline_s=_END_LIMIT_S)
                await _check_the_end(worker, scheduler, directory / "state", view)
    except (DemoFailed, JobError, OSError) as error:
        view.check(False, str(error) or type(error).__name__)
        log = directory / "worker.log"
        view.title("\n   the worker's log:")
        lines = log.read_text(errors="backslashreplace").splitlines() if log.exists() else []
        print(*(f"   {line}" for line in lines[-40:] or ["(empty)"]), sep="\n", flush=True)


async def _registered(worker: asyncio.subprocess.Process, scheduler: Scheduler) -> str:
    """The worker's address, once it has registered."""
    ended = asyncio.create_task(worker.wait())
    waits: set[asyncio.Future[Any]] = {ended, scheduler.worker_address}
    done, _ = await asyncio.wait(waits, timeout=_START_LIMIT_S, return_when=asyncio.FIRST_COMPLETED)
    ended.cancel()
    if scheduler.worker_address in done:
        return scheduler.worker_address.result()
    if done:
        raise DemoFailed(f"the worker ended with exit status {worker.returncode} before it registered")
    raise DemoFailed(f"the worker did not register within {_START_LIMIT_S:g} s")


async def _with_jobs(client: WorkerClient, jobs: Sequence[_Job], view: _View) -> None:
    view.title(f"\n2  {len(jobs)} jobs at once; what they write, as they write it")
    try:
        async with asyncio.timeout(_RUN_LIMIT_S), asyncio.TaskGroup() as tasks:
            runs = [tasks.create_task(_run(client, job, view)) for job in jobs]
    except TimeoutError:
        raise DemoFailed(f"the jobs did not end within {_RUN_LIMIT_S:g} s") from None
    except ExceptionGroup as group:
        # What ended one of the tasks ended the others too: the first one says it.
        raise DemoFailed(str(group.exceptions[0])) from group
    view.title("\n3  What QueryJob says of each")
    results = [run.result() for run in runs]
    head = ("", "done", "error", "errorText", "outcome", "exit", "wall", "output")
    view.table([head, *(_row(job, answer) for job, (answer, _) in zip(jobs, results, strict=True))])
    for job, (answer, output) in zip(jobs, results, strict=True):
        ended = (answer.done, answer.error, answer.error_text, _outcome(answer))
        as_expected = ended == (True, job.outcome != "succeeded", job.error_text, job.outcome)
        view.check(as_expected, f"{job.name}: {job.outcome}, as it was meant to", str(ended))
        # To the last byte that the worker counted.
        is_whole = len(output) == answer.job.output_size_bytes and output.startswith(job.output)
        if not is_whole or (output != job.output and not job.stop_after_s):
            view.check(False, f"{job.name}: every byte of its output was seen", repr(output))


async def _run(client: WorkerClient, job: _Job, view: _View) -> tuple[QueryJobRes, bytes]:
    """Starts a job, follows its output, stops it if that is its fate: what QueryJob says in the end, and the output."""
    started = await client.start(**job.start, deadline_s=_END_LIMIT_S)
    view.line(job.name, f"$ {job.title}")
    stopping = asyncio.create_task(_stop_midway(client, started.job_id, job, view)) if job.stop_after_s else None
    output = b""
    open_line = b""
    async for chunk in client.output(started.job_id, follow=True):
        output += chunk.data
        *lines, open_line = (open_line + chunk.data).split(b"\n")
        for line in lines:
            view.line(job.name, line.decode(errors="replace"))
    if stopping is not None:
        await stopping
    await client.wait(started.job_id, timeout_s=_END_LIMIT_S)
    return await client.query(started.job_id, deadline_s=_END_LIMIT_S), output


async def _stop_midway(client: WorkerClient, job_id: str, job: _Job, view: _View) -> None:
    await asyncio.sleep(job.stop_after_s)
    view.line(job.name, "# StopJob")
    await client.stop(job_id, wait=True, deadline_s=_END_LIMIT_S)


def _row(job: _Job, answer: QueryJobRes) -> tuple[str, ...]:
    """The three original fields, then some of those that came with this worker."""
    known = answer.job
    return (
        job.name,
        "yes" if answer.done else "no",
        "yes" if answer.error else "no",
        answer.error_text,
        _outcome(answer),
        known.signal if known.exit_code is None else str(known.exit_code),
        f"{known.wall_time.total_seconds():.2f} s" if known.wall_time is not None else "-",
        f"{known.output_size_bytes} B",
    )


def _outcome(answer: QueryJobRes) -> str:
    return (answer.job.outcome.name or "").lower()


async def _check_the_end(
    worker: asyncio.subprocess.Process, scheduler: Scheduler, state_dir: Path, view: _View
) -> None:
    view.title("\n4  Cleaning up")
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(worker.wait(), _END_LIMIT_S)
    view.check(scheduler.deregistered, "the worker told the scheduler that it leaves")
    view.check(worker.returncode == 0, "ShutdownWorker ended the worker, exit status 0", f"{worker.returncode}")
    view.check(await supervisor_is_gone(state_dir, _END_LIMIT_S), "and its supervisor, which had no job left")
