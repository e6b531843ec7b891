"""What a request that does not say otherwise means on this worker, and for whom a policy bounds it."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from worker_svc.job import Identity, LeaderExit, Limits, OutputPolicy, OutputVia
from worker_svc.job.limits import DECIMAL, LIMITS, RLIMITS, UNLIMITED
from worker_svc.wire.messages.limits import LimitDefaults

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
    output_via: OutputVia = OutputVia.PIPE
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


def _limits_within(defaults: LimitDefaults, bounds: Mapping[str, float]) -> LimitDefaults:
    limits = dict(defaults.limits)
    for limit in LIMITS:
        value, bound = limits.get(limit.name), bounds.get(limit.policy_key)
        if bound is None:
            continue
        if limit.bound == "min":
            if value is not None:
                limits[limit.name] = max(value, int(bound))
        elif value is not None or limit.usual is None or bound < limit.usual:
            # Without a weight a job has the kernel's, which need not be said.
            most = _clip(value, bound)
            limits[limit.name] = most if limit.kind == DECIMAL else int(most)
    maxima = defaults.bounds.get("rlimits", {})
    hards: dict[str, int] = {}
    for key, most in bounds.items():
        if key.startswith(_RLIMIT):
            name = key.removeprefix(_RLIMIT)
            hards[name] = min(within_our_own(name, int(most)), maxima.get(name, int(most)))
    if hards:
        rlimits = dict(limits.get("rlimits", {}))
        for name, most in hards.items():
            soft, hard = rlimits.get(name, (None, None))
            rlimits[name] = (_clip(soft, most), _clip(hard, most))
        limits["rlimits"] = rlimits
    return defaults._replace(limits=limits, rlimit_hards=hards)


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
        output_via=OutputVia[config.output.via.upper()],
        limits=_limit_defaults(config),
    )


def _limit_defaults(config: Config) -> LimitDefaults:
    limits, jobs = config.limits, config.jobs
    bounds = dict(limits.bounds)
    if "rlimits" in bounds:
        bounds["rlimits"] = {name: within_our_own(name, most) for name, most in bounds["rlimits"].items()}
    return LimitDefaults(
        limits=_complete(limits.defaults, bounds),
        bounds=bounds,
        identity=Identity(user=jobs.user, no_new_privs=jobs.no_new_privs),
        sandbox=config.sandbox.sandbox,
        leader_exit=LeaderExit[jobs.leader_exit.upper()],
    )


def _complete(defaults: Limits, bounds: Limits) -> Limits:
    """With the maxima where there is no default (no weight above the kernel's own)."""
    limits: Limits = {}
    for limit in LIMITS:
        value, bound = defaults.get(limit.name), bounds.get(limit.name)
        if limit.kind == RLIMITS:
            value = {name: (most, most) for name, most in (bound or {}).items()} | (value or {}) or None
        elif value is None and limit.bound == "max" and not (limit.usual and (bound or 0) >= limit.usual):
            value = bound
        if value is not None:
            limits[limit.name] = value
    return limits


def within_our_own(name: str, most: int) -> int:
    """A maximum must not ask for more than jobs have anyway: to raise a hard limit takes a privilege."""
    number = getattr(resource, f"RLIMIT_{name.upper()}", None)
    own = resource.RLIM_INFINITY if number is None else resource.getrlimit(number)[1]
    return most if own == resource.RLIM_INFINITY else min(most, own)
