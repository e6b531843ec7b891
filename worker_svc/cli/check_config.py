"""`worker-svc check-config`: is the configuration good, what is in effect, from where, and what may a job be?

Exit status 2 if `serve` would refuse to start; with --explain 1 if a role may not start the job, or it could not start.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from worker_svc.cli.command import FAILED_STATUS, Failure, make_parser
from worker_svc.cli.console import say, warn
from worker_svc.cli.job_options import add_job_options, read_stdin, start_request
from worker_svc.cli.settings import BAD_CONFIG_STATUS, add_config_option, file_in_use, load

if TYPE_CHECKING:
    from worker_svc.access.policy import Judged
    from worker_svc.config import Config

# Viewers start nothing.
_ROLES: Final = ("admin", "operator", "submitter")


def main(prog: str, argv: Sequence[str]) -> int:
    parser = make_parser(
        prog,
        "Check the configuration and its files as `serve` would. If all is good, print OK and each value with where it "
        "comes from; if not, print all that is wrong and exit with status 2. With --explain, print instead which rule "
        "of the policy decides about a job, and exit with status 1 if it is denied or cannot start.",
    )
    add_config_option(parser)
    parser.add_argument("--explain", metavar="'COMMAND [ARGS ...]'", help="which rule of the policy decides about it")
    parser.add_argument("--role", choices=_ROLES, help="for this role only")
    _add_job_options(parser)
    arguments = parser.parse_args(argv)
    loaded = load(arguments.config, {})
    if arguments.explain is not None:
        return _explain(loaded.config, arguments)
    file = file_in_use(arguments.config)
    _check_files(loaded.config, file, is_named=arguments.config is not None)
    print(f"OK: {file or 'no file, so only variables and defaults'}\n")
    print(loaded.dump(), end="")
    return 0


def _add_job_options(parser: argparse.ArgumentParser) -> None:
    groups: dict[str, argparse._ArgumentGroup] = {}

    def add(flag: str, *, group: str = "what else the job is", **options: Any) -> None:
        if group not in groups:
            groups[group] = parser.add_argument_group(f"with --explain: {group}")
        groups[group].add_argument(flag, **options)

    add_job_options(add)


def _check_files(config: Config, file: str, *, is_named: bool) -> None:
    from worker_svc.access.policy import advice
    from worker_svc.access.startchecks import check
    from worker_svc.config import CONFIG_VARIABLE

    findings = check(config, Path(file) if file else None, is_named=is_named or CONFIG_VARIABLE in os.environ)
    for finding in findings:
        warn(("error: " if finding.is_error else "warning: ") + finding.text)
    for text in advice(config.policy):
        warn(f"warning: {text}")
    if any(finding.is_error for finding in findings):
        raise Failure("serve would refuse to start", BAD_CONFIG_STATUS)


def _explain(config: Config, arguments: argparse.Namespace) -> int:
    from worker_svc.access.policy import CommandPolicy
    from worker_svc.job import JobError
    from worker_svc.wire.messages import start_from
    from worker_svc.wire.messages.defaults import start_defaults

    words = _words(arguments.explain)
    read_stdin(arguments)
    policy, defaults = CommandPolicy(config.policy, config.jobs, config.sandbox), start_defaults(config)
    all_would_start = True
    try:
        request = start_request(arguments, command=words[0], path="".join(words[1:2]), args=words[2:])
        for role in [arguments.role] if arguments.role else _ROLES:
            spec = start_from(request, defaults.within(policy.bounds_of(role))).spec
            all_would_start &= _tell(role, policy.judge(role, spec))
    except JobError as error:
        raise Failure(f"--explain: {error.message}", 2) from None
    return 0 if all_would_start else FAILED_STATUS


def _words(line: str) -> list[str]:
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise Failure(f"--explain: {error}", 2) from None
    if not words:
        raise Failure("--explain: the command is missing", 2)
    return words


def _tell(role: str, judged: Judged) -> bool:
    """Whether the job would start."""
    decision = judged.decision
    if not decision.allowed:
        say(f"{role}: denied by {decision.rule}")
        say(f"  {decision.reason}")
        return False
    if judged.problem:
        say(f"{role}: allowed, but cannot start: {judged.problem}")
        say(f"  allowed by {decision.rule}")
        return False
    say(f"{role}: allowed by {decision.rule}")
    for file in judged.checked:
        say(f"  {file.field}: {file.path}")
    return True
