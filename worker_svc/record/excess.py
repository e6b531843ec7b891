"""Which finished jobs are too much, by what may be kept of them: retention's rule, and that of who prunes."""

from __future__ import annotations

from typing import NamedTuple

from worker_svc.record.schema import FinishedRow


class Kept(NamedTuple):
    """What is kept of finished jobs."""

    jobs: int
    bytes: int


class KeepLimits(NamedTuple):
    """How much may be kept; None: any."""

    age_s: float | None
    jobs: int | None
    bytes: int | None


def excess(kept: Kept, oldest: list[FinishedRow], limits: KeepLimits, now_ns: int) -> list[FinishedRow]:
    """Those of the oldest jobs that must go, in order. The time is that of the store's SteadyClock."""
    jobs, size = kept
    gone = []
    for row in oldest:
        too_old = limits.age_s is not None and now_ns - row.finished_steady_ns > limits.age_s * 1e9
        too_many = limits.jobs is not None and jobs > limits.jobs
        too_large = limits.bytes is not None and size > limits.bytes
        if not (too_old or too_many or too_large):
            break
        gone.append(row)
        jobs, size = jobs - 1, size - row.stored_bytes
    return gone
