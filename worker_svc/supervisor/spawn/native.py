"""Starts a process by the C extension; importing fails where that was not built."""

from __future__ import annotations

import os

from worker_svc.supervisor.spawn import _native
from worker_svc.supervisor.spawn.explain import explain
from worker_svc.supervisor.spawn.plan import Attempt, JobFds, LaunchPlan, Spawned, SpawnFailed, candidates_of
from worker_svc.supervisor.spawn.steps import Program


def start(plan: LaunchPlan, program: Program, files: JobFds, attempt: Attempt) -> Spawned:
    """Raises SpawnFailed; then no process is left."""
    encode = os.fsencode
    candidates = candidates_of(plan)
    try:
        pid, pidfd, start_ticks, failed, number, tried = _native.spawn(
            tuple(map(encode, candidates)),
            tuple(map(encode, plan.argv)),
            tuple([encode(f"{key}={value}") for key, value in program.env.items()]),
            program.steps,
            (files.stdin, files.stdout, files.stderr),
            plan.cgroup_fd,
            attempt.slot,
            files.program,
        )
    except ValueError as error:  # a NUL, should JobSpec.validate let one through
        raise SpawnFailed(f"command: {error}") from error
    attempt.take()
    if pid:
        return Spawned(pid, pidfd, start_ticks)
    if pidfd >= 0:
        os.close(pidfd)
    raise SpawnFailed(explain(plan, program, failed, number, candidates, tried))
