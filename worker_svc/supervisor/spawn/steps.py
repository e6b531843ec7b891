"""What a child does between its birth and execve, as a list that both spawners carry out: one place for the order.

The order, and why:
 1. what needs the supervisor's privileges and its /proc: oom_score_adj, CPUs, nice, umask;
 2. namespaces, then mounts in them (what is hidden first, for it may lie in /tmp), then the Landlock rules: the rule
    for a private /tmp has to mean the new mount;
 3. rlimits: after what opens files (nofile), before the user changes (raising a hard limit needs privilege);
 4. groups, group, user: in this order, since each needs what the next one gives up;
 5. the working directory as that user: it must not be one that the user cannot enter;
 6. no_new_privs, and the filter of system calls and Landlock's enforcement, which need it.
"""

from __future__ import annotations

import os
import resource
from array import array
from enum import IntEnum
from typing import Final, NamedTuple

from worker_svc.job.identity import Sandbox
from worker_svc.job.limits import UNLIMITED, Limits
from worker_svc.supervisor.spawn.plan import LaunchPlan, SpawnFailed
from worker_svc.supervisor.spawn.seccomp import limits_of_others_refused
from worker_svc.supervisor.spawn.users import Ids, are_our_own, ids_of

# The numbers of asm-generic/resource.h, which x86 and ARM share. Python's resource module knows most of them only.
RLIMITS: Final = {
    "cpu": 0, "fsize": 1, "data": 2, "stack": 3, "core": 4, "rss": 5, "nproc": 6, "nofile": 7, "memlock": 8, "as": 9,
    "locks": 10, "sigpending": 11, "msgqueue": 12, "nice": 13, "rtprio": 14, "rttime": 15,
}  # fmt: skip
# Before ABI 3 (Linux 6.2), files under a read-only path could still be emptied by truncate(2).
LANDLOCK_ABI_MIN: Final = 3
# What programs expect to write to whatever their files are.
_HARMLESS_DEVICES: Final = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_CLONE_NEWNS: Final = 0x00020000
_CLONE_NEWNET: Final = 0x40000000


class Op(IntEnum):
    """Kept in step with _child.h and launcher.py."""

    WRITE = 1
    RLIMIT = 2
    NICE = 3
    AFFINITY = 4
    UMASK = 5
    UNSHARE = 6
    PRIVATE_TMP = 7
    LOOPBACK = 8
    GROUPS = 9
    GID = 10
    UID = 11
    CLEAR_AMBIENT = 12
    CHDIR = 13
    NO_NEW_PRIVS = 14
    LANDLOCK = 15
    LANDLOCK_RULE = 16
    LANDLOCK_ENFORCE = 17
    HIDE = 18
    SECCOMP = 19


class Place(IntEnum):
    """What failed where it was none of the steps. Kept in step with _child.h."""

    CLONE = -2
    CGROUP = -3
    SESSION = -4
    FDS = -5
    EXEC = -6
    KILLED = -7


Step = tuple[int, int, int, int, bytes]
"""Op, three numbers and bytes, whose meaning is the op's."""


