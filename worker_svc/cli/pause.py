"""`worker-svc pause`: makes a running job stand still.

Exit status 1 if the job is not there or does not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from worker_svc.cli.command import ANSWER_DEADLINE_S, add_address_option, ask_worker, make_parser

if TYPE_CHECKING:
    from worker_svc.client.blocking import BlockingWorker


def main(prog: str, argv: Sequence[str]) -> int:
    parser = make_parser(
        prog, "Make all processes of a running job stand still. Its timeout goes on; a stop resumes it first."
    )
    parser.add_argument("job", metavar="JOB", help="the job's id")
    add_address_option(parser)
    arguments = parser.parse_args(argv)

    def pause(worker: BlockingWorker) -> None:
        worker.ask("PauseJob", jobID=arguments.job, deadline_s=ANSWER_DEADLINE_S)

    return ask_worker(arguments, pause)
