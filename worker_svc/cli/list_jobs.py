"""`worker-svc list`: the jobs, newest first.

Asks for pages until it has as many as --limit. With --json one object a line: seconds, bytes, UTC.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from worker_svc.cli.command import (
    ANSWER_DEADLINE_S,
    add_address_option,
    ask_worker,
    count,
    key_value,
    make_parser,
)
from worker_svc.cli.console import say, warn

if TYPE_CHECKING:
    from worker_svc.client.blocking import BlockingWorker
    from worker_svc.job import JobState
    from worker_svc.pb.jobscheduler import Job

DEFAULT_LIMIT: Final = 50
_PAGE_MAX: Final = 1000
_FULL: Final = 2  # JobView, whose import is slow


def main(prog: str, argv: Sequence[str]) -> int:
    parser = make_parser(prog, "List jobs, newest first.")
    add_address_option(parser)
    parser.add_argument(
        "--state",
        metavar="STATE",
        type=_state,
        action="append",
        default=[],
        help="only jobs in this state, repeatable: queued, starting, running, stopping, finished; or, of the running "
        "ones, those that are paused",
    )
    parser.add_argument(
        "--label",
        metavar="KEY=VALUE",
        type=key_value,
        action="append",
        default=[],
        help="only jobs with this label, repeatable",
    )
    parser.add_argument(
        "--limit",
        metavar="N",
        type=count,
        default=DEFAULT_LIMIT,
        help=f"at most so many (default: {DEFAULT_LIMIT}; 0: all)",
    )
    parser.add_argument("--json", action="store_true", help="for programs: a JSON object a line")
    arguments = parser.parse_args(argv)
    return ask_worker(arguments, lambda worker: _list(worker, arguments))


def _state(text: str) -> JobState | None:
    """None: paused, which is no state of its own."""
    from worker_svc.job import JobState

    if text.lower() == "paused":
        return None
    state = JobState.__members__.get(text.upper())
    if state in (None, JobState.NEW):
        raise argparse.ArgumentTypeError("must be queued, starting, running, stopping, finished or paused")
    return state


def _list(worker: BlockingWorker, arguments: argparse.Namespace) -> None:
    jobs, more = _fetch(worker, arguments)
    _print(jobs, as_json=arguments.json)
    if more and not arguments.json:
        warn(f"… and older ones: --limit {10 * arguments.limit} shows more, --limit 0 all")


def _fetch(worker: BlockingWorker, arguments: argparse.Namespace) -> tuple[list[Job], bool]:
    """The jobs asked for, and whether there are more."""
    from worker_svc.job import JobState

    limit: int = arguments.limit
    jobs: list[Job] = []
    running_only_paused = None in arguments.state and JobState.RUNNING not in arguments.state
    page_token = ""
    while True:
        page = worker.ask(
            "ListJobs",
            states=[JobState.RUNNING if state is None else state for state in arguments.state],
            labels=dict(arguments.label),
            page_size=min(limit + 1, _PAGE_MAX) if limit else _PAGE_MAX,
            page_token=page_token,
            view=_FULL if arguments.json else 0,
            deadline_s=ANSWER_DEADLINE_S,
        )
        for job in page.jobs:
            if running_only_paused and job.state == JobState.RUNNING and not job.paused:
                continue
            if limit and len(jobs) == limit:
                return jobs, True
            jobs.append(job)
        page_token = page.next_page_token
        if not page_token:
            return jobs, False


def _print(jobs: Sequence[Job], *, as_json: bool) -> None:
    from worker_svc.cli.render import job_json, job_table

    if as_json:
        for job in jobs:
            say(json.dumps(job_json(job)))
    elif jobs:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        for line in job_table(jobs, now=datetime.now(UTC), width=width):
            say(line)
    else:
        warn("no jobs")
