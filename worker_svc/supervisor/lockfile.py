"""A lock file that makes a process the only one of its kind in a state directory."""

from __future__ import annotations

import fcntl
import os


class LockHeld(Exception):
    """Another process holds the lock; `pid` is what it wrote there."""

    def __init__(self, pid: str) -> None:
        super().__init__(pid)
        self.pid = pid


class LockFile:
    """Held from `__init__` to `release`, or to the end of the process, whatever ends it: the kernel lets go of it."""

    def __init__(self, path: str) -> None:
        """Raises LockHeld, and OSError."""
        self._path = path
        while True:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pid = os.pread(self._fd, 32, 0).decode(errors="replace").strip()
                os.close(self._fd)
                raise LockHeld(pid) from None
            if self._is_current():
                break
            os.close(self._fd)  # its holder removed it as we opened it: whoever comes next makes another
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._fd), os.stat(self._path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Removes the file, then lets go."""
        os.unlink(self._path)
        os.close(self._fd)
