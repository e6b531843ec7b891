"""`worker-svc stop`: asks a job to stop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from worker_svc.cli.command import ANSWER_DEADLINE_S, add_address_option, make_parser, seconds, with_worker
from worker_svc.cli.console import say

if TYPE_CHECKING:
    from worker_svc.client import WorkerClient


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

    async def stop(client: WorkerClient) -> int:
        deadline_s = None if arguments.wait else ANSWER_DEADLINE_S
        await client.stop(
            arguments.job,
            signal=arguments.signal,
            grace_s=arguments.grace,
            wait=arguments.wait,
            deadline_s=deadline_s,
        )
        if arguments.wait:
            from worker_svc.cli.render import status_line

            say(status_line(await client.job(arguments.job, deadline_s=ANSWER_DEADLINE_S)))
        return 0

    return with_worker(arguments, stop)
