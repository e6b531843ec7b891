"""Names of users and groups to numbers."""

from __future__ import annotations

import grp
import os
import pwd
from typing import Final, NamedTuple

from worker_svc.job.identity import Identity
from worker_svc.supervisor.spawn.plan import SpawnFailed

# (uid_t)-1 is "leave it as it is" to setresuid(2): a job that was to be nobody would be root.
_ID_MAX: Final = 2**32 - 2


class Ids(NamedTuple):
    uid: int
    gid: int
    groups: tuple[int, ...]
    env: dict[str, str]
    """HOME, USER, LOGNAME, SHELL; empty if the user has no entry."""


def ids_of(identity: Identity) -> Ids | None:
    """None: the supervisor's own. Raises SpawnFailed for who does not exist."""
    if not (identity.user or identity.group or identity.groups is not None):
        return None
    entry = _user(identity.user) if identity.user else _entry_of(os.geteuid())
    uid = entry.pw_uid if entry else int(identity.user) if identity.user else os.geteuid()
    if identity.group:
        gid = _gid("identity.group", identity.group)
    elif not identity.user:
        gid = os.getegid()
    elif entry:
        gid = entry.pw_gid
    else:
        raise SpawnFailed(f"identity.group: name it: user {identity.user} has no entry that tells its primary group")
    if identity.groups is not None:
        groups = {_gid("identity.groups", name) for name in identity.groups}
    elif entry:
        groups = set(os.getgrouplist(entry.pw_name, gid))  # as initgroups(3)
    else:
        groups = {gid}
    env = {}
    if entry:
        env = {"HOME": entry.pw_dir, "USER": entry.pw_name, "LOGNAME": entry.pw_name, "SHELL": entry.pw_shell}
    return Ids(uid, gid, tuple(sorted(groups)), env)


def are_our_own(ids: Ids) -> bool:
    return (
        os.getresuid() == (ids.uid,) * 3
        and os.getresgid() == (ids.gid,) * 3
        and set(ids.groups) | {ids.gid} == set(os.getgroups()) | {ids.gid}
    )


def _user(name: str) -> pwd.struct_passwd | None:
    """None: a number without an entry."""
    try:
        return pwd.getpwnam(name)
    except KeyError:
        pass
    uid = _number(name)
    if uid is None:
        raise SpawnFailed(f"identity.user: there is no user {name!r} on this machine")
    return _entry_of(uid)


def _entry_of(uid: int) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwuid(uid)
    except KeyError:
        return None


def _gid(field: str, name: str) -> int:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        pass
    gid = _number(name)
    if gid is None:
        raise SpawnFailed(f"{field}: there is no group {name!r} on this machine")
    return gid


def _number(name: str) -> int | None:
    number = int(name) if name.isascii() and name.isdigit() and len(name) < 12 else None
    return number if number is not None and number <= _ID_MAX else None
