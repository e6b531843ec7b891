"""Limits that the supervisor sets for itself: jobs get back what was there before."""

from __future__ import annotations

import resource
from typing import Final

from worker_svc.job import Limits
from worker_svc.supervisor.journal import note

# For want of memory the kernel should end nearly every other process before this one (proc_pid_oom_score_adj(5)).
_OOM_SCORE_ADJ: Final = -900
_OOM_PATH: Final = "/proc/self/oom_score_adj"


def claim() -> Limits:
    """Takes as many open files as there may be, protection where it is allowed, and leaves no core, in which secrets of
    jobs would be; returns what jobs are to have."""
    rlimits: dict[str, tuple[int, int | None]] = {}
    for name, number, ours in (("nofile", resource.RLIMIT_NOFILE, None), ("core", resource.RLIMIT_CORE, 0)):
        soft, hard = resource.getrlimit(number)
        wanted = hard if ours is None else ours
        if soft != wanted:
            resource.setrlimit(number, (wanted, hard))
            rlimits[name] = (soft, None)
    inherited: Limits = {"rlimits": rlimits} if rlimits else {}
    before = _protect()
    return inherited if before is None else {**inherited, "oom_score_adj": before}


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
