"""The configuration as the command line sees it: `--config`, a flag for each key, and problems told."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from worker_svc.cli.command import CLIENT_VARIABLES, Failure
from worker_svc.cli.console import warn

if TYPE_CHECKING:
    from worker_svc.config import ConfigError, Loaded

BAD_CONFIG_STATUS = 2


def add_config_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        help="the configuration file (default: $WORKER_SVC_CONFIG, else ./worker.toml if it is there)",
    )


def add_key_options(parser: argparse.ArgumentParser) -> None:
    """One flag for each key, grouped by section."""
    from worker_svc.config import keys

    groups: dict[str, argparse._ArgumentGroup] = {}
    for key in keys():
        if key.section not in groups:
            groups[key.section] = parser.add_argument_group(f"[{key.section}]")
        is_boolean = key.type_name == "boolean"
        groups[key.section].add_argument(
            key.flag,
            dest=key.path,
            metavar="true|false" if is_boolean else key.type_name.upper(),
            nargs="?" if is_boolean else None,
            const="true" if is_boolean else None,
            help=f"{key.doc} (default: {key.default_toml})".replace("%", "%%"),
        )


def load(path: Path | None, flags: Mapping[str, object]) -> Loaded:
    """The configuration in effect; `flags` as argparse holds them. All problems are told before it fails."""
    from worker_svc.config import ConfigError, keys, load

    overrides = {key.path: str(flags[key.path]) for key in keys() if flags.get(key.path) is not None}
    # The clients' variables share the prefix of those of the configuration, but are none of them.
    environ = {name: value for name, value in os.environ.items() if name not in CLIENT_VARIABLES}
    try:
        return load(path, environ=environ, overrides=overrides)
    except ConfigError as error:
        raise _told(error) from error


def _told(error: ConfigError) -> Failure:
    for problem in error.problems:
        warn(str(problem))
    number = len(error.problems)
    text = f"{number} problems in the configuration" if number > 1 else "a problem in the configuration"
    return Failure(text, BAD_CONFIG_STATUS)


def file_in_use(path: Path | None) -> str:
    """The file that `load` reads, for people; empty if it reads none."""
    from worker_svc.config import CONFIG_VARIABLE, DEFAULT_FILE

    if path is None and os.environ.get(CONFIG_VARIABLE):
        path = Path(os.environ[CONFIG_VARIABLE])
    if path is None and DEFAULT_FILE.exists():
        path = DEFAULT_FILE
    return str(path) if path else ""
