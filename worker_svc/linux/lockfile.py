"""Locks that make a process the only one of its kind in a state directory."""

from __future__ import annotations

import contextlib
import fcntl
import os


class LockHeld(Exception):
    """Another process holds the lock; `pid` is whose, as far as that can be told."""

    def __init__(self, pid: str) -> None:
        super().__init__(pid)
        self.pid = pid


class LockFile:
    """Held from `__init__` to `release`, or to the end of the process, whatever ends it: the kernel lets go of it.

    A file can be removed by hand, and the next process would lock another one of the same name: where two would do
    harm, the directory that it is in is locked too. The file then serves to show whose the directory is.
    """

    def __init__(self, path: str, *, with_directory: bool = False) -> None:
        """Raises LockHeld, and OSError."""
        self._path = path
        self._fd = -1
        if with_directory:
            folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._lock(folder)  # open for as long as we live
        self.mend()

    def mend(self) -> bool:
        """Makes and locks the file, unless it is there. Returns whether it was not. Raises LockHeld, and OSError."""
        if self._is_current():
            return False
        while not self._is_current():  # the holder removed it as we opened it: whoever comes next makes another
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            self._lock(fd)
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = fd
        os.ftruncate(self._fd, 0)
        with contextlib.suppress(OSError):  # for people: a full disk must not keep anybody from starting
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        return True

    def _lock(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = _holder(fd) or self._written()
            os.close(fd)
            raise LockHeld(pid) from None

    def _written(self) -> str:
        try:
            with open(self._path, "rb") as file:
                return file.read(32).decode(errors="replace").strip()
        except OSError:
            return "unknown"

    def _is_current(self) -> bool:
        try:
            return self._fd >= 0 and os.path.samestat(os.fstat(self._fd), os.stat(self._path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Removes the file, unless that was done already, then lets go."""
        if self._is_current():
            os.unlink(self._path)
        os.close(self._fd)


def _holder(fd: int) -> str:
    """Who holds the lock on a file, by proc_locks(5). Empty: it does not tell (it is of another PID namespace)."""
    inode = os.fstat(fd).st_ino
    with open("/proc/locks", encoding="ascii") as locks:
        for line in locks:
            # 1: FLOCK  ADVISORY  WRITE 4711 00:2d:815 0 EOF (by inode only: btrfs and overlayfs give another device)
            fields = line.split()
            if fields[1] == "FLOCK" and fields[5].endswith(f":{inode}") and int(fields[4]) > 0:
                return fields[4]
    return ""
