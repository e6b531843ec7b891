"""Whose base group is whose: a supervisor locks its own, so that a killed one is told from one that is idle.

flock(2) on the directory; it goes with the process, whatever ends it.
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from typing import Final

# One that looks for abandoned bases holds the lock for a moment only.
_TRIES: Final = 50
_TRY_AGAIN_S: Final = 0.001


def claim(path: str) -> int:
    """Makes the group unless it is there, and locks it; an fd of it. Raises OSError."""
    fd = -1
    for _ in range(_TRIES):
        with suppress(FileExistsError):
            os.mkdir(path, 0o755)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        except (FileNotFoundError, BlockingIOError):
            time.sleep(_TRY_AGAIN_S)  # somebody took it for abandoned, just before we came
        if fd >= 0:
            os.close(fd)
            fd = -1
    raise BlockingIOError(0, "somebody else holds a lock on it")


def remove_abandoned(paths: list[str]) -> None:
    """Removes those of these bases that nobody holds and no process is in, with the groups of ended jobs in them."""
    for path in paths:
        with suppress(OSError):  # it is gone, not ours to remove, or its supervisor lives
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove_empty(path)
            finally:
                os.close(fd)


def _remove_empty(path: str) -> None:
    """Raises OSError, and leaves everything, if a process is in there."""
    with open(f"{path}/cgroup.events") as file:
        if "populated 1" in file.read():
            return
    for folder, _, _ in os.walk(path, topdown=False):
        os.rmdir(folder)
