"""`worker-svc logs`: what a job wrote.

Bytes, as the job wrote them; where some are gone, standard error says which.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from worker_svc.cli.command import add_address_option, count, make_parser, with_worker

if TYPE_CHECKING:
    from worker_svc.client import WorkerClient


def main(prog: str, argv: Sequence[str]) -> int:
    parser = make_parser(prog, "Show what a job wrote. Ctrl-C ends the showing, never the job.")
    parser.add_argument("job", metavar="JOB", help="the job's id")
    add_address_option(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the job is finished")
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument("--tail", metavar="N", type=count, help="only the last N lines (and with -f what follows)")
    begin.add_argument("--since-offset", metavar="K", type=count, help="from byte K on")
    parser.add_argument("--stderr", action="store_true", help="standard error, of a job that keeps it apart")
    arguments = parser.parse_args(argv)

    async def show(client: WorkerClient) -> int:
        from worker_svc.cli.output import copy
        from worker_svc.pb.jobscheduler import OutputStream

        chunks = client.output(
            arguments.job,
            stream=OutputStream.STDERR if arguments.stderr else OutputStream.UNSPECIFIED,
            offset=arguments.since_offset,
            tail_lines=arguments.tail,
            follow=arguments.follow,
        )
        await copy(chunks, "logs")
        return 0

    return with_worker(arguments, show)
