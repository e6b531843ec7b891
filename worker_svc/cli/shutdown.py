"""`worker-svc shutdown`: ends worker and supervisor, and leaves nothing behind.

Returns when both have left; without --stop-jobs that is when the last job has ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

from worker_svc.cli.command import ANSWER_DEADLINE_S, add_address_option, make_parser, with_worker

if TYPE_CHECKING:
    from worker_svc.client import WorkerClient


def main(prog: str, argv: Sequence[str]) -> int:
    parser = make_parser(
        prog,
        "End the worker and its supervisor once no job is left; new jobs are refused from now on. (To end only the "
        "worker, and let jobs run on, send it SIGTERM.)",
    )
    add_address_option(parser)
    parser.add_argument("--stop-jobs", action="store_true", help="stop the jobs there are, instead of waiting for them")
    arguments = parser.parse_args(argv)

    async def shut_down(client: WorkerClient) -> int:
        from worker_svc.client import Unreachable
        from worker_svc.job import Unavailable

        try:
            left = await client.shutdown(stop_jobs=arguments.stop_jobs, deadline_s=ANSWER_DEADLINE_S)
            if left.jobs:
                print(f"{left.jobs} job{'s' * (left.jobs != 1)} still to end", flush=True)
        except Unreachable:
            raise
        except Unavailable:
            pass  # with no job left it leaves at once, and its answer can be lost over that: see below
        try:
            # Without end, until the worker leaves.
            async with aclosing(client.watch()) as transitions:
                async for _ in transitions:
                    continue
        except Unavailable:
            print("the worker and its supervisor have left")
        return 0

    return with_worker(arguments, shut_down)
