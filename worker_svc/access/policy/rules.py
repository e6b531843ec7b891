"""One table of rules over one job: pure, every answer names the rule."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from typing import Final, NamedTuple

from worker_svc.access.policy.lookup import Found
from worker_svc.config.policy_rules import MINIMA, PolicyRules
from worker_svc.job import JobSpec, OutputPolicy, name_of
from worker_svc.job.limits import BY_NAME, amount_text

DEFAULT_RULE: Final = "default: everything is allowed"


class Decision(NamedTuple):
    allowed: bool
    rule: str
    """Which one decided: `policy.submitter.script_roots: "/opt/jobs"`."""
    reason: str = ""
    """For the caller who is denied: the field and what is wrong with it."""


class JudgedFiles(NamedTuple):
    """What rules look at besides the request; None where no rule does."""

    command: Found | None = None
    script: Found | None = None
    """The file that the first argument names: what `command` interprets."""
    cwd: Found | None = None


class Denied(Exception):
    def __init__(self, rule: str, reason: str) -> None:
        super().__init__(reason)
        self.decision = Decision(False, rule, reason)


def judge_request(name: str, rules: PolicyRules, spec: JobSpec, own_user: str) -> None:
    """As far as no file has a say in it. Raises Denied."""
    _judge_user(name, rules, spec, own_user)
    _judge_env(name, rules, spec)
    _judge_words(name, rules, _words(spec)[1:])
    _judge_maxima(name, rules, spec)


def _judge_user(name: str, rules: PolicyRules, spec: JobSpec, own_user: str) -> None:
    if not rules.allow_users:
        return
    user = spec.identity.user or own_user
    if user not in rules.allow_users:
        raise Denied(f"{name}.allow_users", f"identity.user: jobs may not run as {user}")
    for field, value in (("group", spec.identity.group), ("groups", spec.identity.groups)):
        if value not in ("", None):
            text = f"identity.{field}: must be those of the user where users are restricted: leave it out"
            raise Denied(f"{name}.allow_users", text)


def _judge_env(name: str, rules: PolicyRules, spec: JobSpec) -> None:
    for key in spec.variables:
        denied_by = _first(rules.deny_env, partial(_is_like, key))
        if denied_by:
            raise Denied(f'{name}.deny_env: "{denied_by}"', f"env: {name_of(key)!r} may not be set")
        if any(_is_like(key, pattern) for pattern in rules.allow_env):
            continue
        if rules.allow_env:
            raise Denied(f"{name}.allow_env", f"env: {name_of(key)!r} is not among what may be set")
        if rules.restricts_programs:
            # PATH, LD_PRELOAD, BASH_ENV, PYTHONPATH, HOME …: there is no end to what makes a program run another.
            text = f"env: {name_of(key)!r} may not be set where programs are restricted, unless allow_env names it"
            raise Denied(f"{name}.allow_env", text)


def _is_like(key: str, pattern: str) -> bool:
    # fnmatch's [...] is no wildcard of ours.
    return fnmatchcase(key, pattern.replace("[", "[[]"))


Words = list[tuple[str, str]]


def _words(spec: JobSpec) -> Words:
    """What the command is given, each with the field it is from."""
    fields = [f"args[{index}]" for index in range(len(spec.args))]
    if spec.path:
        fields.insert(0, "path")
    return list(zip(fields, spec.argv[1:], strict=True))


def _judge_words(name: str, rules: PolicyRules, words: Words) -> None:
    for field, text in words:
        denied_by = next((pattern for pattern in rules.deny_args if re.search(pattern, text)), "")
        if denied_by:
            raise Denied(f'{name}.deny_args: "{denied_by}"', f"{field}: is not allowed")
        if rules.allow_args and not any(re.fullmatch(pattern, text) for pattern in rules.allow_args):
            raise Denied(f"{name}.allow_args", f"{field}: is not among the arguments allowed")


def _judge_maxima(name: str, rules: PolicyRules, spec: JobSpec) -> None:
    for limit, most in rules.max.items():
        value = limit_of(spec, limit)
        row = BY_NAME.get(limit)
        shown = amount_text(row, most)
        rule = f"{name}.max.{limit}: {shown}"
        if limit in MINIMA:
            if value is not None and value < most:
                raise Denied(rule, f"{limit.removesuffix('_min')}: must not be below {shown}, not {value:g}")
        elif value is None or value > most:
            if limit == "output_max_bytes" and spec.output_policy is OutputPolicy.NONE:
                raise Denied(rule, f"output_policy: NONE keeps all, and of output at most {shown} bytes may be kept")
            asked = "without a limit" if value is None else amount_text(row, value)
            raise Denied(rule, f"{limit}: must be at most {shown}, not {asked}")


def limit_of(spec: JobSpec, limit: str) -> float | None:
    """What the job has of a limit; None: no limit (of a minimum: what the supervisor has)."""
    if limit.startswith("rlimits."):
        # Without a hard limit of its own, a job has the worker's, up to which it can raise the soft one.
        _, hard = spec.limits.get("rlimits", {}).get(limit.removeprefix("rlimits."), (0, None))
        return None if hard is None or hard < 0 else hard
    row = MINIMA.get(limit) or BY_NAME.get(limit)
    if row is not None:
        value: float | None = spec.limits.get(row.name, row.usual)
        return value
    match limit:
        case "args":
            return len(spec.args)
        case "env":
            return len(spec.variables)
        case "labels":
            return len(spec.labels)
        case "stdin_bytes":
            return spec.stdin_size_bytes
        case "stop_grace_s":
            return spec.stop_grace_s
        case "timeout_s":
            return spec.timeout_s or None
    assert limit == "output_max_bytes", limit
    return None if spec.output_policy is OutputPolicy.NONE else spec.output_max_bytes or None


def judge_places(name: str, rules: PolicyRules, files: JudgedFiles) -> Iterator[str]:
    """The command and the directory, by where they are."""
    if files.cwd is not None and rules.allow_cwd:
        yield _judge_cwd(name, rules, files.cwd)
    if files.command is not None:
        yield from _judge_command(name, rules, files.command)


def _judge_cwd(name: str, rules: PolicyRules, cwd: Found) -> str:
    root = _first(rules.allow_cwd, lambda root: _is_below(f"{cwd.path}/", root))
    if not root:
        raise Denied(
            f"{name}.allow_cwd", f"cwd: {name_of(cwd.named)} is not among the directories allowed, nor below one"
        )
    return f'{name}.allow_cwd: "{root}"'


def _judge_command(name: str, rules: PolicyRules, command: Found) -> Iterator[str]:
    denied_by = _first(rules.deny_commands, lambda pattern: _is_denied(command, pattern))
    if denied_by:
        raise Denied(f'{name}.deny_commands: "{denied_by}"', f"command: {name_of(command.named)} is not allowed")
    if rules.allow_commands:
        by = _first(rules.allow_commands, lambda pattern: is_real(command.path, pattern))
        # A link by another name could make a program that goes by its name do something else.
        is_named = command.named == command.path or any(
            _is_named(command.named, pattern) for pattern in rules.allow_commands
        )
        if not by or not is_named:
            raise Denied(
                f"{name}.allow_commands", f"command: {name_of(command.named)} is not among the commands allowed"
            )
        yield f'{name}.allow_commands: "{by}"'
    elif rules.deny_commands:
        yield f"{name}.deny_commands: none of them"


def judge_script(name: str, rules: PolicyRules, spec: JobSpec, files: JudgedFiles) -> Iterator[str]:
    """Below a root must be the command, if it is a script itself, or else the script that it interprets."""
    root = script_root_of(files.command, rules) if files.command is not None else ""
    if root or not rules.script_roots:
        # Only a script is judged by where it lies: for this table the first word is an argument like others.
        _judge_words(name, rules, _words(spec)[:1])
    if not rules.script_roots:
        return
    assert files.command is not None
    if not root and files.script is None:
        text = f"command: {name_of(files.command.named)} needs a script below a script root as its path"
        raise Denied(f"{name}.script_roots", text)
    if not root and files.script is not None:
        root = root_of(files.script, rules)
        if not root:
            field = "path" if spec.path else "args[0]"
            raise Denied(f"{name}.script_roots", f"{field}: {name_of(files.script.named)} is not below a script root")
    yield f'{name}.script_roots: "{root}"'


def script_root_of(command: Found, rules: PolicyRules) -> str:
    """Empty: it is below none, or no script: an interpreter does not become harmless by where it lies."""
    return root_of(command, rules) if command.is_script else ""


def root_of(file: Found, rules: PolicyRules) -> str:
    """Empty: it is below none."""
    return _first(rules.script_roots, lambda root: _is_below(file.path, root))


def _first(patterns: Sequence[str], matches: Callable[[str], bool]) -> str:
    return next((pattern for pattern in patterns if matches(pattern)), "")


def is_glob(pattern: str) -> bool:
    return "*" in pattern or "?" in pattern


@lru_cache(maxsize=1024)
def _regex(pattern: str) -> re.Pattern[str]:
    """`*` and `?` stay within one name, `**` does not."""
    parts = re.split(r"(\*\*|\*|\?)", pattern)
    wild = {"**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(wild.get(part) or re.escape(part) for part in parts) + r"\Z", re.DOTALL)


def is_real(path: str, pattern: str) -> bool:
    """Whether a real path is what the pattern means; a plain one may be a link itself, such as /bin/sh."""
    if is_glob(pattern):
        return _regex(pattern).match(path) is not None
    return path == os.path.realpath(pattern)


def _is_named(named: str, pattern: str) -> bool:
    if is_glob(pattern):
        return _regex(pattern).match(named) is not None
    parent, name = os.path.split(pattern)
    return named == os.path.join(os.path.realpath(parent), name)


def _is_denied(command: Found, pattern: str) -> bool:
    if is_real(command.path, pattern) or _is_named(command.named, pattern):
        return True
    # A hard link is the same file by another name. (A copy is another file: only allow_commands keeps those out.)
    if is_glob(pattern) or not command.inode:
        return False
    try:
        found = os.stat(pattern)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (command.device, command.inode)


def _is_below(path: str, root: str) -> bool:
    return path.startswith(os.path.realpath(root).rstrip("/") + "/")
