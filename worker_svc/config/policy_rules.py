"""A table of rules in the section `[policy]`: what jobs may be."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

from worker_svc.config.declare import A_MOMENT_S
from worker_svc.config.errors import Fault, Invalid, did_you_mean
from worker_svc.config.kinds import Bool, Kind, Listed, inline_table, regex
from worker_svc.config.path_kinds import absolute_path
from worker_svc.config.values import Table, quote, show, show_type
from worker_svc.job.limits import INT64_MAX, LIMITS, RLIMIT_NAMES, RLIMITS
from worker_svc.job.spec import DURATION_MAX_S

# What a job has that a rule can bound, and from where to where a bound makes sense: it can become a job's own limit.
MAXIMA: Final[dict[str, tuple[float, float]]] = {
    **dict.fromkeys(("args", "env", "labels", "stdin_bytes"), (0, INT64_MAX)),
    "timeout_s": (A_MOMENT_S, DURATION_MAX_S),
    "stop_grace_s": (0, DURATION_MAX_S),
    "output_max_bytes": (1, INT64_MAX),
    **{limit.policy_key: (limit.low, limit.high) for limit in LIMITS if limit.bound and limit.kind != RLIMITS},
    **{f"rlimits.{name}": (0, INT64_MAX) for name in RLIMIT_NAMES},
}
# Limits that are bounded from below.
MINIMA: Final = {limit.policy_key: limit for limit in LIMITS if limit.bound == "min"}
_NO_WALLS: Final = tuple(limit.name for limit in LIMITS if not limit.bound)


@dataclass(frozen=True, slots=True)
class PolicyRules(Table):
    """Empty lists and tables allow everything."""

    allow_commands: tuple[str, ...] = ()
    deny_commands: tuple[str, ...] = ()
    script_roots: tuple[str, ...] = ()
    allow_args: tuple[str, ...] = ()
    deny_args: tuple[str, ...] = ()
    allow_users: tuple[str, ...] = ()
    allow_env: tuple[str, ...] = ()
    deny_env: tuple[str, ...] = ()
    allow_cwd: tuple[str, ...] = ()
    allow_new_privs: bool = False
    allow_sandbox_changes: bool = False
    max: Mapping[str, float] = field(default_factory=dict, hash=False)

    @property
    def restricts_programs(self) -> bool:
        return bool(self.allow_commands or self.deny_commands or self.script_roots)

    @property
    def looks_at_files(self) -> bool:
        return self.restricts_programs or bool(self.allow_cwd)

    def entries(self) -> dict[str, object]:
        """As it stands in the file."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: dict(value) if name == "max" else value for name, value in values.items() if value}


def _path_glob(text: str) -> str:
    if not text.startswith("/"):
        raise ValueError(f"must be an absolute path, with *, ? and ** as wildcards, not {quote(text)}")
    return _plain(text)


def _plain(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not contain NUL")
    return text


def _regex(text: str) -> str:
    try:
        return regex(text)
    except ValueError as error:
        raise ValueError(f"must be a regular expression, not {quote(text)}: {error}") from None


_LISTS: Final[dict[str, tuple[str, Callable[[str], str]]]] = {
    "allow_commands": ("absolute paths with wildcards", _path_glob),
    "deny_commands": ("absolute paths with wildcards", _path_glob),
    "script_roots": ("absolute paths", absolute_path),
    "allow_args": ("regular expressions", _regex),
    "deny_args": ("regular expressions", _regex),
    "allow_users": ("names of users", _plain),
    "allow_env": ("names of variables with wildcards", _plain),
    "deny_env": ("names of variables with wildcards", _plain),
    "allow_cwd": ("absolute paths", absolute_path),
}


# What they allow is denied to roles below admin without them.
_FLAGS: Final = ("allow_new_privs", "allow_sandbox_changes")


class RulesTable(Kind[PolicyRules]):
    type_name = "table of rules"
    expects = 'a table of rules, such as { script_roots = ["/opt/jobs"] }'

    def from_toml(self, value: object) -> PolicyRules:
        if not isinstance(value, dict):
            raise Invalid(f"must be {self.expects}, not {show_type(value)}")
        faults: list[Fault] = []
        rules: dict[str, Any] = {}
        for name, raw in value.items():
            try:
                rules[name] = self._rule(name, raw)
            except Invalid as error:
                faults += [Fault(fault.text, (name, *fault.below)) for fault in error.faults]
        if faults:
            raise Invalid(*faults)
        return PolicyRules(**rules)

    def _rule(self, name: str, raw: object) -> object:
        if name == "max":
            return _maxima(raw)
        if name in _FLAGS:
            return Bool().from_toml(raw)
        if name not in _LISTS:
            raise Invalid("there is no such rule" + did_you_mean(name, (*_LISTS, *_FLAGS, "max")))
        return Listed(*_LISTS[name]).from_toml(raw)

    def from_text(self, text: str) -> PolicyRules:
        """From a TOML inline table."""
        return self.from_toml(inline_table(text or "{}", f"{self.expects} on one line", shows_error=True))


def _maxima(raw: object) -> dict[str, float]:
    if not isinstance(raw, dict):
        raise Invalid(f"must be a table of numbers, such as {{ timeout_s = 600 }}, not {show_type(raw)}")
    faults: list[Fault] = []
    found: dict[str, float] = {}
    for name, value in _flat(raw).items():
        if name in _NO_WALLS:
            faults.append(Fault("can have no maximum: a job can change it at will, whatever it began with", (name,)))
        elif name not in MAXIMA:
            faults.append(Fault("there is no such limit" + did_you_mean(name, MAXIMA), (name,)))
        elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            faults.append(Fault(f"must be a number, not {show(value)}", (name,)))
        elif not MAXIMA[name][0] <= value <= MAXIMA[name][1]:
            low, high = MAXIMA[name]
            faults.append(Fault(f"must be from {low:.15g} to {high:.15g}, not {show(value)}", (name,)))
        else:
            found[name] = value
    if faults:
        raise Invalid(*faults)
    return found


def _flat(table: dict[str, Any]) -> dict[str, Any]:
    """`rlimits.nofile` without quotes is a table in a table."""
    rlimits = table.get("rlimits")
    if not isinstance(rlimits, dict):
        return table
    rest = {name: value for name, value in table.items() if name != "rlimits"}
    return {**rest, **{f"rlimits.{name}": value for name, value in rlimits.items()}}
