"""`worker-svc stop`: asks a job to stop.

Returns when it was asked, with --wait when it is finished. --grace is in seconds. A finished job is no failure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from worker_svc.cli.command import ANSWER_DEADLINE_S, add_address_option, ask_worker, make_parser, seconds
from worker_svc.cli.console import say

if TYPE_CHECKING:
    from worker_svc.client.blocking import BlockingWorker


def main(prog: str, argv: Sequence[str]) -> int:
    parser = make_parser(
        prog,
        "Ask a job to stop: its stop signal, and SIGKILL after its grace. Stopping a finished job is fine.",
    )
    parser.add_argument("job", metavar="JOB", help="the job's id")
    add_address_option(parser)
    parser.add_argument("--signal", metavar="SIGNAL", default="", help="instead of the job's own stop signal")
    parser.add_argument("--grace", metavar="SECONDS", type=seconds, help="instead of the job's own; 0: SIGKILL at once")
    parser.add_argument("--wait", action="store_true", help="return when the job is finished, and say how it ended")
    arguments = parser.parse_args(argv)

    from datetime import timedelta

    from worker_svc.job import check_duration
    from worker_svc.wire.times import duration_fields

    def stop(worker: BlockingWorker) -> None:
        grace = None
        if arguments.grace is not None:
            check_duration("grace", arguments.grace)
            grace = duration_fields(timedelta(seconds=arguments.grace))
        worker.ask(
            "StopJob",
            jobID=arguments.job,
            signal=arguments.signal,
            grace=grace,
            wait=arguments.wait,
            deadline_s=None if arguments.wait else ANSWER_DEADLINE_S,
        )
        if arguments.wait:
            from worker_svc.cli.render import status_line

            say(status_line(worker.ask("QueryJob", jobID=arguments.job, deadline_s=ANSWER_DEADLINE_S).job))

    return ask_worker(arguments, stop)
