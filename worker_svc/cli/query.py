"""`worker-svc query`: all that is known of a job.

With --json one object: seconds, bytes, UTC, null for what is not known. Exit status 1 if there is no such job.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from worker_svc.cli.command import ANSWER_DEADLINE_S, add_address_option, ask_worker, make_parser
from worker_svc.cli.console import say

if TYPE_CHECKING:
    from worker_svc.client.blocking import BlockingWorker


def main(prog: str, argv: Sequence[str]) -> int:
    parser = make_parser(prog, "Show what is known of a job.")
    parser.add_argument("job", metavar="JOB", help="the job's id")
    add_address_option(parser)
    parser.add_argument("--json", action="store_true", help="for programs: one JSON object")
    arguments = parser.parse_args(argv)

    def query(worker: BlockingWorker) -> None:
        from worker_svc.cli.render import job_block, job_json

        job = worker.ask("QueryJob", jobID=arguments.job, deadline_s=ANSWER_DEADLINE_S).job
        if arguments.json:
            lines = json.dumps(job_json(job), indent=2).split("\n")
        else:
            lines = job_block(job, now=datetime.now(UTC))
        for line in lines:
            say(line)

    return ask_worker(arguments, query)
