"""The options of `start` and `run`: from the command line to a StartJob."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worker_svc.cli.command import (
    ANSWER_DEADLINE_S,
    TLS_OPTIONS,
    Failure,
    add_address_option,
    count,
    key_value,
    make_parser,
    seconds,
)
from worker_svc.cli.limit_options import Add, add_limit_options, identity_of, limits_of, sandbox_of

if TYPE_CHECKING:
    from worker_svc.client import WorkerClient
    from worker_svc.pb.jobscheduler import StartJobReq, StartJobRes


class JobOptions:
    """Parses `[options] COMMAND [ARGS…]`: whatever comes after COMMAND is the job's, also if it looks like an
    option.

    COMMAND is found by hand: argparse.REMAINDER takes an option of ours before it for the job's, and drops a
    `--` of the job's, depending on the version of Python.
    """

    def __init__(self, prog: str, description: str, epilog: str = "") -> None:
        self._parser = make_parser(prog, description, usage=f"{prog} [options] [--] COMMAND [ARGS ...]", epilog=epilog)
        self._groups: dict[str, argparse._ActionsContainer] = {"": self._parser}
        self._takes_value: dict[str, bool] = {"-h": False, "--help": False}
        add_address_option(self._parser)
        self._takes_value.update(dict.fromkeys(("--addr", *TLS_OPTIONS), True))
        self._add(
            "--id",
            metavar="ID",
            default="",
            help="the job's id; the same start again then starts nothing twice",
        )
        add_job_options(self._add)

    def _add(self, flag: str, *, group: str = "", **options: Any) -> None:
        if group not in self._groups:
            self._groups[group] = self._parser.add_argument_group(group)
        self._groups[group].add_argument(flag, **options)
        self._takes_value[flag] = options.get("action") != "store_true"

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The options, and `command`: a list that is not empty."""
        own = self._own_length(argv)
        command = list(argv[own:])
        if command[:1] == ["--"]:
            del command[0]
        arguments = self._parser.parse_args(argv[:own])
        if not command:
            self._parser.error("COMMAND is missing")
        arguments.command = command
        return arguments

    def _own_length(self, argv: Sequence[str]) -> int:
        """How many of the arguments come before COMMAND, or before the `--` that announces it."""
        position = 0
        while position < len(argv) and argv[position].startswith("-") and argv[position] not in ("-", "--"):
            position += 2 if self._takes_value.get(argv[position], False) else 1
        return min(position, len(argv))


def add_job_options(add: Add) -> None:
    """What a job can be, but for its command and id."""
    add("--cwd", metavar="DIR", default="", help="directory to run in, absolute (default: the worker's)")
    add(
        "--env",
        metavar="KEY=VALUE",
        type=_variable,
        action="append",
        default=[],
        help="a variable for the job, repeatable; KEY alone passes on its value here",
    )
    add(
        "--secret-env",
        metavar="NAME",
        type=_secret,
        action="append",
        default=[],
        help="a variable whose value here is delivered to the job and recorded nowhere, repeatable",
    )
    add("--timeout", metavar="SECONDS", type=seconds, help="stop the job after so long; 0: never")
    add(
        "--label",
        metavar="KEY=VALUE",
        type=key_value,
        action="append",
        default=[],
        help="a mark to list by, repeatable",
    )
    add("--stdin", metavar="FILE", help="what the job reads, at most 1 MiB; -: what is piped in here")
    add("--separate-stderr", action="store_true", help="keep standard error apart from the output")
    add("--stop-signal", metavar="SIGNAL", default="", help="what asks the job to stop, such as SIGINT")
    add("--stop-grace", metavar="SECONDS", type=seconds, help="time from that signal to SIGKILL")
    add("--output-max-bytes", metavar="N", type=count, help="how much of its output is kept; 0: all")
    add(
        "--output-policy",
        choices=("drop-head", "stop", "none"),
        help="when it writes more: give the oldest bytes back, stop the job, or keep all",
    )
    add(
        "--output-via",
        choices=("pipe", "file"),
        help="how its output gets into the file: by a pipe, or the job has the file itself",
    )
    add(
        "--wait-for-tree",
        action="store_true",
        help="the job goes on when its first process has exited, until all of its processes are gone",
    )
    add_limit_options(add)


def _variable(text: str) -> tuple[str, str]:
    if "=" not in text and text in os.environ:
        return text, os.environ[text]
    return key_value(text)


def _secret(name: str) -> tuple[str, str]:
    """Its value is never on a command line, which everybody on the machine can read; nor is it in a complaint."""
    if "=" in name:
        raise argparse.ArgumentTypeError("must be a name alone, whose value is taken from the environment here")
    if name not in os.environ:
        raise argparse.ArgumentTypeError(f"there is no variable {name!r} in the environment here")
    return name, os.environ[name]


def start_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `WorkerClient.start` takes, as far as `add_job_options` tells it."""
    from worker_svc.job import LeaderExit, OutputPolicy, OutputVia

    return {
        "env": dict(arguments.env),
        "secret_env": dict(arguments.secret_env),
        "cwd": arguments.cwd,
        "stdin": arguments.stdin_bytes,
        "timeout_s": arguments.timeout,
        "stop_signal": arguments.stop_signal,
        "stop_grace_s": arguments.stop_grace,
        "labels": dict(arguments.label),
        "separate_stderr": arguments.separate_stderr,
        "output_max_bytes": arguments.output_max_bytes,
        "output_policy": OutputPolicy[policy.upper().replace("-", "_")] if (policy := arguments.output_policy) else 0,
        "output_via": OutputVia[arguments.output_via.upper()] if arguments.output_via else 0,
        "limits": limits_of(arguments),
        "identity": identity_of(arguments),
        "sandbox": sandbox_of(arguments),
        "leader_exit": LeaderExit.WAIT if arguments.wait_for_tree else 0,
    }


def start_request(arguments: argparse.Namespace, **fields: Any) -> StartJobReq:
    """The message that `start` would send; `fields`: its command and what else is not among the options."""
    from worker_svc.client.fields import duration
    from worker_svc.pb.jobscheduler import StartJobReq

    given = start_fields(arguments)
    for name in ("timeout", "stop_grace"):
        given[name] = duration(name, given.pop(f"{name}_s"))
    return StartJobReq(**given, **fields)


async def start(client: WorkerClient, arguments: argparse.Namespace) -> StartJobRes:
    command, *args = arguments.command
    return await client.start(
        command, args=args, job_id=arguments.id, deadline_s=ANSWER_DEADLINE_S, **start_fields(arguments)
    )


def read_stdin(arguments: argparse.Namespace) -> None:
    """Fills in `stdin_bytes`; done before there is a connection, since a pipe may take its time."""
    from worker_svc.job import STDIN_MAX_BYTES

    arguments.stdin_bytes = b""
    if arguments.stdin is None:
        return
    try:
        if arguments.stdin == "-":
            arguments.stdin_bytes = sys.stdin.buffer.read(STDIN_MAX_BYTES + 1)
        else:
            with Path(arguments.stdin).open("rb") as file:
                arguments.stdin_bytes = file.read(STDIN_MAX_BYTES + 1)
    except OSError as error:
        raise Failure(f"--stdin: {arguments.stdin}: {error.strerror}") from error
    if len(arguments.stdin_bytes) > STDIN_MAX_BYTES:
        raise Failure(f"--stdin: must be at most {STDIN_MAX_BYTES} bytes: put it into a file that the job opens")
