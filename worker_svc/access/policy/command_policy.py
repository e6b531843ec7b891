"""The policy of a worker: the rules for all and those of each role, both of which a job must satisfy."""

from __future__ import annotations

import os
import pwd
from typing import NamedTuple

from worker_svc.access.policy.floors import Floors, Tables, judge_floors
from worker_svc.access.policy.lookup import find_command, find_directory, find_script, read_kind
from worker_svc.access.policy.rules import (
    DEFAULT_RULE,
    Decision,
    Denied,
    JudgedFiles,
    judge_places,
    judge_request,
    judge_script,
    root_of,
    script_root_of,
)
from worker_svc.config import JobsConfig, PolicyConfig, PolicyRules, SandboxConfig
from worker_svc.config.policy_rules import MINIMA
from worker_svc.job import CheckedFile, Identity, JobSpec, name_of


class Judged(NamedTuple):
    decision: Decision
    files: JudgedFiles

    @property
    def checked(self) -> tuple[CheckedFile, ...]:
        """The files that were decided about: those, and no others, are to be run, and there."""
        found = (("command", self.files.command), ("path", self.files.script), ("cwd", self.files.cwd))
        return tuple(file.checked(field) for field, file in found if file is not None and not file.problem)

    @property
    def problem(self) -> str:
        """Why a job that is allowed cannot run all the same."""
        files = self.files
        for field, file in (("cwd", files.cwd), ("command", files.command), ("path", files.script)):
            if file is not None and file.problem:
                return f"{field}: {name_of(file.named)} {file.problem}"
        return ""

    @property
    def cwd(self) -> str:
        """Where the job is to run, by the path that was decided about; empty: wherever it asks for."""
        return self.files.cwd.path if self.files.cwd is not None else ""


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

    def denial_of_grace(self, role: str, grace_s: float) -> Decision | None:
        """What speaks against a stop's own grace, which would else undo the maximum of the job's."""
        for name, rules in self.rules_of(role):
            most = rules.max.get("stop_grace_s")
            if most is not None and grace_s > most:
                return Decision(
                    False, f"{name}.max.stop_grace_s: {most:g}", f"grace: must be at most {most:g} s, not {grace_s:g}"
                )
        return None

    def judge(self, role: str, spec: JobSpec) -> Judged:
        return self.judge_request(role, spec) or self.judge_files(role, spec)

    def judge_request(self, role: str, spec: JobSpec) -> Judged | None:
        """As far as the request alone decides. None: files have a say in it."""
        tables = self.rules_of(role)
        try:
            allowed_by = judge_floors(role, tables, spec, self._floors)
            for name, rules in tables:
                judge_request(name, rules, spec, self._own_user)
            if any(rules.looks_at_files for _, rules in tables):
                return None
            for name, rules in tables:
                allowed_by += judge_script(name, rules, spec, JudgedFiles())
        except Denied as denied:
            return Judged(denied.decision, JudgedFiles())
        return Judged(_allowed(tables, allowed_by), JudgedFiles())

    def judge_files(self, role: str, spec: JobSpec) -> Judged:
        """The rest: looks them up and decides. Can hang on a dead file system: for threads."""
        tables = self.rules_of(role)
        files = JudgedFiles()
        try:
            allowed_by = judge_floors(role, tables, spec, self._floors)
            if any(rules.allow_cwd for _, rules in tables):
                files = files._replace(cwd=find_directory(spec.cwd or "/"))
            if any(rules.restricts_programs for _, rules in tables):
                command = find_command(spec.command, spec.env.get("PATH", self._path), spec.cwd)
                files = files._replace(command=command)
            for name, rules in tables:
                allowed_by += judge_places(name, rules, files)
            # Nothing is opened for reading, nor looked for, of what is denied by its path.
            files = _with_script(tables, spec, files)
            for name, rules in tables:
                allowed_by += judge_script(name, rules, spec, files)
        except Denied as denied:
            return Judged(denied.decision, files)
        return Judged(_allowed(tables, allowed_by), files)


def _with_script(tables: Tables, spec: JobSpec, files: JudgedFiles) -> JudgedFiles:
    """Whether the command is a script and, unless it is one below a root, the file that it would interpret."""
    command, with_roots = files.command, [rules for _, rules in tables if rules.script_roots]
    if command is None:
        return files
    if any(root_of(command, rules) for rules in with_roots):
        command = read_kind(command)
    first = spec.argv[1:2]
    takes_script = any(not script_root_of(command, rules) for rules in with_roots)
    script = find_script(first[0], spec.cwd) if first and takes_script else None
    return files._replace(command=command, script=script)


def _allowed(tables: Tables, by: list[str]) -> Decision:
    if not tables and not by:
        return Decision(True, DEFAULT_RULE)
    return Decision(True, ", ".join(by) or f"{' and '.join(name for name, _ in tables)}: nothing against it")


def base_env(config: JobsConfig) -> dict[str, str]:
    """What every job gets besides its own variables."""
    passed_on = {name: os.environ[name] for name in config.pass_env if name in os.environ}
    return {**passed_on, **config.env}


def _own_user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())
