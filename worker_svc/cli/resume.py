"""`worker-svc resume`: lets a paused job go on.

Exit status 1 if the job is not there or does not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from worker_svc.cli.command import ANSWER_DEADLINE_S, add_address_option, ask_worker, make_parser

if TYPE_CHECKING:
    from worker_svc.client.blocking import BlockingWorker


def main(prog: str, argv: Sequence[str]) -> int:
    parser = make_parser(prog, "Let a paused job go on.")
    parser.add_argument("job", metavar="JOB", help="the job's id")
    add_address_option(parser)
    arguments = parser.parse_args(argv)

    def resume(worker: BlockingWorker) -> None:
        worker.ask("ResumeJob", jobID=arguments.job, deadline_s=ANSWER_DEADLINE_S)

    return ask_worker(arguments, resume)
