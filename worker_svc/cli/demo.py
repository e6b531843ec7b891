"""`worker-svc demo`: runs the example that is shipped beside this package, `worker_svc_demo`.

Exit status 0 if all went as it should, 130 after Ctrl-C.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from worker_svc.cli.command import Failure, make_parser, program


def main(prog: str, argv: Sequence[str]) -> int:
    make_parser(
        prog,
        "Watch a worker run a bash script, a python script and an executable, and stop a job midway. Needs "
        "nothing else running, and leaves nothing behind. The exit status is 0 if all went as it should.",
    ).parse_args(argv)
    for needed in ("bash", "python3", "sort"):
        if shutil.which(needed) is None:
            raise Failure(f"{needed} is missing: the demo runs jobs with it, so install it and try again")
    import asyncio

    from worker_svc_demo.story import run

    return asyncio.run(run(program()))
