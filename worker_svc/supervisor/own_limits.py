"""Limits that the supervisor sets for itself: jobs get back what was there before."""

from __future__ import annotations

import resource
from typing import Final

from worker_svc.job import ProcessLimits
from worker_svc.supervisor.journal import note

# Of all processes the last but a few that the kernel should end for want of memory (proc_pid_oom_score_adj(5)).
_OOM_SCORE_ADJ: Final = -900
_OOM_PATH: Final = "/proc/self/oom_score_adj"


def claim() -> ProcessLimits:
    """Takes as many open files as there may be, and protection where it is allowed; returns what jobs are to have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return ProcessLimits(rlimits={"nofile": (soft, None)} if soft != hard else {}, oom_score_adj=_protect())


def _protect() -> int | None:
    with open(_OOM_PATH, encoding="ascii") as file:
        before = int(file.read())
    if before <= _OOM_SCORE_ADJ:
        return None
    try:
        with open(_OOM_PATH, "w", encoding="ascii") as file:
            file.write(str(_OOM_SCORE_ADJ))
    except PermissionError:  # it takes CAP_SYS_RESOURCE to lower it
        note("supervisor.not_protected", oom_score_adj=before)
        return None
    return before
