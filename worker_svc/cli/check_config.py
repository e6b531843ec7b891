"""`worker-svc check-config`: is the configuration good, what is in effect, from where, and what may a job be?"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from worker_svc.cli.common import FAILED_STATUS, Failure, key_value, make_parser
from worker_svc.cli.settings import BAD_CONFIG_STATUS, add_config_option, file_in_use, load

if TYPE_CHECKING:
    from worker_svc.config import Config

# Viewers start nothing.
_ROLES: Final = ("admin", "operator", "submitter")


def main(prog: str, argv: Sequence[str]) -> int:
    parser = make_parser(
        prog,
        "Check the configuration and its files as `serve` would. If all is good, print OK and each value with where it "
        "comes from; if not, print all that is wrong and exit with status 2. With --explain, print instead which rule "
        "of the policy decides about a job, and exit with status 1 if it is denied.",
    )
    add_config_option(parser)
    parser.add_argument("--explain", metavar="'COMMAND [ARGS ...]'", help="which rule of the policy decides about it")
    parser.add_argument("--role", choices=_ROLES, help="for this role only")
    parser.add_argument("--cwd", default="", metavar="DIR", help="where the job would run (default: jobs.cwd)")
    parser.add_argument("--env", type=key_value, action="append", default=[], metavar="KEY=VALUE", help="repeatable")
    arguments = parser.parse_args(argv)
    loaded = load(arguments.config, {})
    if arguments.explain is not None:
        roles = [arguments.role] if arguments.role else _ROLES
        return _explain(loaded.config, arguments.explain, roles, arguments.cwd, dict(arguments.env))
    file = file_in_use(arguments.config)
    _check_files(loaded.config, file, is_named=arguments.config is not None)
    print(f"OK: {file or 'no file, so only variables and defaults'}\n")
    print(loaded.dump(), end="")
    return 0


def _check_files(config: Config, file: str, *, is_named: bool) -> None:
    from worker_svc.config import CONFIG_VARIABLE
    from worker_svc.startchecks import check

    findings = check(config, Path(file) if file else None, is_named=is_named or CONFIG_VARIABLE in os.environ)
    for finding in findings:
        print(("error: " if finding.is_error else "warning: ") + finding.text, file=sys.stderr)
    if any(finding.is_error for finding in findings):
        raise Failure("serve would refuse to start", BAD_CONFIG_STATUS)


def _explain(config: Config, line: str, roles: Sequence[str], cwd: str, env: dict[str, str]) -> int:
    from worker_svc.job import JobError
    from worker_svc.messages import start_from
    from worker_svc.messages.defaults import start_defaults
    from worker_svc.pb.jobscheduler import StartJobReq
    from worker_svc.policy import CommandPolicy

    try:
        words = shlex.split(line)
    except ValueError as error:
        raise Failure(f"--explain: {error}", 2) from None
    if not words:
        raise Failure("--explain: the command is missing", 2)
    request = StartJobReq(command=words[0], path="".join(words[1:2]), args=words[2:], env=env, cwd=cwd)
    try:
        spec = start_from(request, start_defaults(config)).spec
    except JobError as error:
        raise Failure(f"--explain: {error.message}", 2) from None
    policy = CommandPolicy(config.policy, config.jobs, config.sandbox)
    denied = False
    for role in roles:
        judged = policy.judge(role, spec)
        decision = judged.decision
        denied = denied or not decision.allowed
        print(f"{role}: {'allowed' if decision.allowed else 'denied'} by {decision.rule}")
        for text in (decision.reason, judged.problem if decision.allowed else ""):
            if text:
                print(f"  {text}")
        for file in judged.checked if decision.allowed else ():
            print(f"  {file.field}: {file.path}")
    return FAILED_STATUS if denied else 0
