"""Judging starts by a policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.spawning import PATH
from worker_svc.access.policy import CommandPolicy
from worker_svc.access.policy.command_policy import Judged
from worker_svc.config import JobsConfig, PolicyConfig, SandboxConfig, Variables
from worker_svc.config.policy_rules import RulesTable
from worker_svc.job import JobSpec

ROLE = "submitter"

JOBS = JobsConfig(pass_env=(), env=Variables({"PATH": PATH}))


def policy(**rules: Any) -> CommandPolicy:
    return CommandPolicy(PolicyConfig(submitter=RulesTable().from_toml(rules)), JOBS, SandboxConfig())


def judge(spec: JobSpec, role: str = ROLE, **rules: Any) -> Judged:
    return policy(**rules).judge(role, spec if spec.cwd else spec._replace(cwd="/"))


def is_allowed(spec: JobSpec, **rules: Any) -> bool:
    judged = judge(spec, **rules)
    return judged.decision.allowed and not judged.problem


def script(path: Path, says: str) -> Path:
    path.write_text(f"#!/bin/sh\necho {says}\n")
    path.chmod(0o755)
    return path


def outside(tmp_path: Path) -> Path:
    folder = tmp_path.resolve() / "outside"
    folder.mkdir(exist_ok=True)
    return script(folder / "evil.sh", "outside")
