"""`worker-svc run`: a job as if it were a program of this terminal.

Exit statuses are in its --help: the job's own, 124 after a timeout, 125 if the worker or the start failed.
"""

from __future__ import annotations

import argparse
import re
import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from worker_svc.cli.command import AGENT_FAILED_STATUS, CANCELLED_STATUS, with_worker
from worker_svc.cli.console import complain
from worker_svc.cli.job_options import JobOptions, read_stdin
from worker_svc.job import Outcome, parse_signal

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
    return with_worker(arguments, lambda client: _run(client, arguments), failed_status=AGENT_FAILED_STATUS)


async def _run(client: WorkerClient, arguments: argparse.Namespace) -> int:
    from worker_svc.cli.attached import Attached

    job, interrupted = await Attached(client).run(arguments)
    _tell_end(job)
    return exit_status(job, interrupted=interrupted)


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
    from worker_svc.cli.render import status_line

    complain("run", f"job {job.job_id} {status_line(job)}")
