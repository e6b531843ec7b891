"""`worker-svc signal`: sends a signal to a running job.

Exit status 1 if the job is not there or does not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from worker_svc.cli.command import ANSWER_DEADLINE_S, add_address_option, ask_worker, make_parser

if TYPE_CHECKING:
    from worker_svc.client.blocking import BlockingWorker


def main(prog: str, argv: Sequence[str]) -> int:
    parser = make_parser(prog, "Send a signal to a running job's process group. To end a job, use stop.")
    parser.add_argument("job", metavar="JOB", help="the job's id")
    parser.add_argument("signal", metavar="SIGNAL", help="SIGUSR1, USR1 or 10")
    add_address_option(parser)
    arguments = parser.parse_args(argv)

    def send(worker: BlockingWorker) -> None:
        worker.ask("SignalJob", jobID=arguments.job, signal=arguments.signal, deadline_s=ANSWER_DEADLINE_S)

    return ask_worker(arguments, send)
