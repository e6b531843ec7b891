"""Disk space put by for the day the disk is full: without it the store could not be opened, nor recorded that jobs are
stopped and removed, which is what makes room."""

from __future__ import annotations

import os
from typing import Final

from worker_svc.record.paths import RESERVE_NAME
from worker_svc.record.schema import StoreError
from worker_svc.record.writer import JobStore
from worker_svc.supervisor.journal import note

_SIZE_BYTES: Final = 1024 * 1024
# A disk with less to spare is needed for other things.
_PUT_BY_OF_BYTES: Final = 16 * _SIZE_BYTES


def open_store(state_dir: str) -> JobStore:
    """Opens the store, if need be with what was put by; or else puts it by. Raises StoreError."""
    try:
        store = JobStore(state_dir)
    except StoreError:
        # Readers share memory of 32 KiB by a file, to name only one.
        if _free_bytes(state_dir) >= _SIZE_BYTES or not let_go(state_dir):
            raise
        return JobStore(state_dir)
    if _free_bytes(state_dir) >= _PUT_BY_OF_BYTES:
        _put_by(f"{state_dir}/{RESERVE_NAME}")
    return store


def let_go(state_dir: str) -> bool:
    """Whether there was anything. It is put by again when a supervisor starts with room for it."""
    try:
        os.unlink(f"{state_dir}/{RESERVE_NAME}")
    except OSError:  # used already
        return False
    note("reserve.used", bytes=_SIZE_BYTES)
    return True


def _free_bytes(state_dir: str) -> int:
    found = os.statvfs(state_dir)
    return found.f_bavail * found.f_frsize


def _put_by(path: str) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return
    except OSError as error:
        note("reserve.none", reason=str(error))
        return
    try:
        os.posix_fallocate(fd, 0, _SIZE_BYTES)
    except OSError as error:
        note("reserve.none", reason=str(error))
        os.unlink(path)
    finally:
        os.close(fd)
