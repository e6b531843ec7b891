"""Commands, scripts and directories that the policy knows by their files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.policies import JOBS, ROLE, is_allowed, judge, outside, policy, script
from tests.support.spawning import PATH
from worker_svc.access.policy import CommandPolicy
from worker_svc.config import PolicyConfig, SandboxConfig
from worker_svc.config.policy_rules import RulesTable
from worker_svc.job import CheckedFile, JobSpec


def denial(spec: JobSpec, **rules: Any) -> tuple[str, str]:
    decision = judge(spec, **rules).decision
    assert not decision.allowed, decision
    return decision.rule, decision.reason


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


def test_scripts_below_a_root(script_root: Path) -> None:
    rules: dict[str, Any] = {"script_roots": [str(script_root)]}
    for spec in (JobSpec("bash", str(script_root / "ok.sh")), JobSpec("bash", args=(str(script_root / "ok.sh"), "-x"))):
        judged = judge(spec, **rules)
        assert judged.decision == (True, f'policy.submitter.script_roots: "{script_root}"', "")
        assert judged.checked[1].path == str(script_root / "ok.sh")
        assert spec._replace(checked=judged.checked).checked_argv[1] == str(script_root / "ok.sh")
    assert is_allowed(JobSpec("bash", "ok.sh", cwd=str(script_root)), **rules)
    # The command itself may be the script; what follows is then its arguments.
    direct = judge(JobSpec(str(script_root / "ok.sh"), args=("/etc/passwd",)), **rules)
    assert direct.decision.allowed
    assert [file.field for file in direct.checked] == ["command"]


def test_a_script_that_cannot_be_executed_is_said_to_be_so(script_root: Path) -> None:
    (script_root / "ok.sh").chmod(0o644)
    judged = judge(JobSpec(str(script_root / "ok.sh")), script_roots=[str(script_root)])
    assert (judged.decision.allowed, judged.problem) == (True, f"command: {script_root / 'ok.sh'} is not executable")


def test_an_interpreter_below_a_root_makes_no_script_harmless(script_root: Path, tmp_path: Path) -> None:
    shutil.copy(os.path.realpath(shutil.which("sh", path=PATH) or ""), script_root / "sh")
    for spec in (
        JobSpec(str(script_root / "sh"), str(outside(tmp_path))),
        JobSpec(str(script_root / "sh"), "-c", ("echo x",)),
    ):
        assert denial(spec, script_roots=[str(script_root)])[0] == "policy.submitter.script_roots"
    assert is_allowed(JobSpec(str(script_root / "sh"), str(script_root / "ok.sh")), script_roots=[str(script_root)])


def test_a_first_word_that_one_table_takes_for_a_script_is_an_argument_to_the_other(
    script_root: Path, tmp_path: Path
) -> None:
    """To the first table the command is the script, to the second it is an interpreter like any."""
    tool, data = script(script_root / "tool", "x"), script(outside(tmp_path).parent / "data", "y")
    config = PolicyConfig(
        all=RulesTable().from_toml({"script_roots": [str(script_root)], "allow_args": ["--ok"]}),
        submitter=RulesTable().from_toml({"script_roots": [str(data.parent)]}),
    )
    decision = CommandPolicy(config, JOBS, SandboxConfig()).judge(ROLE, JobSpec(str(tool), str(data), cwd="/")).decision
    assert (decision.rule, decision.reason) == (
        "policy.all.allow_args", "path: is not among the arguments allowed",
    )  # fmt: skip


def test_nothing_is_opened_for_reading_that_no_rule_asks_about(
    script_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    assert not is_allowed(JobSpec(str(evil)), script_roots=[str(script_root)])
    assert is_allowed(JobSpec(str(evil)), allow_commands=[str(evil)])
    assert is_allowed(JobSpec("sh", str(script_root / "ok.sh")), script_roots=[str(script_root)])
    assert not opened
    assert is_allowed(JobSpec(str(script_root / "ok.sh")), script_roots=[str(script_root)])
    assert len(opened) == 1


def test_what_the_request_alone_decides_looks_at_no_file() -> None:
    rules: dict[str, Any] = {"allow_commands": ["/bin/true"], "deny_args": ["x"], "max": {"args": 1}}
    for spec in (JobSpec("true", args=("a", "b")), JobSpec("true", args=("a", "x")), JobSpec("true", env={"A": ""})):
        judged = policy(**rules).judge_request(ROLE, spec)
        assert judged is not None
        assert not judged.decision.allowed
    assert policy(**rules).judge_request(ROLE, JobSpec("true")) is None


def test_where_a_job_may_run(script_root: Path, tmp_path: Path) -> None:
    evil = outside(tmp_path).parent
    (script_root / "below").mkdir()
    (script_root / "link").symlink_to(evil)
    (evil / "link").symlink_to(script_root / "below")
    rules: dict[str, Any] = {"allow_cwd": [str(script_root)]}
    rule = f'policy.submitter.allow_cwd: "{script_root}"'
    for cwd, real in {
        script_root: script_root,
        script_root / "below": script_root / "below",
        evil / "link": script_root / "below",
    }.items():
        # Nothing is asked about the program: it is not even looked for.
        judged = judge(JobSpec("no-such-program", cwd=str(cwd)), **rules)
        assert (judged.decision, judged.problem) == ((True, rule, ""), "")
        found = real.stat()
        assert judged.checked == (CheckedFile("cwd", str(real), found.st_dev, found.st_ino, 0),)
        assert judged.cwd == str(real)
    for cwd in (
        evil,
        script_root / "link",
        script_root / ".." / "outside",
        script_root.parent,
        Path("/"),
        Path(f"{script_root}-evil"),
    ):
        assert denial(JobSpec("true", cwd=str(cwd)), **rules)[0] == "policy.submitter.allow_cwd"
    assert not is_allowed(JobSpec("true", cwd=f"/proc/self/root{evil}"), **rules)
    for name, problem in (("gone", "no such file or directory"), ("ok.sh", "is no directory")):
        assert (
            judge(JobSpec("true", cwd=str(script_root / name)), **rules).problem
            == f"cwd: {script_root / name} {problem}"
        )
    # With rules for programs besides.
    both = judge(JobSpec("sh", "ok.sh", cwd=str(script_root)), **rules, script_roots=[str(script_root)])
    assert both.decision.rule == f'{rule}, policy.submitter.script_roots: "{script_root}"'
    assert is_allowed(JobSpec("true", cwd="/"), allow_cwd=["/"])
    assert judge(JobSpec("true", cwd=str(evil)), deny_args=["x"]).cwd == ""
