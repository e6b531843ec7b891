"""How limits, identity and sandbox look to people and to programs. Pure, as `render`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker_svc.pb.jobscheduler import Identity, Limits, Rlimit, Sandbox


def limits_line(limits: Limits | None, human_size: Callable[[int], str]) -> str:
    """`memory 512 MiB, cpus 1.5, nofile 1024:4096, nice 5`; empty without any."""
    if limits is None:
        return ""
    from worker_svc.job.limit_texts import cpus_text
    from worker_svc.job.limits import LIMITS

    said: list[str] = []
    for limit in LIMITS:
        value = getattr(limits, limit.name)
        match limit.kind:
            case _ if value in (None, []):
                continue
            case "rlimits":
                said += [f"{one.name} {_rlimit(one)}" for one in value]
                continue
            case "bytes":
                value = human_size(value)
            case "decimal":
                value = f"{value:g}"
            case "octal":
                value = f"{value:04o}"
            case "cpus":
                value = cpus_text(value)
        said.append(f"{limit.word} {value}")
    return "; ".join(said)


def _rlimit(one: Rlimit) -> str:
    words = ["unlimited" if value == -1 else str(value) for value in (one.soft, one.hard) if value is not None]
    return ":".join(dict.fromkeys(words))


def identity_line(identity: Identity | None) -> str:
    if identity is None:
        return ""
    parts = [identity.user and f"user {identity.user}", identity.group and f"group {identity.group}"]
    if identity.groups is not None:
        parts.append(f"groups {', '.join(identity.groups.names) or 'none'}")
    if identity.no_new_privs is False:
        parts.append("may gain privileges")
    return "; ".join(part for part in parts if part)


def sandbox_line(sandbox: Sandbox | None) -> str:
    if sandbox is None:
        return ""
    parts = []
    if sandbox.read_only_paths:
        parts.append(f"read only {', '.join(sandbox.read_only_paths)}")
    if sandbox.read_write_paths:
        parts.append(f"read and write {', '.join(sandbox.read_write_paths)}")
    parts += ["private /tmp"] if sandbox.private_tmp else []
    parts += ["no network"] if sandbox.no_network else []
    return "; ".join(parts)


def limits_json(limits: Limits | None) -> dict[str, Any] | None:
    if limits is None:
        return None
    from worker_svc.job.limits import LIMITS

    shown = {limit.name: getattr(limits, limit.name) for limit in LIMITS}
    rlimits = {one.name: {"soft": one.soft, "hard": one.hard} for one in limits.rlimits}
    return {**shown, "rlimits": rlimits, "cpu_affinity": list(limits.cpu_affinity)}


def identity_json(identity: Identity | None) -> dict[str, Any] | None:
    if identity is None:
        return None
    return {
        "user": identity.user,
        "group": identity.group,
        "groups": None if identity.groups is None else list(identity.groups.names),
        "no_new_privs": identity.no_new_privs,
    }


def sandbox_json(sandbox: Sandbox | None) -> dict[str, Any] | None:
    if sandbox is None:
        return None
    return {
        "read_only_paths": list(sandbox.read_only_paths),
        "read_write_paths": list(sandbox.read_write_paths),
        "private_tmp": bool(sandbox.private_tmp),
        "no_network": bool(sandbox.no_network),
    }