class Program(NamedTuple):
    steps: tuple[Step, ...]
    fields: tuple[str, ...]
    """For each step, the field of the plan that asked for it."""
    env: dict[str, str]
    inherited: Limits
    """Which of the plan's `inherited` the steps set, for who can do that from outside."""
    owner: tuple[int, int] | None
    """User and group, where the user is not ours."""

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing that takes a child of our own making."""
        put_back = {f"limits.rlimits.{name}" for name in self.inherited.get("rlimits", ())}
        if "oom_score_adj" in self.inherited:
            put_back.add("limits.oom_score_adj")
        return all(
            op == Op.NO_NEW_PRIVS or (op == Op.CHDIR and not inode) or field in put_back
            for (op, _, inode, *_), field in zip(self.steps, self.fields, strict=True)
        )


def program_of(plan: LaunchPlan) -> Program:
    """Raises SpawnFailed for what can be told to fail beforehand."""
    ids = ids_of(plan.identity)
    env = plan.env
    if ids is not None:
        missing = [name for name in plan.user_env if name not in ids.env]
        if missing:
            raise SpawnFailed(
                f"identity.user: {plan.identity.user} has no entry that tells {missing[0]}: set it in env"
            )
        env = {**env, **{name: ids.env[name] for name in plan.user_env}}
        if are_our_own(ids):
            ids = None
    limits = plan.limits
    inherited = {name: value for name, value in plan.inherited.items() if name not in limits}
    if "rlimits" in plan.inherited and "rlimits" in limits:
        theirs = limits["rlimits"]
        rest = {name: pair for name, pair in plan.inherited["rlimits"].items() if name not in theirs}
        inherited["rlimits"], limits = rest, {**limits, "rlimits": {**rest, **theirs}}
    plan = plan._replace(limits={**inherited, **limits})
    named = [
        *_limit_steps(plan),
        *_namespace_steps(plan, ids),
        *_landlock_steps(plan),
        *_rlimit_steps(plan),
        *(_identity_steps(plan, ids) if ids is not None else ()),
        ("cwd", _cwd_step(plan)),
    ]
    if plan.identity.no_new_privs:
        named.append(("identity.no_new_privs", _step(Op.NO_NEW_PRIVS)))
        if plan.sandbox != Sandbox():
            named.append(("sandbox", _step(Op.SECCOMP, data=limits_of_others_refused())))
    if any(op == Op.LANDLOCK for _, (op, *_) in named):
        named.append((_landlock_field(plan), _step(Op.LANDLOCK_ENFORCE)))
    owner = (ids.uid, ids.gid) if ids is not None and ids.uid != os.geteuid() else None
    return Program(tuple(step for _, step in named), tuple(field for field, _ in named), env, inherited, owner)


def _step(op: Op, a: int = 0, b: int = 0, c: int = 0, data: bytes = b"") -> Step:
    return int(op), a, b, c, data


def _cwd_step(plan: LaunchPlan) -> Step:
    """What a policy has checked has to be there still, by this path and no link."""
    checked = next((file for file in plan.checked if file.field == "cwd"), None)
    if checked is None:
        return _step(Op.CHDIR, data=os.fsencode(plan.cwd or "/"))
    inode = checked.inode if checked.inode < 2**63 else checked.inode - 2**64
    return _step(Op.CHDIR, checked.device, inode, data=os.fsencode(checked.path))


_Named = list[tuple[str, Step]]


def _limit_steps(plan: LaunchPlan) -> _Named:
    limits = plan.limits
    named: _Named = []
    if "oom_score_adj" in limits:
        text = b"%d" % limits["oom_score_adj"]
        step = _step(Op.WRITE, b=len(text), data=b"/proc/self/oom_score_adj\0" + text)
        named.append(("limits.oom_score_adj", step))
    if cpus := limits.get("cpu_affinity"):
        mask = sum(1 << number for number in set(cpus))
        # sched_setaffinity(2) takes whole longs.
        size = (max(cpus) // 64 + 1) * 8
        named.append(("limits.cpu_affinity", _step(Op.AFFINITY, data=mask.to_bytes(size, "little"))))
    if "nice" in limits:
        named.append(("limits.nice", _step(Op.NICE, limits["nice"])))
    if "umask" in limits:
        named.append(("limits.umask", _step(Op.UMASK, limits["umask"])))
    return named


def _rlimit_steps(plan: LaunchPlan) -> _Named:
    named: _Named = []
    for name, (soft, hard) in plan.limits.get("rlimits", {}).items():
        number = RLIMITS[name]
        if hard is None:
            hard = resource.getrlimit(number)[1]
            if hard != UNLIMITED and (soft == UNLIMITED or soft > hard):
                raise SpawnFailed(f"limits.rlimits.{name}: the soft limit cannot exceed the hard limit here, {hard}")
        named.append((f"limits.rlimits.{name}", _step(Op.RLIMIT, number, soft, hard)))
    return named


def _namespace_steps(plan: LaunchPlan, ids: Ids | None) -> _Named:
    sandbox = plan.sandbox
    flags = (_CLONE_NEWNET if sandbox.no_network else 0) | (_CLONE_NEWNS if sandbox.private_tmp else 0)
    named: _Named = []
    if flags:
        # The lines of a user namespace for who lacks the privilege; in one, another user's ids do not exist.
        uid_map, gid_map = (b"%d %d 1" % (number, number) for number in (os.geteuid(), os.getegid()))
        unshare = _step(Op.UNSHARE, flags)
        if ids is None:
            unshare = _step(Op.UNSHARE, flags, len(uid_map), data=uid_map + gid_map)
        named.append(("sandbox.no_network" if sandbox.no_network else "sandbox.private_tmp", unshare))
    # Another user cannot get into it anyway.
    if sandbox != Sandbox() and plan.hidden and (ids is None or ids.uid in (0, os.geteuid())):
        own = 0 if flags & _CLONE_NEWNS else _CLONE_NEWNS
        named.append(("sandbox", _step(Op.HIDE, own, data=os.fsencode(plan.hidden))))
    if sandbox.private_tmp:
        named.append(("sandbox.private_tmp", _step(Op.PRIVATE_TMP)))
    if sandbox.no_network:
        named.append(("sandbox.no_network", _step(Op.LOOPBACK)))
    return named


def has_landlock(plan: LaunchPlan) -> bool:
    return bool(plan.sandbox.read_only_paths or plan.sandbox.read_write_paths)


def _landlock_field(plan: LaunchPlan) -> str:
    if not has_landlock(plan):
        return "sandbox"
    return "sandbox.read_only_paths" if plan.sandbox.read_only_paths else "sandbox.read_write_paths"


def _landlock_steps(plan: LaunchPlan) -> _Named:
    sandbox = plan.sandbox
    if not has_landlock(plan):
        # No file is out of reach, but who is outside is, for what may restrict itself.
        is_possible = sandbox != Sandbox() and plan.identity.no_new_privs
        return [("sandbox", _step(Op.LANDLOCK))] if is_possible else []
    _refuse_hidden(plan)
    named = [(_landlock_field(plan), _step(Op.LANDLOCK, LANDLOCK_ABI_MIN, 1))]
    for field, writable, paths in (
        ("sandbox.read_only_paths", 0, sandbox.read_only_paths),
        ("sandbox.read_write_paths", 1, sandbox.read_write_paths),
        ("sandbox.read_write_paths", 1, _HARMLESS_DEVICES),
        ("sandbox.private_tmp", 1, ("/tmp",) if sandbox.private_tmp else ()),  # noqa: S108 - it is about that one
    ):
        named += [
            (f"{field}: entry {index}", _rule_step(path, writable, sandbox.read_write_paths))
            for index, path in enumerate(paths)
        ]
    return named


def _rule_step(path: str, writable: int, writable_paths: tuple[str, ...]) -> Step:
    """Below a path that jobs may change no link is followed: it could be one that an earlier job has made."""
    for above in writable_paths:
        below = path.removeprefix(f"{above.rstrip('/')}/")
        if below not in (path, ""):
            whole = os.path.join(os.path.realpath(above), below)
            return _step(Op.LANDLOCK_RULE, writable, 1, data=os.fsencode(whole))
    return _step(Op.LANDLOCK_RULE, writable, data=os.fsencode(path))


def _refuse_hidden(plan: LaunchPlan) -> None:
    """Raises SpawnFailed for paths that would open what is to be out of reach."""
    for field in ("read_only_paths", "read_write_paths"):
        for index, path in enumerate(getattr(plan.sandbox, field)):
            if plan.hidden and f"{os.path.realpath(path)}/".startswith(f"{plan.hidden}/"):
                raise SpawnFailed(f"sandbox.{field}: entry {index} is in the worker's state directory: name another")


def _identity_steps(plan: LaunchPlan, ids: Ids) -> _Named:
    user = "identity.user" if plan.identity.user else "identity.group"
    named = [
        ("identity.groups" if plan.identity.groups is not None else user, _step(Op.GROUPS, data=_gids(ids.groups))),
        ("identity.group" if plan.identity.group else user, _step(Op.GID, ids.gid)),
    ]
    if plan.identity.user:
        named.append((user, _step(Op.UID, ids.uid)))
        # A supervisor that is not root but has capabilities would hand them on (capabilities(7), ambient set).
        named.append((user, _step(Op.CLEAR_AMBIENT)))
    return named


def _gids(groups: tuple[int, ...]) -> bytes:
    return array("I", groups).tobytes()
