"""The policy of a worker: the rules for all and those of each role, both of which a job must satisfy."""

from __future__ import annotations

import os
import pwd
from typing import NamedTuple

from worker_svc.config import JobsConfig, PolicyConfig, PolicyRules, SandboxConfig
from worker_svc.config.policy_rules import MINIMA
from worker_svc.job import CheckedFile, Identity, JobSpec
from worker_svc.policy.floors import Floors, judge_floors
from worker_svc.policy.lookup import find_command, find_script
from worker_svc.policy.rules import DEFAULT_RULE, Decision, Denied, Files, judge, script_root_of


class Judged(NamedTuple):
    decision: Decision
    files: Files

    @property
    def checked(self) -> tuple[CheckedFile, ...]:
        """The files that were decided about: those, and no others, are to be run."""
        found = (("command", self.files.command), ("path", self.files.script))
        return tuple(file.checked(field) for field, file in found if file is not None and not file.problem)

    @property
    def problem(self) -> str:
        """Of a job that is allowed: why it cannot run all the same."""
        for field, file in (("command", self.files.command), ("path", self.files.script)):
            if file is not None and file.problem:
                return f"{field}: {file.named} {file.problem}"
        return ""


class CommandPolicy:
    def __init__(self, config: PolicyConfig, jobs: JobsConfig, sandbox: SandboxConfig) -> None:
        self._config = config
        self._path = base_env(jobs).get("PATH")
        self._own_user = _own_user()
        identity = Identity(user=jobs.user, no_new_privs=jobs.no_new_privs)
        self._floors = Floors(identity, sandbox.sandbox, self._own_user)

    def rules_of(self, role: str) -> list[tuple[str, PolicyRules]]:
        """Those that have something to say, by name."""
        named = (("policy.all", self._config.all), (f"policy.{role}", getattr(self._config, role, PolicyRules())))
        return [(name, rules) for name, rules in named if rules != PolicyRules()]

    def bounds_of(self, role: str) -> dict[str, float]:
        """The least of the maxima, and the most of the minima, of all tables for it."""
        bounds: dict[str, float] = {}
        for _, rules in self.rules_of(role):
            for limit, value in rules.max.items():
                stricter = max if limit in MINIMA else min
                bounds[limit] = stricter(bounds.get(limit, value), value)
        return bounds

    def looks_at_files(self, role: str) -> bool:
        return any(rules.restricts_programs for _, rules in self.rules_of(role))

    def look_up(self, role: str, spec: JobSpec) -> Files:
        """What `decide` must know of the machine. Can hang on a dead file system: for threads."""
        rules = [rules for _, rules in self.rules_of(role) if rules.restricts_programs]
        if not rules:
            return Files()
        command = find_command(spec.command, spec.env.get("PATH", self._path), spec.cwd)
        takes_script = any(table.script_roots and not script_root_of(command, table) for table in rules)
        first = spec.argv[1:2]
        return Files(command, find_script(first[0], spec.cwd) if first and takes_script else None)

    def decide(self, role: str, spec: JobSpec, files: Files) -> Decision:
        allowed_by: list[str] = []
        tables = self.rules_of(role)
        try:
            allowed_by += judge_floors(role, tables, spec, self._floors)
            for name, rules in tables:
                allowed_by += judge(name, rules, spec, files, self._own_user)
        except Denied as denied:
            return denied.decision
        if not tables:
            return Decision(True, DEFAULT_RULE)
        return Decision(
            True, ", ".join(allowed_by) or f"{' and '.join(name for name, _ in tables)}: nothing against it"
        )

    def denial_of_grace(self, role: str, grace_s: float) -> Decision | None:
        """Of a stop's own grace: it would else undo the maximum of the job's."""
        for name, rules in self.rules_of(role):
            most = rules.max.get("stop_grace_s")
            if most is not None and grace_s > most:
                return Decision(
                    False, f"{name}.max.stop_grace_s: {most:g}", f"grace: must be at most {most:g} s, not {grace_s:g}"
                )
        return None

    def judge(self, role: str, spec: JobSpec) -> Judged:
        """Looks up and decides. For threads."""
        files = self.look_up(role, spec)
        return Judged(self.decide(role, spec, files), files)


def base_env(config: JobsConfig) -> dict[str, str]:
    """What every job gets besides its own variables."""
    passed_on = {name: os.environ[name] for name in config.pass_env if name in os.environ}
    return {**passed_on, **config.env}


def _own_user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())
