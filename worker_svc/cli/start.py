"""`worker-svc start`: starts a job and prints its id."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from worker_svc.cli.command import with_worker
from worker_svc.cli.console import say
from worker_svc.cli.job_options import JobOptions, read_stdin, start

if TYPE_CHECKING:
    from worker_svc.client import WorkerClient


def main(prog: str, argv: Sequence[str]) -> int:
    arguments = JobOptions(prog, "Start a job and print its id.").parse(argv)
    read_stdin(arguments)

    async def start_it(client: WorkerClient) -> int:
        say((await start(client, arguments)).job_id)
        return 0

    return with_worker(arguments, start_it)
