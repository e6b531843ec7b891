"""Where on this machine we may make cgroups: found through the mount table, decided once when the supervisor starts.

The rules are those of Documentation/admin-guide/cgroup-v2.rst: a subtree is ours if it is writable (root) or was
delegated; controllers are enabled from the parent, which then may hold no processes itself ("no internal process").
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Final, NamedTuple

from worker_svc.supervisor.containment.ownership import claim, remove_abandoned

CONTROLLERS: Final = ("memory", "pids", "cpu", "io")
# Where our own processes go if they must leave their group so that it may have controllers. No state id in the name:
# the worker and its supervisor are in it together.
LEAF: Final = "worker-svc-self"
BASE_PREFIX: Final = "worker-svc-"
# systemd marks what it delegated (systemd.resource-control(5)): "trusted" before version 251, and for root only.
_DELEGATE_XATTRS: Final = ("user.delegate", "trusted.delegate")
_SYSTEMD_UNITS: Final = (".service", ".scope", ".slice")


class Unusable(Exception):
    """No cgroup of ours can be made; the text says why."""


class Base(NamedTuple):
    """The group that holds a group for each job."""

    path: str
    proc_path: str
    """The same as /proc/PID/cgroup calls it."""
    fd: int
    """Holds our claim to it."""
    controllers: frozenset[str]
    missing: dict[str, str]
    """Controllers that jobs cannot have, and why."""


class _Mount(NamedTuple):
    root: str
    point: str


def find_base(state_id: str, known: str = "") -> Base:
    """Makes the base group, or takes over the one that is there. Raises Unusable.

    known: the path of the base that an earlier supervisor of the same state used. Its jobs are in there, so it is used
    again wherever we ourselves were started.
    """
    mounts = _mounts()
    if not mounts:
        raise Unusable("no cgroup v2 hierarchy is mounted")
    own = _own_group()
    if own is None:
        raise Unusable("/proc/self/cgroup names no cgroup v2 group")
    refusals = []
    # Not if it is another state's, whose jobs are in there: this one was copied.
    if os.path.basename(known) == BASE_PREFIX + state_id and os.path.isdir(known):
        for mount in mounts:
            proc_path = _proc_path(mount, known)
            if proc_path and _can_move_into(mount, own, known):
                return _open_base(known, proc_path, claim(known))
    for mount in mounts:
        own_path = _path_of(mount, own)
        if own_path is None:
            refusals.append(f"our group {own} is not below {mount.point}")
            continue
        for parent in _parents(own_path, mount.point):
            try:
                return _make_base(parent, mount, state_id)
            except OSError as error:
                refusals.append(f"{parent}: {(error.strerror or str(error)).lower()}")
    raise Unusable("; ".join(refusals))


def _mounts() -> list[_Mount]:
    """Every mount of the cgroup v2 file system, from proc_pid_mountinfo(5)."""
    mounts = []
    with open("/proc/self/mountinfo", errors="surrogateescape") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            if after.split(" ", 1)[0] == "cgroup2":
                fields = before.split(" ")
                mounts.append(_Mount(_unescape(fields[3]), _unescape(fields[4])))
    return mounts


def _unescape(path: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        path = path.replace(code, character)
    return path


def _own_group() -> str | None:
    """Our group in the v2 hierarchy, which is number 0 (cgroups(7)). None if we are in none we can see."""
    with open("/proc/self/cgroup", errors="surrogateescape") as file:
        for line in file:
            if line.startswith("0::"):
                path = line[3:].rstrip("\n")
                # "/..": outside of our cgroup namespace
                return None if path.startswith("/..") else path.removesuffix(" (deleted)")
    return None


def _path_of(mount: _Mount, group: str) -> str | None:
    if mount.root == "/":
        return mount.point + group.rstrip("/") if group != "/" else mount.point
    if group == mount.root or group.startswith(mount.root + "/"):
        return mount.point + group[len(mount.root) :]
    return None


def _proc_path(mount: _Mount, path: str) -> str:
    if not path.startswith(mount.point + "/"):
        return ""
    return mount.root.rstrip("/") + path[len(mount.point) :]


def _parents(own_path: str, mount_point: str) -> list[str]:
    """Where the base may be made, best first."""
    above = os.path.dirname(own_path)
    if own_path == mount_point:
        return [own_path]
    if os.path.basename(own_path) == LEAF:  # where an earlier supervisor, or the worker's, put us
        return [above, own_path]
    # systemd's DelegateSubgroup= starts us in a leaf of what it delegated.
    return [above, own_path] if _is_delegated(above) else [own_path]


def _is_delegated(path: str) -> bool:
    for name in _DELEGATE_XATTRS:
        try:
            if os.getxattr(path, name) == b"1":
                return True
        except OSError:
            continue
    return False


def _make_base(parent: str, mount: _Mount, state_id: str) -> Base:
    """Raises OSError if nothing can be made there."""
    path = f"{parent}/{BASE_PREFIX}{state_id}"
    fd = claim(path)
    proc_path = _proc_path(mount, path)
    if not _can_move_into(mount, _own_group() or "/", path):
        os.close(fd)
        with suppress(OSError):  # jobs of an earlier supervisor are in it
            os.rmdir(path)
        raise PermissionError(0, "processes may not be moved there: no write access to the common parent")
    remove_abandoned(_other_bases(parent, path))
    _enable_in_parent(parent)
    return _open_base(path, proc_path, fd)


def _other_bases(parent: str, own: str) -> list[str]:
    with os.scandir(parent) as entries:
        return [
            one.path for one in entries if one.name.startswith(BASE_PREFIX) and one.name != LEAF and one.path != own
        ]


def _can_move_into(mount: _Mount, own: str, target: str) -> bool:
    """Whether a child of ours may be born in `target`: like a move, it takes write access to cgroup.procs of the target
    and of the nearest common ancestor ("Delegation Containment" in cgroup-v2.rst)."""
    source = _path_of(mount, own) or mount.point
    common = os.path.commonpath([source, target])
    return all(os.access(f"{path}/cgroup.procs", os.W_OK) for path in (target, common))


def _enable_in_parent(parent: str) -> None:
    """Has the base get every controller that its parent has, as far as we may; what is missing shows in the base."""
    wanted = set(CONTROLLERS) & _words(f"{parent}/cgroup.controllers") - _words(f"{parent}/cgroup.subtree_control")
    if not wanted:
        return
    # The rule does not hold for the root itself, which alone has no cgroup.type.
    is_occupied = os.path.exists(f"{parent}/cgroup.type") and bool(_words(f"{parent}/cgroup.procs"))
    if is_occupied and not (_may_empty(parent) and _move_to_leaf(parent)):
        # Not even cpu and pids, which the kernel would let us have: the base would then be "domain invalid".
        return
    for controller in sorted(wanted):
        _try_write(f"{parent}/cgroup.subtree_control", f"+{controller}")


def _may_empty(group: str) -> bool:
    """Whether its processes may be moved: it was delegated to us, or it holds nobody but us and the worker.

    Nobody else's processes, such as the shell that started us; and not in a unit of systemd's that it did not
    delegate, whose controllers are systemd's affair.
    """
    if not os.access(f"{group}/cgroup.procs", os.W_OK):
        return False
    if _is_delegated(group):
        return True
    if group.endswith(_SYSTEMD_UNITS):
        return False
    return _words(f"{group}/cgroup.procs") <= {str(os.getpid()), str(os.getppid())}


def _move_to_leaf(group: str) -> bool:
    """False: processes are left in the group."""
    leaf = f"{group}/{LEAF}"
    try:
        os.mkdir(leaf, 0o755)
    except FileExistsError:
        pass
    except OSError:
        return False
    for _ in range(3):  # they may fork meanwhile
        for pid in _words(f"{group}/cgroup.procs"):
            _try_write(f"{leaf}/cgroup.procs", pid)
        if not _words(f"{group}/cgroup.procs"):
            return True
    return False


def _open_base(path: str, proc_path: str, fd: int) -> Base:
    kind = _read(f"{path}/cgroup.type").strip()
    if kind != "domain":
        os.close(fd)
        raise OSError(0, f"the group is {kind or 'gone'}, and holds no whole processes")
    controllers = frozenset(_words(f"{path}/cgroup.controllers")) & set(CONTROLLERS)
    return Base(path, proc_path, fd, controllers, _why_missing(os.path.dirname(path), controllers))


def _why_missing(parent: str, controllers: frozenset[str]) -> dict[str, str]:
    missing: dict[str, str] = {}
    v1 = _bound_to_v1()
    for name in CONTROLLERS:
        if name in controllers:
            continue
        if name in _words(f"{parent}/cgroup.controllers"):
            missing[name] = (
                f"the {name} controller cannot be enabled in {parent}, which holds processes that are not ours to "
                "move: start the worker in a group of its own (systemd: Delegate=yes)"
            )
        elif (v1_name := "blkio" if name == "io" else name) in v1:
            missing[name] = f"the {name} controller is bound to cgroup v1 ({v1_name}) on this machine"
        else:
            missing[name] = f"the {name} controller is not in {parent}: it was not delegated, or the kernel lacks it"
    return missing


def _bound_to_v1() -> set[str]:
    names: set[str] = set()
    with open("/proc/self/cgroup", errors="surrogateescape") as file:
        for line in file:
            number, controllers, _ = line.split(":", 2)
            if number != "0":
                names.update(controllers.split(","))
    return names


def _words(path: str) -> set[str]:
    return set(_read(path).split())


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""


def _try_write(path: str, text: str) -> None:
    """What did not take effect shows in what is there afterwards."""
    try:
        with open(path, "w") as file:
            file.write(text)
    except OSError:
        return
