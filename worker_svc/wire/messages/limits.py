"""Limits, identity and sandbox: what a request asks for, over the worker's defaults and within its maxima; and back."""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Any, NamedTuple, TypeVar

from worker_svc.job import Identity, InvalidArgument, LeaderExit, Limits, Sandbox, name_of
from worker_svc.job.limit_texts import rlimit_name
from worker_svc.job.limits import BY_NAME, CPUS, LIMITS, NO_LIMITS, RLIMITS, UNLIMITED, Limit
from worker_svc.pb import jobscheduler as pb

_Way = TypeVar("_Way", bound=IntEnum)


class LimitDefaults(NamedTuple):
    """What a request that does not say otherwise means on this worker, and the most that one may ask for."""

    limits: Limits = NO_LIMITS
    """Complete: where there is a maximum and no default, the maximum is the default."""
    bounds: Limits = NO_LIMITS
    """Maxima, and minima of what is bounded from below; of `rlimits` the name of each → its hard limit."""
    identity: Identity = Identity()
    sandbox: Sandbox = Sandbox()
    leader_exit: LeaderExit = LeaderExit.KILL
    rlimit_hards: dict[str, int] = {}  # noqa: RUF012 - never mutated; NamedTuple has no default_factory
    """Hard limits of who asks for lower soft ones only. More may be asked for: it is the policy that judges."""


def limits_from(message: pb.Limits | None, defaults: LimitDefaults) -> Limits:
    if message is None:
        return defaults.limits
    limits = dict(defaults.limits)
    for limit in LIMITS:
        value = getattr(message, limit.name)
        if limit.kind == RLIMITS:
            asked = _rlimits_from(value, defaults)
            if asked:
                limits[limit.name] = {**limits.get(limit.name, {}), **asked}
        elif limit.kind == CPUS:
            if value:
                limits[limit.name] = tuple(sorted(set(value)))
        elif value is not None:
            _ask(limits, limit, value, defaults.bounds.get(limit.name))
    return limits


def _ask(limits: Limits, limit: Limit, value: float, bound: float | None) -> None:
    is_none = limit.zero_is_none and value == 0
    effective = (limit.usual or math.inf) if is_none else value
    if bound is not None and limit.is_beyond(effective, bound):
        raise _beyond(limit, f"limits.{limit.name}", bound, "unlimited" if effective == math.inf else effective)
    if is_none:
        limits.pop(limit.name, None)
    else:
        limits[limit.name] = value


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
        most = defaults.bounds.get("rlimits", {}).get(name)
        if most is not None:
            for value in (soft, hard):
                if value is not None and (value == UNLIMITED or value > most):
                    raise _beyond(BY_NAME["rlimits"], field, most, "unlimited" if value == UNLIMITED else value)
            hard = most if hard is None else hard
        limits[name] = (soft, hard)
    return limits


def _beyond(limit: Limit, field: str, bound: float, asked: object) -> InvalidArgument:
    least_or_most, end = ("least", "minimum") if limit.bound == "min" else ("most", "maximum")
    return InvalidArgument(field, f"must be at {least_or_most} {bound:.19g}, which is this worker's {end}, not {asked}")


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


def way_from(field: str, asked: int, default: _Way) -> _Way:
    """The one of an enumeration that is asked for, zero: the default."""
    ways = type(default)
    if not asked:
        return default
    if asked not in ways._value2member_map_:
        raise InvalidArgument(field, f"there is no way {int(asked)}: use {' or '.join(way.name for way in ways)}")
    return ways(asked)


def asked_for(message: pb.StartJobReq) -> dict[str, Any]:
    """All of it that a request asks for, for its fingerprint: empty if it asks for nothing.

    Of secrets the names: a fingerprint is on disk, and who asks again may have been given another token meanwhile.
    """
    asked: dict[str, Any] = {"leader_exit": int(message.leader_exit) or None, "secret_env": sorted(message.secret_env)}
    asked["output_via"] = int(message.output_via) or None
    limits, identity, sandbox = message.limits, message.identity, message.sandbox
    if limits is not None:
        asked |= {limit.name: getattr(limits, limit.name) for limit in LIMITS}
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


def limits_message(limits: Limits) -> pb.Limits | None:
    """None: there is no limit."""
    if not limits:
        return None
    rlimits = [pb.Rlimit(name=name, soft=soft, hard=hard) for name, (soft, hard) in limits.get("rlimits", {}).items()]
    return pb.Limits(**{**limits, "rlimits": rlimits, "cpu_affinity": list(limits.get("cpu_affinity", ()))})


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
