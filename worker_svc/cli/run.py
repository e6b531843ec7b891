"""`worker-svc run`: a job as if it were a program of this terminal."""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Final

from worker_svc.cli.command import AGENT_FAILED_STATUS, CANCELLED_STATUS, Failure, program, with_worker
from worker_svc.cli.console import CannotWrite, complain
from worker_svc.cli.job_options import JobOptions, read_stdin, start
from worker_svc.cli.output import gap_text, write
from worker_svc.cli.render import status_line
from worker_svc.job import JobError, Outcome, Unavailable, parse_signal

if TYPE_CHECKING:
    from worker_svc.client import WorkerClient
    from worker_svc.pb.jobscheduler import Job

TIMED_OUT_STATUS: Final = 124
_SIGNALED_BASE: Final = 128

_EPILOG: Final = (
    "The exit status is the job's, 128+N if signal N ended it, 124 if its timeout did, 125 if the worker or "
    "the start failed or the job was lost. Ctrl-C asks the job to stop, Ctrl-C again kills it; a job that "
    "was stopped never counts as a success."
)


def main(prog: str, argv: Sequence[str]) -> int:
    arguments = JobOptions(prog, "Start a job, show its output live, exit with its status.", _EPILOG).parse(argv)
    read_stdin(arguments)
    return with_worker(arguments, lambda client: _Attached(client).run(arguments), failed_status=AGENT_FAILED_STATUS)


class _Attached:
    """One job bound to this terminal: its output, and the signals that end it."""

    def __init__(self, client: WorkerClient) -> None:
        self._client = client
        self._job_id = ""
        self._presses = 0
        self._output_failed: OSError | None = None
        self._stops: set[asyncio.Task[None]] = set()

    async def run(self, arguments: argparse.Namespace) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._asked_to_end)
        started = await start(self._client, arguments)
        self._job_id = started.job_id
        if self._presses:
            self._stop()
        try:
            await self._show_output(separate_stderr=arguments.separate_stderr)
            job = await self._client.wait(self._job_id)
        except Unavailable as error:
            later = f"the job may well run on; when the worker is back: {program()} logs -f {self._job_id}"
            raise Failure(str(error), AGENT_FAILED_STATUS, hint=f"  {later}") from error
        if self._output_failed is not None:
            await asyncio.gather(*self._stops)
            raise self._output_failed
        _tell_end(job)
        return exit_status(job, interrupted=self._presses > 0)

    async def _show_output(self, *, separate_stderr: bool) -> None:
        from worker_svc.pb.jobscheduler import OutputStream

        if separate_stderr:
            await asyncio.gather(
                self._copy(OutputStream.STDOUT, sys.stdout.buffer),
                self._copy(OutputStream.STDERR, sys.stderr.buffer),
            )
        else:
            await self._copy(OutputStream.UNSPECIFIED, sys.stdout.buffer)

    async def _copy(self, stream: int, target: IO[bytes]) -> None:
        async for chunk in self._client.output(self._job_id, stream=stream, follow=True):
            if chunk.gap_bytes:
                complain("run", gap_text(chunk))
            elif self._output_failed is None:
                try:
                    # In a thread: Ctrl-C must work while a pager holds the output up.
                    await asyncio.to_thread(write, target, chunk.data)
                except (BrokenPipeError, CannotWrite) as error:
                    # A program of this terminal would end by SIGPIPE now, or complain and end.
                    self._output_failed = error
                    self._stop()

    def _asked_to_end(self) -> None:
        self._presses += 1
        if self._presses > 2:
            # The job was killed or its worker is out of reach; a write that nobody takes may hold a thread
            # up.
            os._exit(CANCELLED_STATUS)
        if self._job_id:
            self._stop()

    def _stop(self) -> None:
        task = asyncio.get_running_loop().create_task(self._ask_to_stop(kill=self._presses > 1))
        self._stops.add(task)
        task.add_done_callback(self._stops.discard)

    async def _ask_to_stop(self, *, kill: bool) -> None:
        try:
            if kill:
                await self._client.stop(self._job_id, signal="SIGKILL", grace_s=0)
                return
            await self._client.stop(self._job_id)
            if self._presses:
                complain("run", "asked the job to stop; Ctrl-C again kills it")
        except JobError as error:
            complain("run", f"cannot stop the job: {error.message}")


def exit_status(job: Job, *, interrupted: bool = False) -> int:
    """What a shell gets to see of a finished job. `interrupted`: it was stopped from this terminal."""
    outcome = int(job.outcome)
    if outcome == Outcome.SUCCEEDED:
        return 0
    if outcome == Outcome.TIMED_OUT:
        return TIMED_OUT_STATUS
    if outcome in (Outcome.NONE, Outcome.START_FAILED, Outcome.LOST):
        return AGENT_FAILED_STATUS
    if job.signal:
        return _SIGNALED_BASE + _signal_number(job.signal)
    if job.exit_code:
        return job.exit_code
    # It did not succeed, and has no status of its own that says so.
    if outcome == Outcome.OOM_KILLED:
        return _SIGNALED_BASE + int(signal.SIGKILL)
    if outcome in (Outcome.STOPPED, Outcome.OUTPUT_LIMIT):
        return CANCELLED_STATUS if interrupted else _SIGNALED_BASE + int(signal.SIGTERM)
    return AGENT_FAILED_STATUS


def _signal_number(name: str) -> int:
    if unnamed := re.fullmatch(r"SIG(\d+)", name):
        return int(unnamed[1])
    try:
        return parse_signal(name)
    except ValueError:
        # A signal of the worker's system that this one does not have.
        return 0


def _tell_end(job: Job) -> None:
    """Says what the exit status alone would not; an ordinary end needs no words."""
    if job.outcome in (Outcome.SUCCEEDED, Outcome.FAILED):
        return
    complain("run", f"job {job.job_id} {status_line(job)}")
