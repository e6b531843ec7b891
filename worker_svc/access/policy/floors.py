"""As whom a job runs and what it gets to see, as the configuration has it: a floor for every role below admin, unless
a table of rules opens it. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from worker_svc.access.policy.rules import Denied
from worker_svc.config import PolicyRules
from worker_svc.job import Identity, JobSpec, Sandbox

FREE_ROLE = "admin"

Tables = Sequence[tuple[str, PolicyRules]]


class Floors(NamedTuple):
    identity: Identity
    sandbox: Sandbox
    own_user: str
    """Whose jobs they are where `identity` names nobody."""


def judge_floors(role: str, tables: Tables, spec: JobSpec, floors: Floors) -> list[str]:
    """The rules that open what the job asks for, if it asks for more than the configuration gives. Raises Denied."""
    if role == FREE_ROLE or (spec.identity == floors.identity and spec.sandbox == floors.sandbox):
        return []
    return [
        *_judge_user(role, tables, spec.identity, floors),
        *_judge_privileges(role, tables, spec.identity, floors),
        *_judge_sandbox(role, tables, spec.sandbox, floors.sandbox),
    ]


def _judge_user(role: str, tables: Tables, asked: Identity, floors: Floors) -> Iterator[str]:
    theirs = floors.identity.user or floors.own_user
    is_theirs = asked.user in (floors.identity.user, theirs)
    opened_by = next((name for name, rules in tables if rules.allow_users), "")
    if opened_by:  # each of these tables has its own say about users and groups
        if not is_theirs:
            yield f"{opened_by}.allow_users"
        return
    rule = f'jobs.user: "{floors.identity.user}"'
    if not is_theirs:
        raise Denied(
            rule,
            f"identity.user: jobs of role {role} run as {theirs}, not as {asked.user or floors.own_user}, unless "
            f"allow_users of [policy.{role}] names who they may run as",
        )
    for field, value in (("group", asked.group), ("groups", asked.groups)):
        if value not in ("", None):
            raise Denied(rule, f"identity.{field}: for role {role} must be those of the user: leave it out")


def _judge_privileges(role: str, tables: Tables, asked: Identity, floors: Floors) -> Iterator[str]:
    if floors.identity.no_new_privs and not asked.no_new_privs:
        problem = f"identity.no_new_privs: role {role} may not turn it off"
        yield _opened_by("allow_new_privs", role, tables, "jobs.no_new_privs: true", problem)


def _judge_sandbox(role: str, tables: Tables, asked: Sandbox, floor: Sandbox) -> Iterator[str]:
    wider = _wider(asked, floor)
    if wider is not None:
        rule, problem = wider
        yield _opened_by("allow_sandbox_changes", role, tables, f"sandbox.{rule}", f"{problem} by role {role}")


def _opened_by(flag: str, role: str, tables: Tables, rule: str, problem: str) -> str:
    """The rule that sets the flag. Raises Denied."""
    for name, rules in tables:
        if getattr(rules, flag):
            return f"{name}.{flag}"
    raise Denied(rule, f"{problem}, unless [policy.{role}] has {flag} = true")


def _wider(asked: Sandbox, floor: Sandbox) -> tuple[str, str] | None:
    """Which key of the configuration it would undo, and what it asks for."""
    for name in ("private_tmp", "no_network"):
        if getattr(floor, name) and not getattr(asked, name):
            return f"{name}: true", f"sandbox.{name}: may not be turned off"
    if not (floor.read_only_paths or floor.read_write_paths):
        return None
    if not (asked.read_only_paths or asked.read_write_paths):
        return "read_only_paths", "sandbox.read_only_paths: may not be left empty"
    # The very same paths: one below may be a link that an earlier job has made to lead elsewhere.
    readable = {*floor.read_only_paths, *floor.read_write_paths}
    for name, there in (("read_only_paths", readable), ("read_write_paths", {*floor.read_write_paths})):
        more = next((index for index, path in enumerate(getattr(asked, name)) if path not in there), None)
        if more is not None:
            return name, f"sandbox.{name}: entry {more} is none of the paths of [sandbox] and may not be added"
    return None
