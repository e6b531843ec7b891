"""What a request that does not say otherwise means on this worker, and for whom a policy bounds it."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from worker_svc.job import CgroupLimits, Identity, LeaderExit, OutputPolicy, ProcessLimits
from worker_svc.job.cgroup_limits import WEIGHT_DEFAULT
from worker_svc.job.limits import UNLIMITED
from worker_svc.messages.limits import WEIGHTS, LimitDefaults

if TYPE_CHECKING:
    from worker_svc.config import Config

_RLIMIT = "rlimits."


class Defaults(NamedTuple):
    """What a request that does not say otherwise means on this worker."""

    cwd: str
    timeout_s: float
    stop_signal: int
    stop_grace_s: float
    output_max_bytes: int
    output_max_bytes_limit: int
    """Zero: none."""
    output_policy: OutputPolicy
    limits: LimitDefaults = LimitDefaults()

    def within(self, bounds: Mapping[str, float]) -> Defaults:
        """Those for who is bounded so, by names as in `max` of a policy: no default is beyond its bound, and where
        there is none, the bound is it. What a request asks for is not judged here."""
        if not bounds:
            return self
        changes: dict[str, Any] = {}
        for name in ("timeout_s", "output_max_bytes"):  # of which zero is no limit
            if name in bounds:
                changes[name] = _clip(getattr(self, name) or None, bounds[name])
        if "stop_grace_s" in bounds:
            changes["stop_grace_s"] = _clip(self.stop_grace_s, bounds["stop_grace_s"])
        if "output_max_bytes" in bounds:
            changes["output_max_bytes"] = int(changes["output_max_bytes"])
            if self.output_policy is OutputPolicy.NONE:  # which would keep more
                changes["output_policy"] = OutputPolicy.DROP_HEAD
        return self._replace(limits=_limits_within(self.limits, bounds), **changes)


def _limits_within(limits: LimitDefaults, bounds: Mapping[str, float]) -> LimitDefaults:
    hards = {}
    for name, most in bounds.items():
        if name.startswith(_RLIMIT):
            name = name.removeprefix(_RLIMIT)
            hards[name] = min(within_our_own(name, int(most)), limits.rlimit_maxima.get(name, int(most)))
    return limits._replace(
        cgroup=_cgroup_within(limits.cgroup, bounds),
        process=_process_within(limits.process, hards, bounds),
        rlimit_hards=hards,
    )


def _cgroup_within(limits: CgroupLimits, bounds: Mapping[str, float]) -> CgroupLimits:
    changes: dict[str, Any] = {}
    for name, value in limits._asdict().items():
        # Without a weight a job has the kernel's, which need not be said.
        if name not in bounds or (value is None and name in WEIGHTS and bounds[name] >= WEIGHT_DEFAULT):
            continue
        most = _clip(value, bounds[name])
        changes[name] = most if name == "cpu_max_cores" else int(most)
    return limits._replace(**changes)


def _process_within(limits: ProcessLimits, hards: Mapping[str, int], bounds: Mapping[str, float]) -> ProcessLimits:
    rlimits = dict(limits.rlimits)
    for name, most in hards.items():
        soft, hard = rlimits.get(name, (None, None))
        rlimits[name] = (_clip(soft, most), _clip(hard, most))
    changes: dict[str, Any] = {"rlimits": rlimits}
    for name in ("nice", "oom_score_adj"):
        value, least = getattr(limits, name), bounds.get(f"{name}_min")
        if value is not None and least is not None:
            changes[name] = max(value, int(least))
    return limits._replace(**changes)


def _clip(value: Any, most: Any) -> Any:
    return most if value is None or value == UNLIMITED else min(value, most)


def start_defaults(config: Config) -> Defaults:
    jobs = config.jobs
    return Defaults(
        cwd=str(jobs.cwd),
        timeout_s=jobs.timeout_s,
        stop_signal=jobs.stop_signal_number,
        stop_grace_s=jobs.stop_grace_s,
        output_max_bytes=config.output.max_bytes,
        output_max_bytes_limit=config.output.max_bytes_limit,
        output_policy=OutputPolicy[config.output.policy.upper()],
        limits=_limit_defaults(config),
    )


def _limit_defaults(config: Config) -> LimitDefaults:
    limits, jobs = config.limits, config.jobs
    maxima = {name: within_our_own(name, most) for name, most in limits.rlimit_maxima.items()}
    process = limits.process_defaults
    rlimits: dict[str, tuple[int, int | None]] = {name: (most, most) for name, most in maxima.items()}
    return LimitDefaults(
        process=process._replace(rlimits=rlimits | process.rlimits),
        cgroup=limits.cgroup_defaults,
        identity=Identity(user=jobs.user, no_new_privs=jobs.no_new_privs),
        sandbox=config.sandbox.sandbox,
        leader_exit=LeaderExit[jobs.leader_exit.upper()],
        cgroup_maxima=limits.cgroup_maxima,
        rlimit_maxima=maxima,
        nice_min=limits.nice_min,
        oom_score_adj_min=limits.oom_score_adj_min,
    )


def within_our_own(name: str, most: int) -> int:
    """A maximum must not ask for more than jobs have anyway: to raise a hard limit takes a privilege."""
    number = getattr(resource, f"RLIMIT_{name.upper()}", None)
    own = resource.RLIM_INFINITY if number is None else resource.getrlimit(number)[1]
    return most if own == resource.RLIM_INFINITY else min(most, own)
