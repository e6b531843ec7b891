"""`worker-svc start`: starts a job and prints its id.

Exit status 1 if it was not started; then nothing is printed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from worker_svc.cli.command import Failure, with_worker
from worker_svc.cli.console import CannotWrite, give_up_output, say
from worker_svc.cli.job_options import JobOptions, read_stdin, start

if TYPE_CHECKING:
    from worker_svc.client import WorkerClient


def main(prog: str, argv: Sequence[str]) -> int:
    arguments = JobOptions(prog, "Start a job and print its id.").parse(argv)
    read_stdin(arguments)

    async def start_it(client: WorkerClient) -> int:
        job_id = (await start(client, arguments)).job_id
        try:
            say(job_id)
            sys.stdout.flush()
        except CannotWrite as error:
            give_up_output()
            raise Failure(f"job {job_id} was started; standard output: {error.strerror}") from error
        return 0

    return with_worker(arguments, start_it)
