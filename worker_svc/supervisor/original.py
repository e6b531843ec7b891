"""Whether a state directory is the one that its store was made in, or a copy, whose jobs are the original's."""

from __future__ import annotations

import json
import os
import sqlite3
from typing import Any, Final

from worker_svc.linux import syscalls
from worker_svc.record.writer import JobStore
from worker_svc.supervisor.journal import note

_MACHINE_ID: Final = "/etc/machine-id"
_KEY: Final = "original"
_KEY_BEFORE: Final = "directory"
"""As stores have it that were made by version 0.1: machine, f_fsid and inode."""

_Origin = dict[str, Any]


def is_original(store: JobStore, state_dir: str) -> bool:
    """By machine, inode, and when that was made: they outlive a reboot, and no copy has them, save a snapshot of the
    whole file system.

    Of that the device tells, but its number is another one too when a disk is found in another order, or mounted
    again. So the doubt is resolved where the original was: it is there still, or we are it.
    """
    here = _origin_of(state_dir)
    original = _kept(store, here)
    if original is None:
        return True
    if (original["machine"], original["inode"]) != (here["machine"], here["inode"]) or not _same_birth(original, here):
        return False
    return original["device"] == here["device"] or not _is_there(original)


def remember(store: JobStore, state_dir: str) -> None:
    text = json.dumps(_origin_of(state_dir))
    if store.get_meta(_KEY) == text:
        return
    try:
        store.set_meta(_KEY, text)
    except sqlite3.Error as error:  # a full disk must not keep us from starting
        note("store.failed", reason=str(error))


def _origin_of(state_dir: str) -> _Origin:
    found = os.stat(state_dir)
    return {
        # One that is mounted there was made for this boot, or this container, alone (machine-id(5)).
        "machine": "" if os.path.ismount(_MACHINE_ID) else _machine(),
        "inode": found.st_ino,
        "born": syscalls.birth_ns(os.fsencode(state_dir)),
        "fsid": os.statvfs(state_dir).f_fsid,
        "device": found.st_dev,
        "path": os.path.realpath(state_dir),
    }


def _kept(store: JobStore, here: _Origin) -> _Origin | None:
    if (kept := store.get_meta(_KEY)) is not None:
        original: _Origin = json.loads(kept)
        return original
    if (kept := store.get_meta(_KEY_BEFORE)) is None:
        return None
    machine, fsid, inode = kept.rsplit(":", 2)
    machine = here["machine"] if machine == _machine() else machine
    return {**here, "machine": machine, "inode": int(inode), "born": None, "fsid": int(fsid)}


def _same_birth(original: _Origin, here: _Origin) -> bool:
    if original["born"] is not None and here["born"] is not None:
        return bool(original["born"] == here["born"])
    # Some file systems (XFS, F2FS) give the device's number for their own: it tells nothing.
    return here["fsid"] in (original["fsid"], here["device"])


def _is_there(original: _Origin) -> bool:
    try:
        found = os.stat(original["path"])
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (original["device"], original["inode"])


def _machine() -> str:
    try:
        with open(_MACHINE_ID, encoding="ascii") as file:
            return file.read().strip()
    except FileNotFoundError:
        return ""
