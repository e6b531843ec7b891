"""`worker-svc serve`: runs the worker until it is told to end.

Exit status 2 for a bad configuration, 1 if it cannot serve, 0 after SIGTERM or SIGINT: its jobs run on.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from worker_svc.cli.command import make_parser
from worker_svc.cli.settings import add_config_option, add_key_options, file_in_use, load


def main(prog: str, argv: Sequence[str]) -> int:
    arguments = _parser(prog).parse_args(argv)
    loaded = load(arguments.config, vars(arguments))
    from worker_svc.app import serve
    from worker_svc.config import CONFIG_VARIABLE

    file = file_in_use(arguments.config)
    is_named = arguments.config is not None or CONFIG_VARIABLE in os.environ
    return serve(loaded.config, Path(file) if file else None, file_is_named=is_named)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = make_parser(
        prog,
        "Run the worker. SIGTERM or Ctrl-C ends it and leaves its jobs running; the next one takes over.",
        usage=f"{prog} [--config FILE] [--SECTION-KEY VALUE ...]",
        epilog="A flag wins over its environment variable (--jobs-slots: WORKER_SVC_JOBS_SLOTS), which wins "
        "over the file, which wins over the default. `worker-svc check-config` shows what is in effect.",
    )
    add_config_option(parser)
    add_key_options(parser)
    return parser
