"""Which jobs the policy lets start, which rule says so, and that there is no way round it."""

from __future__ import annotations

import os
import pwd
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.spawning import PATH, Launchpad
from worker_svc.access.policy import DEFAULT_RULE, CommandPolicy
from worker_svc.access.policy.command_policy import Judged
from worker_svc.config import ConfigError, JobsConfig, PolicyConfig, SandboxConfig, Variables, load_config
from worker_svc.config.policy_rules import RulesTable
from worker_svc.job import CheckedFile, Identity, JobSpec, Limits, OutputPolicy, Sandbox
from worker_svc.supervisor.spawn import SpawnFailed

ROLE = "submitter"


JOBS = JobsConfig(pass_env=(), env=Variables({"PATH": PATH}))


def policy(**rules: Any) -> CommandPolicy:
    return CommandPolicy(PolicyConfig(submitter=RulesTable().from_toml(rules)), JOBS, SandboxConfig())


def judge(spec: JobSpec, role: str = ROLE, **rules: Any) -> Judged:
    return policy(**rules).judge(role, spec if spec.cwd else spec._replace(cwd="/"))


def is_allowed(spec: JobSpec, **rules: Any) -> bool:
    judged = judge(spec, **rules)
    return judged.decision.allowed and not judged.problem


def denial(spec: JobSpec, **rules: Any) -> tuple[str, str]:
    decision = judge(spec, **rules).decision
    assert not decision.allowed, decision
    return decision.rule, decision.reason


@pytest.fixture
def jobs(tmp_path: Path) -> Path:
    """A script root with one script; its real path."""
    root = tmp_path.resolve() / "jobs"
    root.mkdir()
    script(root / "ok.sh", "inside")
    return root


def script(path: Path, says: str) -> Path:
    path.write_text(f"#!/bin/sh\necho {says}\n")
    path.chmod(0o755)
    return path


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


def test_commands_by_path_and_by_link(tmp_path: Path) -> None:
    true = str(Path(shutil.which("true", path=PATH) or "").resolve())
    for pattern in (true, f"{Path(true).parent}/*", "/**", "/**/true", f"{Path(true).parent}/tru?"):
        judged = judge(JobSpec("true"), allow_commands=[pattern])
        assert judged.decision == (True, f'policy.submitter.allow_commands: "{pattern}"', "")
        assert [(file.field, file.path) for file in judged.checked] == [("command", true)]
    for pattern in ("/usr/*", "/no/such", f"{true}x", "/[a-z]*"):
        assert denial(JobSpec("true"), allow_commands=[pattern])[0] == "policy.submitter.allow_commands"
    # The name in the configuration may be a link; what it leads to now is what it means.
    link = tmp_path / "link"
    link.symlink_to(true)
    assert is_allowed(JobSpec(str(link)), allow_commands=[str(link)])
    assert is_allowed(JobSpec("true"), allow_commands=[str(link)])
    # But a link that only the caller knows is another name, and programs like busybox do what their name says.
    other = tmp_path / "other"
    other.symlink_to(true)
    assert not is_allowed(JobSpec(str(other)), allow_commands=[str(link)])
    assert not is_allowed(JobSpec(str(other)), allow_commands=[true])


def test_denied_commands() -> None:
    assert denial(JobSpec("bash", args=("-c", "x")), deny_commands=["/bin/bash"])[0].startswith(
        "policy.submitter.deny_commands"
    )
    assert judge(JobSpec("true"), deny_commands=["/bin/bash"]).decision.rule == (
        "policy.submitter.deny_commands: none of them"
    )


