"""As whom a job runs and what it gets to see, as the policy has it."""

from __future__ import annotations

import os
import pwd
from typing import Any

import pytest

from tests.support.configured import load_config
from tests.support.policies import JOBS, ROLE
from tests.support.spawning import PATH
from worker_svc.access.policy import DEFAULT_RULE, CommandPolicy
from worker_svc.config import ConfigError, JobsConfig, PolicyConfig, SandboxConfig, Variables
from worker_svc.config.policy_rules import RulesTable
from worker_svc.job import Identity, JobSpec, Sandbox

# As whom, and what it gets to see: floors


FLOOR_JOBS = JobsConfig(user="nobody", pass_env=(), env=Variables({"PATH": PATH}))

FLOOR_SANDBOX = SandboxConfig(
    read_only_paths=("/usr", "/etc"), read_write_paths=("/srv",), private_tmp=True, no_network=True
)

NOBODY = Identity("nobody")

WALLS = FLOOR_SANDBOX.sandbox


def decided(
    identity: Identity = NOBODY, sandbox: Sandbox = WALLS, role: str = ROLE, **tables: dict[str, Any]
) -> tuple[bool, str, str]:
    """Under floors of all kinds; `tables`: the rules of each."""
    config = PolicyConfig(**{name: RulesTable().from_toml(rules) for name, rules in tables.items()})
    spec = JobSpec("true", cwd="/", identity=identity, sandbox=sandbox)
    return CommandPolicy(config, FLOOR_JOBS, FLOOR_SANDBOX).judge(role, spec).decision


BEYOND: list[tuple[Identity, Sandbox, str, str, dict[str, Any]]] = [
    (Identity("root"), WALLS, 'jobs.user: "nobody"', "identity.user", {"allow_users": ["root"]}),
    (Identity("0"), WALLS, 'jobs.user: "nobody"', "identity.user", {"allow_users": ["0"]}),
    (Identity(""), WALLS, 'jobs.user: "nobody"', "identity.user", {}),  # the supervisor's own
    (Identity("65534"), WALLS, 'jobs.user: "nobody"', "identity.user", {}),
    (Identity("nobody", "root"), WALLS, 'jobs.user: "nobody"', "identity.group", {}),
    (Identity("nobody", "", ("0",)), WALLS, 'jobs.user: "nobody"', "identity.groups", {}),
    (Identity("nobody", "", ()), WALLS, 'jobs.user: "nobody"', "identity.groups", {}),
    (Identity("nobody", no_new_privs=False), WALLS, "jobs.no_new_privs: true", "identity.no_new_privs",
     {"allow_new_privs": True}),
    *(
        (NOBODY, WALLS._replace(**change), f"sandbox.{rule}", f"sandbox.{rule.partition(':')[0]}",
         {"allow_sandbox_changes": True})
        for change, rule in (
            ({"private_tmp": False}, "private_tmp: true"),
            ({"no_network": False}, "no_network: true"),
            ({"read_only_paths": ("/",)}, "read_only_paths"),
            ({"read_only_paths": ("/usr", "/etc", "/srv/link-to-root")}, "read_only_paths"),
            ({"read_only_paths": ("/usr/..",)}, "read_only_paths"),
            ({"read_write_paths": ("/usr",)}, "read_write_paths"),
            ({"read_write_paths": ("/srv", "/srv/link-to-root")}, "read_write_paths"),
            ({"read_only_paths": (), "read_write_paths": ()}, "read_only_paths"),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("identity, sandbox, rule, field, opening", BEYOND)
@pytest.mark.parametrize("role", ["submitter", "operator"])
def test_a_floor_holds_unless_a_table_opens_it(
    role: str, identity: Identity, sandbox: Sandbox, rule: str, field: str, opening: dict[str, Any]
) -> None:
    allowed, by, reason = decided(identity, sandbox, role)
    assert (allowed, by) == (False, rule)
    assert reason.startswith(f"{field}: ")
    # Rules of other sorts do not open it, and neither do those of another role.
    assert not decided(identity, sandbox, role, all={"deny_args": ["x"]}, admin={"allow_new_privs": True})[0]
    for table in (role, "all"):
        if opening:
            assert decided(identity, sandbox, role, **{table: opening})[:2] == (
                True,
                f"policy.{table}.{next(iter(opening))}",
            )
            assert next(iter(opening)) in reason
    # Admins are not bound by it.
    assert decided(identity, sandbox, "admin") == (True, DEFAULT_RULE, "")


@pytest.mark.parametrize(
    "identity, sandbox",
    [
        (NOBODY, WALLS),
        (NOBODY, WALLS._replace(read_only_paths=("/usr",), read_write_paths=())),
        (NOBODY, WALLS._replace(read_only_paths=("/usr", "/srv"), read_write_paths=())),
        (NOBODY, WALLS._replace(read_only_paths=(), read_write_paths=("/srv",))),
    ],
)
def test_as_much_as_the_floor_or_less_is_free(identity: Identity, sandbox: Sandbox) -> None:
    assert decided(identity, sandbox) == (True, DEFAULT_RULE, "")


def test_without_configuration_jobs_run_as_the_worker_and_may_be_walled_in() -> None:
    own, other = pwd.getpwuid(os.geteuid()).pw_name, "daemon" if os.geteuid() == 0 else "root"
    plain = JobSpec("true", cwd="/")
    walled = Sandbox(("/",), ("/tmp",), private_tmp=True, no_network=True)
    free = CommandPolicy(PolicyConfig(), JOBS, SandboxConfig())
    for spec in (plain, plain._replace(identity=Identity(own)), plain._replace(sandbox=walled)):
        assert free.judge(ROLE, spec).decision.allowed
    denied = free.judge(ROLE, plain._replace(identity=Identity(other))).decision
    assert denied.rule == 'jobs.user: ""'
    assert denied.reason == (
        f"identity.user: jobs of role {ROLE} run as {own}, not as {other}, "
        f"unless allow_users of [policy.{ROLE}] names who they may run as"
    )
    # What the configuration leaves off, everybody may.
    lax = CommandPolicy(PolicyConfig(), JobsConfig(no_new_privs=False), SandboxConfig())
    assert lax.judge(ROLE, plain._replace(identity=Identity(no_new_privs=False))).decision.allowed


def test_users_that_a_table_names_bring_no_groups_of_choice() -> None:
    for identity, field in ((Identity("daemon", "root"), "group"), (Identity("daemon", "", ("0",)), "groups")):
        decision = decided(identity, submitter={"allow_users": ["daemon"]})
        assert not decision[0]
        assert decision[2].startswith(f"identity.{field}: ")
    # A table names who there is, and nobody else, be it the configured user.
    assert not decided(NOBODY, submitter={"allow_users": ["daemon"]})[0]


def test_the_switches_of_a_table_are_true_or_false() -> None:
    with pytest.raises(ConfigError, match="allow_new_privs: must be true or false"):
        load_config(None, environ={"HOME": "/", "WORKER_SVC_POLICY_ALL": "{ allow_new_privs = 1 }"})
