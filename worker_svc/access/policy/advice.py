"""What in a policy is allowed to stand and yet is hardly meant: entries without effect, and holes. Looks at files."""

from __future__ import annotations

import glob
import os
import pwd
import re
import shutil
from collections.abc import Iterator
from pathlib import PurePath
from typing import Final

from worker_svc.access.policy.rules import is_glob, is_real
from worker_svc.config import PolicyConfig, PolicyRules

_ROLES: Final = ("admin", "operator", "submitter")
# The usual programs that run whatever they are given.
_INTERPRETERS: Final = (
    "ash", "awk", "bash", "busybox", "dash", "env", "fish", "gawk", "ksh", "lua", "mawk", "node", "perl", "php",
    "python", "ruby", "sh", "tclsh", "xargs", "zsh",
)  # fmt: skip


def advice(policy: PolicyConfig) -> Iterator[str]:
    """Each with the key it is about."""
    for name, rules in (("all", policy.all), *((role, getattr(policy, role)) for role in _ROLES)):
        key = f"policy.{name}"
        yield from _of_commands(key, rules)
        yield from _of_roots(key, rules)
        yield from _of_users(key, rules)
        if not (rules.script_roots or policy.all.script_roots or rules.allow_args or policy.all.allow_args):
            yield from _of_interpreters(key, rules)


def _of_commands(key: str, rules: PolicyRules) -> Iterator[str]:
    for entry in rules.allow_commands:
        if not is_glob(entry):
            if not os.path.isfile(entry):
                yield f'{key}.allow_commands: "{entry}" is no file on this machine: nothing is allowed by it'
        elif not _matches_any(entry):
            yield (
                f'{key}.allow_commands: "{entry}" matches no real path on this machine: nothing is allowed by it '
                "(of a link, such as /bin often is, the real path counts)"
            )


def _matches_any(pattern: str) -> bool:
    literal = os.path.dirname(re.split(r"[*?]", pattern, maxsplit=1)[0])
    if "**" in pattern:  # to look through a whole tree would take too long
        return os.path.isdir(literal) and os.path.realpath(literal) == literal
    found = glob.iglob(pattern.replace("[", "[[]"), include_hidden=True)
    return any(is_real(os.path.realpath(path), pattern) for path in found)


def _of_roots(key: str, rules: PolicyRules) -> Iterator[str]:
    for folder in rules.allow_cwd:
        if not os.path.isdir(folder):
            yield f'{key}.allow_cwd: "{folder}" is no directory on this machine: nothing is allowed by it'
    for root in rules.script_roots:
        if os.path.realpath(root) == "/":
            yield f'{key}.script_roots: "{root}" is everything: any file is a script below it'
        elif not os.path.isdir(root):
            yield f'{key}.script_roots: "{root}" is no directory on this machine: nothing is allowed by it'


def _of_users(key: str, rules: PolicyRules) -> Iterator[str]:
    for user in rules.allow_users:
        try:
            pwd.getpwnam(user)
        except KeyError:
            if not user.isdigit():
                yield f'{key}.allow_users: there is no user "{user}" on this machine'


def _of_interpreters(key: str, rules: PolicyRules) -> Iterator[str]:
    usual = {os.path.realpath(path) for path in map(shutil.which, _INTERPRETERS) if path}
    for entry in rules.allow_commands:
        which = next((path for path in sorted(usual) if is_real(path, entry)), "")
        named = PurePath(entry).name.rstrip("0123456789.")
        if which or named in _INTERPRETERS:
            yield (
                f'{key}.allow_commands: "{entry}" lets {which or entry} run whatever it is told to: '
                "say which scripts, by script_roots, or by allow_args"
            )