def test_commands_that_are_not_there_or_no_programs(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    rules: dict[str, Any] = {"allow_commands": ["/**"]}
    assert judge(JobSpec(str(plain)), **rules).problem == f"command: {plain.resolve()} is not executable"
    assert judge(JobSpec(str(tmp_path)), **rules).problem.endswith("is no regular file")
    assert judge(JobSpec("/no/such"), **rules).problem == "command: /no/such no such file or directory"
    assert not is_allowed(JobSpec("no-such-name"), **rules)


def test_the_jobs_own_path_is_searched(tmp_path: Path) -> None:
    script(tmp_path / "tool", "x")
    own = JobSpec("tool", env={"PATH": f"/no/such:{tmp_path}"})
    assert is_allowed(own, allow_commands=[f"{tmp_path.resolve()}/*"], allow_env=["PATH"])
    assert not is_allowed(JobSpec("tool"), allow_commands=[f"{tmp_path.resolve()}/*"])


def test_scripts_below_a_root(jobs: Path) -> None:
    rules: dict[str, Any] = {"script_roots": [str(jobs)]}
    for spec in (JobSpec("bash", str(jobs / "ok.sh")), JobSpec("bash", args=(str(jobs / "ok.sh"), "-x"))):
        judged = judge(spec, **rules)
        assert judged.decision == (True, f'policy.submitter.script_roots: "{jobs}"', "")
        assert judged.checked[1].path == str(jobs / "ok.sh")
        assert spec._replace(checked=judged.checked).checked_argv[1] == str(jobs / "ok.sh")
    assert is_allowed(JobSpec("bash", "ok.sh", cwd=str(jobs)), **rules)
    # The command itself may be the script; what follows is then its arguments.
    direct = judge(JobSpec(str(jobs / "ok.sh"), args=("/etc/passwd",)), **rules)
    assert direct.decision.allowed
    assert [file.field for file in direct.checked] == ["command"]


def test_a_script_that_cannot_be_executed_is_said_to_be_so(jobs: Path) -> None:
    (jobs / "ok.sh").chmod(0o644)
    judged = judge(JobSpec(str(jobs / "ok.sh")), script_roots=[str(jobs)])
    assert (judged.decision.allowed, judged.problem) == (True, f"command: {jobs / 'ok.sh'} is not executable")


def test_an_interpreter_below_a_root_makes_no_script_harmless(jobs: Path, tmp_path: Path) -> None:
    shutil.copy(os.path.realpath(shutil.which("sh", path=PATH) or ""), jobs / "sh")
    for spec in (JobSpec(str(jobs / "sh"), str(outside(tmp_path))), JobSpec(str(jobs / "sh"), "-c", ("echo x",))):
        assert denial(spec, script_roots=[str(jobs)])[0] == "policy.submitter.script_roots"
    assert is_allowed(JobSpec(str(jobs / "sh"), str(jobs / "ok.sh")), script_roots=[str(jobs)])


def test_a_first_word_that_one_table_takes_for_a_script_is_an_argument_to_the_other(jobs: Path, tmp_path: Path) -> None:
    """To the first table the command is the script, to the second it is an interpreter like any."""
    tool, data = script(jobs / "tool", "x"), script(outside(tmp_path).parent / "data", "y")
    config = PolicyConfig(
        all=RulesTable().from_toml({"script_roots": [str(jobs)], "allow_args": ["--ok"]}),
        submitter=RulesTable().from_toml({"script_roots": [str(data.parent)]}),
    )
    decision = CommandPolicy(config, JOBS, SandboxConfig()).judge(ROLE, JobSpec(str(tool), str(data), cwd="/")).decision
    assert (decision.rule, decision.reason) == (
        "policy.all.allow_args", "path: is not among the arguments allowed",
    )  # fmt: skip


def test_nothing_is_opened_for_reading_that_no_rule_asks_about(
    jobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    real = os.open

    def watched(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if not flags & os.O_PATH:
            opened.append(str(path))
        return real(path, flags, *rest, **more)

    evil = outside(tmp_path)
    monkeypatch.setattr(os, "open", watched)
    assert not is_allowed(JobSpec(str(evil)), allow_commands=["/bin/true"], script_roots=[str(evil.parent)])
    assert not is_allowed(JobSpec(str(evil)), script_roots=[str(jobs)])
    assert is_allowed(JobSpec(str(evil)), allow_commands=[str(evil)])
    assert is_allowed(JobSpec("sh", str(jobs / "ok.sh")), script_roots=[str(jobs)])
    assert not opened
    assert is_allowed(JobSpec(str(jobs / "ok.sh")), script_roots=[str(jobs)])
    assert len(opened) == 1


def test_what_the_request_alone_decides_looks_at_no_file() -> None:
    rules: dict[str, Any] = {"allow_commands": ["/bin/true"], "deny_args": ["x"], "max": {"args": 1}}
    for spec in (JobSpec("true", args=("a", "b")), JobSpec("true", args=("a", "x")), JobSpec("true", env={"A": ""})):
        judged = policy(**rules).judge_request(ROLE, spec)
        assert judged is not None
        assert not judged.decision.allowed
    assert policy(**rules).judge_request(ROLE, JobSpec("true")) is None


def test_where_a_job_may_run(jobs: Path, tmp_path: Path) -> None:
    evil = outside(tmp_path).parent
    (jobs / "below").mkdir()
    (jobs / "link").symlink_to(evil)
    (evil / "link").symlink_to(jobs / "below")
    rules: dict[str, Any] = {"allow_cwd": [str(jobs)]}
    rule = f'policy.submitter.allow_cwd: "{jobs}"'
    for cwd, real in {jobs: jobs, jobs / "below": jobs / "below", evil / "link": jobs / "below"}.items():
        # Of the program nothing is asked: it is not even looked for.
        judged = judge(JobSpec("no-such-program", cwd=str(cwd)), **rules)
        assert (judged.decision, judged.problem) == ((True, rule, ""), "")
        found = real.stat()
        assert judged.checked == (CheckedFile("cwd", str(real), found.st_dev, found.st_ino, 0),)
        assert judged.cwd == str(real)
    for cwd in (evil, jobs / "link", jobs / ".." / "outside", jobs.parent, Path("/"), Path(f"{jobs}-evil")):
        assert denial(JobSpec("true", cwd=str(cwd)), **rules)[0] == "policy.submitter.allow_cwd"
    assert not is_allowed(JobSpec("true", cwd=f"/proc/self/root{evil}"), **rules)
    for name, problem in (("gone", "no such file or directory"), ("ok.sh", "is no directory")):
        assert judge(JobSpec("true", cwd=str(jobs / name)), **rules).problem == f"cwd: {jobs / name} {problem}"
    # With rules for programs besides.
    both = judge(JobSpec("sh", "ok.sh", cwd=str(jobs)), **rules, script_roots=[str(jobs)])
    assert both.decision.rule == f'{rule}, policy.submitter.script_roots: "{jobs}"'
    assert is_allowed(JobSpec("true", cwd="/"), allow_cwd=["/"])
    assert judge(JobSpec("true", cwd=str(evil)), deny_args=["x"]).cwd == ""


# No way round


def outside(tmp_path: Path) -> Path:
    folder = tmp_path.resolve() / "outside"
    folder.mkdir(exist_ok=True)
    return script(folder / "evil.sh", "outside")


Escape = Callable[[Path, Path], JobSpec]


def _link(jobs: Path, evil: Path) -> JobSpec:
    (jobs / "link.sh").symlink_to(evil)
    return JobSpec("sh", str(jobs / "link.sh"))


def _link_of_a_folder(jobs: Path, evil: Path) -> JobSpec:
    (jobs / "folder").symlink_to(evil.parent)
    return JobSpec("sh", str(jobs / "folder" / "evil.sh"))


def _chain_of_links(jobs: Path, evil: Path) -> JobSpec:
    (jobs / "1").symlink_to("2")
    (jobs / "2").symlink_to("../jobs/3")
    (jobs / "3").symlink_to(evil)
    return JobSpec("sh", str(jobs / "1"))


def _through_proc_root(jobs: Path, evil: Path) -> JobSpec:
    return JobSpec("sh", f"/proc/self/root{evil}")


def _through_proc_cwd(jobs: Path, evil: Path) -> JobSpec:
    return JobSpec("sh", "/proc/self/cwd/evil.sh", cwd=str(evil.parent))


def _through_proc_fd(jobs: Path, evil: Path) -> JobSpec:
    fd = os.open(evil, os.O_RDONLY)
    return JobSpec("sh", f"/proc/self/fd/{fd}")


def _memory_file(jobs: Path, evil: Path) -> JobSpec:
    fd = os.memfd_create(f"{jobs}/ok.sh")
    os.write(fd, b"echo memory")
    return JobSpec("sh", f"/proc/self/fd/{fd}")


def _fifo(jobs: Path, evil: Path) -> JobSpec:
    os.mkfifo(jobs / "fifo")
    return JobSpec("sh", str(jobs / "fifo"))


def _removed_file(jobs: Path, evil: Path) -> JobSpec:
    fd = os.open(script(jobs / "gone.sh", "gone"), os.O_RDONLY)
    (jobs / "gone.sh").unlink()
    return JobSpec("sh", f"/proc/self/fd/{fd}")


def _removed_file_with_a_double(jobs: Path, evil: Path) -> JobSpec:
    """What the kernel calls it is the name of another file."""
    script(jobs / "gone.sh (deleted)", "inside")
    return _removed_file(jobs, evil)


def _hard_link_outside(jobs: Path, evil: Path) -> JobSpec:
    (evil.parent / "hard.sh").hardlink_to(jobs / "ok.sh")
    return JobSpec("sh", str(evil.parent / "hard.sh"))


ESCAPES: dict[str, Escape] = {
    "absolute": lambda jobs, evil: JobSpec("sh", str(evil)),
    "dots": lambda jobs, evil: JobSpec("sh", f"{jobs}/../outside/evil.sh"),
    "dots in cwd": lambda jobs, evil: JobSpec("sh", "../outside/evil.sh", cwd=str(jobs)),
    "dots after a file": lambda jobs, evil: JobSpec("sh", f"{jobs}/ok.sh/../../outside/evil.sh"),
    "cwd": lambda jobs, evil: JobSpec("sh", "evil.sh", cwd=str(evil.parent)),
    "the root's name as a prefix": lambda jobs, evil: JobSpec("sh", f"{_sibling(jobs)}/evil.sh"),
    "the root itself": lambda jobs, evil: JobSpec("sh", str(jobs)),
    "an option": lambda jobs, evil: JobSpec("sh", "-c", ("echo outside",)),
    "an option as the first argument": lambda jobs, evil: JobSpec("sh", args=("-c", "echo outside")),
    "standard input": lambda jobs, evil: JobSpec("sh", stdin_size_bytes=12),
    "standard input by its name": lambda jobs, evil: JobSpec("sh", "/dev/stdin"),
    "a fifo": _fifo,
    "nul": lambda jobs, evil: JobSpec("sh", f"{jobs}/ok.sh\0{evil}"),
    "overlong": lambda jobs, evil: JobSpec("sh", f"{jobs}/" + "./" * 3000 + "ok.sh"),
    "overlong name": lambda jobs, evil: JobSpec("sh", f"{jobs}/" + "x" * 300),
    "not there": lambda jobs, evil: JobSpec("sh", f"{jobs}/nothing.sh"),
    "empty": lambda jobs, evil: JobSpec("sh", "", ("",)),
    "link": _link,
    "link of a folder": _link_of_a_folder,
    "chain of links": _chain_of_links,
    "proc root": _through_proc_root,
    "proc cwd": _through_proc_cwd,
    "proc fd": _through_proc_fd,
    "memory": _memory_file,
    "removed": _removed_file,
    "removed, with a double": _removed_file_with_a_double,
    "hard link": _hard_link_outside,
}


def _sibling(jobs: Path) -> Path:
    sibling = jobs.with_name("jobs-evil")
    sibling.mkdir()
    script(sibling / "evil.sh", "outside")
    return sibling


@pytest.mark.parametrize("name", ESCAPES)
def test_no_script_from_outside(name: str, jobs: Path, tmp_path: Path) -> None:
    spec = ESCAPES[name](jobs, outside(tmp_path))
    assert not is_allowed(spec, script_roots=[str(jobs)])


@pytest.mark.parametrize(
    "name", ["absolute", "dots", "link", "chain of links", "link of a folder", "proc root", "proc fd", "hard link"]
)
def test_no_command_from_outside(name: str, jobs: Path, tmp_path: Path) -> None:
    spec = ESCAPES[name](jobs, outside(tmp_path))
    command = JobSpec(spec.path, cwd=spec.cwd)
    assert not is_allowed(command, allow_commands=[f"{jobs}/**"])
    assert not is_allowed(command, script_roots=[str(jobs)])
    by_path = JobSpec("tool", env={"PATH": str(Path(spec.path).parent)})
    assert not is_allowed(by_path, allow_commands=[f"{jobs}/**"], allow_env=["PATH"])


def test_a_hard_link_of_a_denied_command(tmp_path: Path) -> None:
    denied = script(tmp_path / "denied", "x")
    (tmp_path / "hard").hardlink_to(denied)
    (tmp_path / "soft").symlink_to(denied)
    for name in ("denied", "hard", "soft"):
        assert not is_allowed(JobSpec(str(tmp_path / name)), deny_commands=[str(denied)]), name


def test_the_interpreter_of_the_worker_by_proc_is_what_it_is() -> None:
    real = os.path.realpath(sys.executable)
    judged = judge(JobSpec("/proc/self/exe"), allow_commands=[real])
    # It has another name than the one allowed: so it is not.
    assert not judged.decision.allowed
    assert judge(JobSpec("/proc/self/exe"), allow_commands=["/**"]).checked[0].path == real


# What is run is what was checked


def run(pad: Launchpad, spec: JobSpec, judged: Judged, between: Callable[[], object] = lambda: None) -> tuple[int, str]:
    assert judged.decision.allowed, judged.decision
    assert not judged.problem
    checked = spec._replace(checked=judged.checked)
    plan = pad.plan(*checked.checked_argv, checked=checked.checked, cwd=spec.cwd or "/", identity=spec.identity)
    between()
    ended = pad.run_plan(plan)
    return ended.exit_code, ended.output


def test_what_was_checked_is_run(pad: Launchpad, jobs: Path) -> None:
    spec = JobSpec("sh", "ok.sh", cwd=str(jobs))
    assert run(pad, spec, judge(spec, script_roots=[str(jobs)])) == (0, "inside\n")
    # A script that is the command, which cannot be executed by its descriptor.
    spec = JobSpec("./ok.sh", cwd=str(jobs))
    assert run(pad, spec, judge(spec, script_roots=[str(jobs)])) == (0, "inside\n")
    spec = JobSpec("printf", args=("%s", "x"))
    assert run(pad, spec, judge(spec, allow_commands=["/**"])) == (0, "x")


def test_a_program_gets_no_descriptor_of_the_check(pad: Launchpad) -> None:
    spec = JobSpec("sh", args=("-c", "ls /proc/$$/fd"))
    status, output = run(pad, spec, judge(spec, allow_commands=["/**"]))
    assert (status, set(output.split())) == (0, {"0", "1", "2"})


def test_the_name_that_a_program_is_called_by_stays(pad: Launchpad) -> None:
    spec = JobSpec("sh", args=("-c", "cat /proc/$$/cmdline"))
    assert run(pad, spec, judge(spec, allow_commands=["/**"]))[1].startswith("sh\0")


@pytest.mark.parametrize("what", ["command", "path"])
@pytest.mark.parametrize("how", ["replaced", "link swapped", "written to", "folder swapped", "removed"])
def test_what_changes_between_check_and_exec_is_not_run(
    pad: Launchpad, jobs: Path, tmp_path: Path, what: str, how: str
) -> None:
    evil = outside(tmp_path)
    folder = jobs / "folder"
    folder.mkdir()
    file = script(folder / "x.sh", "inside")
    link = jobs / "link.sh"
    link.symlink_to(file)
    named = link if how == "link swapped" else file
    spec = JobSpec(str(named)) if what == "command" else JobSpec("sh", str(named))
    judged = judge(spec, script_roots=[str(jobs)])

    def change() -> None:
        match how:
            case "replaced":
                shutil.copy(evil, folder / "new")
                (folder / "new").rename(file)
            case "link swapped":
                link.unlink()
                link.symlink_to(evil)
            case "written to":
                file.write_text(evil.read_text())
            case "folder swapped":
                folder.rename(jobs / "old")
                (evil.parent / "x.sh").write_bytes(evil.read_bytes())
                (evil.parent / "x.sh").chmod(0o755)
                folder.symlink_to(evil.parent)
            case "removed":
                file.unlink()

    if how == "link swapped":  # the link was not what was checked, but where it led
        assert run(pad, spec, judged, change) == (0, "inside\n")
        return
    why = "no such file" if how == "removed" else "changed or replaced"
    with pytest.raises(SpawnFailed, match=f"^{what}: {file}.*{why}"):
        run(pad, spec, judged, change)


@pytest.mark.parametrize("how", ["link", "another directory", "moved, and a link to it", "moved below", "removed"])
def test_where_it_was_to_run_and_what_is_there_by_then(pad: Launchpad, jobs: Path, how: str) -> None:
    at = jobs / "above" / "at"
    at.mkdir(parents=True)
    spec = JobSpec("pwd", args=("-P",), cwd=str(at))
    judged = judge(spec, allow_cwd=[str(jobs / "above")])

    def change() -> None:
        match how:
            case "link":
                at.rename(jobs / "old")
                at.symlink_to("/etc")
            case "another directory":
                at.rename(jobs / "old")
                at.mkdir()
            case "moved, and a link to it":
                at.rename(jobs / "old")
                at.symlink_to(jobs / "old")
            case "moved below":
                at.parent.rename(jobs / "old")
                at.parent.symlink_to(jobs / "old")
            case "removed":
                shutil.rmtree(at)

    assert run(pad, spec, judged) == (0, f"{at}\n")
    assert run(pad, spec, judged, (at / "new").touch) == (0, f"{at}\n")
    why = "no such file" if how == "removed" else "was moved or replaced after the worker's policy allowed it"
    with pytest.raises(SpawnFailed, match=rf"^cwd: {at}.* ?{why}"):
        run(pad, spec, judged, change)


def test_a_directory_that_its_user_cannot_enter_is_none(pad: Launchpad, jobs: Path) -> None:
    """That it was opened by who may is no way in."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    jobs.chmod(0o700)
    spec = JobSpec("pwd", cwd=str(jobs), identity=Identity("nobody"))
    with pytest.raises(SpawnFailed, match="permission denied"):
        run(pad, spec, judge(spec, allow_cwd=[str(jobs)], allow_users=["nobody"]))


def test_a_file_that_others_link_to_meanwhile_is_not_run(pad: Launchpad, jobs: Path, tmp_path: Path) -> None:
    spec = JobSpec("sh", str(jobs / "ok.sh"))
    judged = judge(spec, script_roots=[str(jobs)])
    with pytest.raises(SpawnFailed, match="changed or replaced"):
        run(pad, spec, judged, lambda: (tmp_path / "hard").hardlink_to(jobs / "ok.sh"))


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
