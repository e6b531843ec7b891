"""`worker-svc prune`: removes finished jobs, oldest first.

--older-than is in seconds, --max-bytes in bytes on disk. Prints the ids of what went, or with --dry-run would go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from worker_svc.cli.command import add_address_option, count, make_parser, seconds, with_worker
from worker_svc.cli.console import say

if TYPE_CHECKING:
    from worker_svc.client import WorkerClient


def main(prog: str, argv: Sequence[str]) -> int:
    parser = make_parser(
        prog,
        "Remove finished jobs, their records and their output, oldest first, until what is given holds. "
        "Running and waiting jobs are never touched.",
    )
    add_address_option(parser)
    parser.add_argument("--older-than", metavar="SECONDS", type=seconds, help="jobs that ended longer ago go")
    parser.add_argument("--keep", metavar="N", type=count, help="only so many finished jobs stay; 0: none")
    parser.add_argument("--max-bytes", metavar="N", type=count, help="only so many bytes of output on disk stay")
    parser.add_argument("--dry-run", action="store_true", help="remove nothing, only tell what would go")
    arguments = parser.parse_args(argv)
    if arguments.older_than is None and arguments.keep is None and arguments.max_bytes is None:
        parser.error("say what is too much: --older-than, --keep or --max-bytes")

    async def prune(client: WorkerClient) -> int:
        from worker_svc.cli.render import human_size

        gone = await client.prune(
            max_age_s=arguments.older_than,
            max_count=arguments.keep,
            max_bytes=arguments.max_bytes,
            dry_run=arguments.dry_run,
        )
        for job_id in gone.job_ids:
            say(job_id)
        if gone.jobs > len(gone.job_ids):
            say(f"… and {gone.jobs - len(gone.job_ids)} more")
        verb = "would be removed" if arguments.dry_run else "removed"
        say(f"{gone.jobs} finished job{'s' * (gone.jobs != 1)} {verb}, {human_size(gone.bytes)} of output")
        return 0

    return with_worker(arguments, prune)
