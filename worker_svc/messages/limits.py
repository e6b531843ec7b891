"""Limits, identity and sandbox: what a request asks for, over the worker's defaults and within its maxima; and back."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from worker_svc.job import (
    CgroupLimits,
    Identity,
    InvalidArgument,
    JobSpec,
    LeaderExit,
    ProcessLimits,
    Sandbox,
    name_of,
)
from worker_svc.job.cgroup_limits import WEIGHT_DEFAULT
from worker_svc.job.limit_texts import rlimit_name
from worker_svc.job.limits import UNLIMITED
from worker_svc.pb import jobscheduler as pb

# Of all others zero means that there is to be none.
_ZERO_IS_A_LIMIT = "swap_max_bytes"
WEIGHTS = ("cpu_weight", "io_weight")


class LimitDefaults(NamedTuple):
    """What a request that does not say otherwise means on this worker, and the most that one may ask for.

    The defaults are complete: where there is a maximum and no default, the maximum is the default.
    """

    process: ProcessLimits = ProcessLimits()
    cgroup: CgroupLimits = CgroupLimits()
    identity: Identity = Identity()
    sandbox: Sandbox = Sandbox()
    leader_exit: LeaderExit = LeaderExit.KILL
    cgroup_maxima: CgroupLimits = CgroupLimits()
    rlimit_maxima: dict[str, int] = {}  # noqa: RUF012 - never mutated; NamedTuple has no default_factory
    """Of the hard limits."""
    rlimit_hards: dict[str, int] = {}  # noqa: RUF012
    """Hard limits of who asks for lower soft ones only. More may be asked for: it is the policy that judges."""
    nice_min: int | None = None
    oom_score_adj_min: int | None = None


def cgroup_limits_from(message: pb.Limits | None, defaults: LimitDefaults) -> CgroupLimits:
    if message is None:
        return defaults.cgroup
    changes: dict[str, Any] = {}
    for name in CgroupLimits._fields:
        value = getattr(message, name)
        if value is None:
            continue
        most = getattr(defaults.cgroup_maxima, name)
        is_unlimited = value == 0 and name != _ZERO_IS_A_LIMIT
        effective = (WEIGHT_DEFAULT if name in WEIGHTS else math.inf) if is_unlimited else value
        if most is not None and effective > most:
            raise _too_much(f"limits.{name}", f"{most:.15g}", "unlimited" if effective == math.inf else effective)
        changes[name] = None if is_unlimited else value
    return defaults.cgroup._replace(**changes)


def process_limits_from(message: pb.Limits | None, defaults: LimitDefaults) -> ProcessLimits:
    if message is None:
        return defaults.process
    limits = defaults.process
    if message.rlimits:
        limits = limits._replace(rlimits={**limits.rlimits, **_rlimits_from(message.rlimits, defaults)})
    for name in ("nice", "umask", "oom_score_adj"):
        value = getattr(message, name)
        if value is None:
            continue
        least = getattr(defaults, f"{name}_min", None)
        if least is not None and value < least:
            raise InvalidArgument(
                f"limits.{name}", f"must be at least {least}, which is this worker's minimum, not {value}"
            )
        limits = limits._replace(**{name: value})
    if message.cpu_affinity:
        limits = limits._replace(cpu_affinity=tuple(sorted(set(message.cpu_affinity))))
    return limits


def _rlimits_from(asked: list[pb.Rlimit], defaults: LimitDefaults) -> dict[str, tuple[int, int | None]]:
    limits: dict[str, tuple[int, int | None]] = {}
    for one in asked:
        name = rlimit_name(one.name)
        field = f"limits.rlimits.{name_of(name)}"
        if name in limits:
            raise InvalidArgument(field, "is given twice")
        soft, hard = one.soft, one.hard
        if soft is None:
            soft = hard
        if soft is None:
            raise InvalidArgument(field, "soft or hard must be given: a number, -1 for unlimited")
        if hard is None and soft > UNLIMITED and name in defaults.rlimit_hards:
            hard = max(soft, defaults.rlimit_hards[name])
        most = defaults.rlimit_maxima.get(name)
        if most is not None:
            for value in (soft, hard):
                if value is not None and (value == UNLIMITED or value > most):
                    raise _too_much(field, str(most), "unlimited" if value == UNLIMITED else value)
            hard = most if hard is None else hard
        limits[name] = (soft, hard)
    return limits


def _too_much(field: str, most: str, asked: object) -> InvalidArgument:
    return InvalidArgument(field, f"must be at most {most}, which is this worker's maximum, not {asked}")


def identity_from(message: pb.Identity | None, defaults: LimitDefaults) -> Identity:
    if message is None:
        return defaults.identity
    default = defaults.identity
    return Identity(
        user=message.user or default.user,
        group=message.group,
        groups=None if message.groups is None else tuple(message.groups.names),
        no_new_privs=default.no_new_privs if message.no_new_privs is None else message.no_new_privs,
    )


def sandbox_from(message: pb.Sandbox | None, defaults: LimitDefaults) -> Sandbox:
    if message is None:
        return defaults.sandbox
    sandbox = defaults.sandbox
    if message.read_only_paths or message.read_write_paths:
        sandbox = sandbox._replace(
            read_only_paths=tuple(message.read_only_paths), read_write_paths=tuple(message.read_write_paths)
        )
    for name in ("private_tmp", "no_network"):
        value = getattr(message, name)
        if value is not None:
            sandbox = sandbox._replace(**{name: value})
    return sandbox


def leader_exit_from(asked: pb.LeaderExit, defaults: LimitDefaults) -> LeaderExit:
    if asked == pb.LeaderExit.UNSPECIFIED:
        return defaults.leader_exit
    if asked not in LeaderExit._value2member_map_:
        raise InvalidArgument("leader_exit", f"there is no way {int(asked)}")
    return LeaderExit(asked)


def asked_for(message: pb.StartJobReq) -> dict[str, Any]:
    """All of it that a request asks for, for its fingerprint: empty if it asks for nothing.

    Of secrets the names: a fingerprint is on disk, and who asks again may have been given another token meanwhile.
    """
    asked: dict[str, Any] = {"leader_exit": int(message.leader_exit) or None, "secret_env": sorted(message.secret_env)}
    limits, identity, sandbox = message.limits, message.identity, message.sandbox
    if limits is not None:
        asked |= {name: getattr(limits, name) for name in (*CgroupLimits._fields, "nice", "umask", "oom_score_adj")}
        asked["rlimits"] = sorted((one.name, repr(one.soft), repr(one.hard)) for one in limits.rlimits)
        asked["cpu_affinity"] = sorted(limits.cpu_affinity)
    if identity is not None:
        asked |= {"user": identity.user, "group": identity.group, "no_new_privs": identity.no_new_privs}
        asked["groups"] = None if identity.groups is None else {"names": list(identity.groups.names)}
    if sandbox is not None:
        asked |= {"read_only_paths": list(sandbox.read_only_paths), "read_write_paths": list(sandbox.read_write_paths)}
        asked |= {"private_tmp": sandbox.private_tmp, "no_network": sandbox.no_network}
    # Zero and False are asked for, since they have presence.
    return {name: value for name, value in asked.items() if value is not None and value not in ("", [])}


# And back

_PLAIN = LimitDefaults()


def limits_message(spec: JobSpec) -> pb.Limits | None:
    """None: there is no limit."""
    process, cgroup = spec.process_limits, spec.cgroup_limits
    if process == _PLAIN.process and cgroup == _PLAIN.cgroup:
        return None
    return pb.Limits(
        **cgroup._asdict(),
        rlimits=[pb.Rlimit(name=name, soft=soft, hard=hard) for name, (soft, hard) in process.rlimits.items()],
        nice=process.nice,
        cpu_affinity=list(process.cpu_affinity),
        umask=process.umask,
        oom_score_adj=process.oom_score_adj,
    )


def identity_message(identity: Identity) -> pb.Identity | None:
    if identity == _PLAIN.identity:
        return None
    return pb.Identity(
        user=identity.user,
        group=identity.group,
        groups=None if identity.groups is None else pb.Groups(names=list(identity.groups)),
        no_new_privs=identity.no_new_privs,
    )


def sandbox_message(sandbox: Sandbox) -> pb.Sandbox | None:
    if sandbox == _PLAIN.sandbox:
        return None
    return pb.Sandbox(
        read_only_paths=list(sandbox.read_only_paths),
        read_write_paths=list(sandbox.read_write_paths),
        private_tmp=sandbox.private_tmp,
        no_network=sandbox.no_network,
    )
