"""Whether a state directory is the one that its store was made in, or a copy, whose jobs are the original's."""

from __future__ import annotations

import json
import os
from typing import Any, Final

from worker_svc.supervisor import syscalls
from worker_svc.supervisor.store import JobStore

_MACHINE_ID: Final = "/etc/machine-id"
_KEY: Final = "original"
_KEY_BEFORE: Final = "directory"
"""As stores have it that were made by version 0.1: machine, f_fsid and inode."""


def is_original(store: JobStore, state_dir: str) -> bool:
    """By machine, inode, and when that was made: they outlive a reboot, and no copy has them, save a snapshot of the
    whole file system.

    Of that the device tells, but its number is another one too when a disk is found in another order, or mounted
    again. So the doubt is resolved where the original was: it is there still, or we are it.
    """
    here = _identity(state_dir)
    if (kept := store.get_meta(_KEY)) is None:
        return _was_original(store.get_meta(_KEY_BEFORE), here, state_dir)
    original: dict[str, Any] = json.loads(kept)
    if any(original[name] != here[name] for name in ("machine", "inode", "born")):
        return False
    return original["device"] == here["device"] or not _is_there(original)


def remember(store: JobStore, state_dir: str) -> None:
    """Raises sqlite3.Error."""
    text = json.dumps(_identity(state_dir))
    if store.get_meta(_KEY) != text:
        store.set_meta(_KEY, text)


def _identity(state_dir: str) -> dict[str, Any]:
    found = os.stat(state_dir)
    born = syscalls.birth_ns(os.fsencode(state_dir))
    return {
        # One that is mounted there was made for this boot, or this container, alone (machine-id(5)).
        "machine": "" if os.path.ismount(_MACHINE_ID) else _machine(),
        "inode": found.st_ino,
        # A file system that knows no time of birth is told by its own number instead.
        "born": f"on {os.statvfs(state_dir).f_fsid}" if born is None else born,
        "device": found.st_dev,
        "path": os.path.realpath(state_dir),
    }


def _is_there(original: dict[str, Any]) -> bool:
    try:
        found = os.stat(original["path"])
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (original["device"], original["inode"])


def _was_original(kept: str | None, here: dict[str, Any], state_dir: str) -> bool:
    if kept is None:
        return True
    machine, fsid, inode = kept.rsplit(":", 2)
    now = os.statvfs(state_dir).f_fsid
    # Some file systems (XFS, F2FS) give the device's number for their own: it tells nothing.
    is_same_disk = now == int(fsid) or now == here["device"]
    return (machine, int(inode)) == (_machine(), here["inode"]) and is_same_disk


def _machine() -> str:
    try:
        with open(_MACHINE_ID, encoding="ascii") as file:
            return file.read().strip()
    except FileNotFoundError:
        return ""
