"""Which jobs the policy lets start, and which rule says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.configured import load_config
from tests.support.policies import JOBS, ROLE, judge, policy
from worker_svc.access.policy import DEFAULT_RULE, CommandPolicy
from worker_svc.config import ConfigError, PolicyConfig, SandboxConfig
from worker_svc.config.policy_rules import RulesTable
from worker_svc.job import Identity, JobSpec, Limits, OutputPolicy

# Rules


def test_without_rules_everything_is_allowed_and_nothing_is_looked_at() -> None:
    judged = CommandPolicy(PolicyConfig(), JOBS, SandboxConfig()).judge(
        ROLE, JobSpec("no-such-program", "../x", cwd="/no/such")
    )
    assert judged.decision == (True, DEFAULT_RULE, "")
    assert (judged.checked, judged.problem) == ((), "")


def test_rules_are_of_a_role_and_of_all() -> None:
    config = PolicyConfig(
        all=RulesTable().from_toml({"deny_args": ["evil"]}),
        operator=RulesTable().from_toml({"max": {"args": 1}}),
    )
    both = CommandPolicy(config, JOBS, SandboxConfig())
    evil, many = JobSpec("true", args=("evil",)), JobSpec("true", args=("a", "b"))
    assert {role: both.judge(role, evil).decision.allowed for role in ("admin", "operator")} == {
        "admin": False,
        "operator": False,
    }
    assert both.judge("admin", many).decision == (True, "policy.all: nothing against it", "")
    assert both.judge("operator", many).decision.rule == "policy.operator.max.args: 1"


def nofile(hard: int) -> Limits:
    return {"rlimits": {"nofile": (1, hard)}}


@pytest.mark.parametrize(
    "spec, rules, rule",
    [
        (JobSpec("true", args=("a", "b")), {"allow_args": ["[a-z]"]}, ""),
        (JobSpec("true", args=("a", "B")), {"allow_args": ["[a-z]"]}, "allow_args"),
        (JobSpec("true", args=("aa",)), {"allow_args": ["[a-z]"]}, "allow_args"),
        (JobSpec("true", "B"), {"allow_args": ["[a-z]"]}, "allow_args"),
        (JobSpec("true", args=("a\nB",)), {"allow_args": ["[a-z]*$"]}, "allow_args"),
        (JobSpec("true", args=("x--exec=y",)), {"deny_args": ["--exec"]}, 'deny_args: "--exec"'),
        (JobSpec("true", "--exec"), {"deny_args": ["--exec"]}, 'deny_args: "--exec"'),
        (JobSpec("true", identity=Identity("nobody")), {"allow_users": ["nobody"]}, ""),
        (JobSpec("true"), {"allow_users": ["nobody"]}, "allow_users"),
        (JobSpec("true", identity=Identity("0")), {"allow_users": ["nobody"]}, "allow_users"),
        (JobSpec("true", identity=Identity("nobody", "root")), {"allow_users": ["nobody"]}, "allow_users"),
        (JobSpec("true", identity=Identity("nobody", "", ("0",))), {"allow_users": ["nobody"]}, "allow_users"),
        (JobSpec("true", env={"JOB_A": "", "X": ""}), {"allow_env": ["JOB_*", "X"]}, ""),
        (JobSpec("true", env={"JOB_A": "", "job_b": ""}), {"allow_env": ["JOB_*"]}, "allow_env"),
        (JobSpec("true", env={"JOB_A": ""}), {"allow_env": ["JOB_[AB]"]}, "allow_env"),  # no wildcard
        (JobSpec("true", env={"JOB_[A]": ""}), {"deny_env": ["JOB_[A]"]}, 'deny_env: "JOB_[A]"'),
        (JobSpec("true", env={"LD_PRELOAD": ""}), {"deny_env": ["LD_*"]}, 'deny_env: "LD_*"'),
        (JobSpec("true", env={"LD_PRELOAD": ""}), {"allow_env": ["*"], "deny_env": ["LD_*"]}, 'deny_env: "LD_*"'),
        (JobSpec("true", env={"A": ""}), {"allow_commands": ["/**"]}, "allow_env"),
        (JobSpec("true", env={"A": ""}), {"allow_commands": ["/**"], "allow_env": ["A"]}, ""),
        (JobSpec("true", timeout_s=10), {"max": {"timeout_s": 10}}, ""),
        (JobSpec("true", timeout_s=10.5), {"max": {"timeout_s": 10}}, "max.timeout_s: 10"),
        (JobSpec("true"), {"max": {"timeout_s": 10}}, "max.timeout_s: 10"),  # none is more than any
        (JobSpec("true"), {"max": {"output_max_bytes": 10}}, "max.output_max_bytes: 10"),
        (JobSpec("true", output_max_bytes=10), {"max": {"output_max_bytes": 10}}, ""),
        (JobSpec("true", output_max_bytes=10, output_policy=OutputPolicy.NONE), {"max": {"output_max_bytes": 10}},
         "max.output_max_bytes: 10"),
        (JobSpec("true", stdin_size_bytes=2), {"max": {"stdin_bytes": 1}}, "max.stdin_bytes: 1"),
        (JobSpec("true", stop_grace_s=2), {"max": {"stop_grace_s": 1}}, "max.stop_grace_s: 1"),
        (JobSpec("true", labels={"a": "b"}), {"max": {"labels": 0}}, "max.labels: 0"),
        (JobSpec("true", env={"a": "b"}), {"max": {"env": 0}}, "max.env: 0"),
        (JobSpec("true"), {"max": {"memory_max_bytes": 2**20}}, "max.memory_max_bytes: 1048576 (1M)"),
        (JobSpec("true", limits={"memory_max_bytes": 2**20}), {"max": {"memory_max_bytes": 2**20}}, ""),
        (JobSpec("true"), {"max": {"cpu_weight": 100}}, ""),
        (JobSpec("true", limits={"cpu_weight": 9}), {"max": {"cpu_weight": 8}}, "max.cpu_weight: 8"),
        (JobSpec("true", limits={"rlimits": {"nofile": (1, None)}}), {"max": {"rlimits.nofile": 9}},
         "max.rlimits.nofile: 9"),
        (JobSpec("true", limits=nofile(9)), {"max": {"rlimits.nofile": 9}}, ""),
        (JobSpec("true", limits=nofile(10)), {"max": {"rlimits": {"nofile": 9}}}, "max.rlimits.nofile: 9"),
        (JobSpec("true", limits=nofile(-1)), {"max": {"rlimits.nofile": 9}}, "max.rlimits.nofile: 9"),
        (JobSpec("true", limits={"nice": -1}), {"max": {"nice_min": 0}}, "max.nice_min: 0"),
        (JobSpec("true"), {"max": {"nice_min": 0}}, ""),
    ],
)  # fmt: skip
def test_rules_without_files(spec: JobSpec, rules: dict[str, Any], rule: str) -> None:
    decision = judge(spec, **rules).decision
    assert decision.allowed == (not rule)
    if rule:
        assert decision.rule == f"policy.submitter.{rule}"
        assert decision.reason


def test_bounds_are_the_strictest_of_all_tables() -> None:
    config = PolicyConfig(
        all=RulesTable().from_toml({"max": {"timeout_s": 10, "nice_min": 5, "args": 3}}),
        operator=RulesTable().from_toml({"max": {"timeout_s": 20, "nice_min": 0, "env": 1}}),
    )
    both = CommandPolicy(config, JOBS, SandboxConfig())
    assert both.bounds_of("operator") == {"timeout_s": 10, "nice_min": 5, "args": 3, "env": 1}
    assert both.bounds_of("admin") == {"timeout_s": 10, "nice_min": 5, "args": 3}


def test_the_grace_of_a_stop_is_bounded_as_the_jobs() -> None:
    both = CommandPolicy(PolicyConfig(all=RulesTable().from_toml({"max": {"stop_grace_s": 5}})), JOBS, SandboxConfig())
    for role in ("admin", "submitter"):
        assert both.denial_of_grace(role, 5) is None
        denied = both.denial_of_grace(role, 5.5)
        assert denied == (False, "policy.all.max.stop_grace_s: 5", "grace: must be at most 5 s, not 5.5")
    assert policy().denial_of_grace(ROLE, 1e6) is None


@pytest.mark.parametrize(
    "limit, value",
    [
        ("timeout_s", 0),
        ("timeout_s", -1),
        ("output_max_bytes", 0),
        ("memory_max_bytes", 1000),
        ("pids_max", 0),
        ("cpu_weight", 10_001),
        ("args", -1),
        ("rlimits.nofile", -1),
        ("nice_min", -21),
    ],
)
def test_a_maximum_that_makes_no_sense(limit: str, value: int) -> None:
    rules = f"{{ max = {{ '{limit}' = {value} }} }}"
    with pytest.raises(ConfigError, match=rf"max: .*{limit}.*must be from \S+ to \S+, not {value}"):
        load_config(None, environ={"HOME": "/", "WORKER_SVC_POLICY_ALL": rules})


@pytest.mark.parametrize("limit", ["umask", "cpu_affinity"])
def test_what_no_maximum_can_hold(limit: str) -> None:
    with pytest.raises(ConfigError, match=rf"{limit}.*can have no maximum: a job can change it at will"):
        load_config(None, environ={"HOME": "/", "WORKER_SVC_POLICY_ALL": f"{{ max = {{ {limit} = 1 }} }}"})


# The configuration


def problems(text: str, tmp_path: Path) -> list[str]:
    (tmp_path / "w.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "w.toml", environ={"HOME": "/home"})
    return [str(problem).removeprefix(f"{tmp_path}/w.toml:") for problem in caught.value.problems]


WILDCARDS = "with *, ? and ** as wildcards"

REGEX_FAULT = "missing ), unterminated subpattern at position 0"


def test_what_can_be_wrong_with_rules(tmp_path: Path) -> None:
    text = (
        "[policy.submitter]\nallow_comands = []\nallow_commands = ['bash']\nallow_args = ['(']\n"
        "script_roots = 'x'\nmax = { timeout = 1, args = 'x' }\n[policy.nobody]\n"
    )
    assert problems(text, tmp_path) == [
        "2: policy.submitter.allow_comands: there is no such rule; did you mean allow_commands?",
        f'3: policy.submitter.allow_commands: entry 1 must be an absolute path, {WILDCARDS}, not "bash"',
        f'4: policy.submitter.allow_args: entry 1 must be a regular expression, not "(": {REGEX_FAULT}',
        '5: policy.submitter.script_roots: must be a list of absolute paths, not "x"',
        "6: policy.submitter.max.timeout: there is no such limit; did you mean timeout_s?",
        '6: policy.submitter.max.args: must be a number, not "x"',
        "7: policy.nobody: unknown key",
    ]


def test_rules_by_a_variable_and_in_the_dump(tmp_path: Path) -> None:
    from worker_svc.config import load

    text = "[policy.submitter]\nallow_commands = ['/bin/sh']\nmax = { timeout_s = 5, 'rlimits.nofile' = 9 }\n"
    (tmp_path / "w.toml").write_text(text)
    loaded = load(tmp_path / "w.toml", environ={"HOME": "/home", "WORKER_SVC_POLICY_ALL": "{ deny_args = ['a,b'] }"})
    assert loaded.config.policy.all.deny_args == ("a,b",)
    (tmp_path / "again.toml").write_text(loaded.dump())
    assert load_config(tmp_path / "again.toml", environ={}).policy == loaded.config.policy
