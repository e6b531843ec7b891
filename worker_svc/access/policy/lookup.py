"""Which file a command or a script is, told from an open descriptor: no name can be made to mean another file between
the look and the decision.

All of this can hang on a dead file system: it is called in threads.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from worker_svc.job import CheckedFile, name_of
from worker_svc.job.identity import PATH_MAX_BYTES
from worker_svc.linux.search_path import PATH_FALLBACK, search_folders


class Found(NamedTuple):
    """One file. `path` is its real one, without symbolic links; `named` is what the caller called it: the same, but
    with the last symbolic link not followed, since some programs do what their name says (busybox)."""

    named: str
    path: str
    device: int = 0
    inode: int = 0
    changed_ns: int = 0
    is_script: bool = False
    """Whether it names its interpreter in its first line (#!), as far as that was looked at: see `read_kind`."""
    problem: str = ""
    """Why it cannot be used; empty: it can."""

    def checked(self, field: str) -> CheckedFile:
        return CheckedFile(field, self.path, self.device, self.inode, 0 if field == "cwd" else self.changed_ns)


def find_command(command: str, search: str | None, cwd: str) -> Found:
    """As execvp(3) finds it: the first file of the name that may be executed by anyone; else the first that is no use.

    `search`: the job's PATH.
    """
    if "/" in command:
        return _find(command, cwd, _program_problem)
    unusable: Found | None = None
    for folder in search_folders(PATH_FALLBACK if search is None else search):
        found = _find(os.path.join(folder, command), cwd, _program_problem)
        if not found.problem:
            return found
        if unusable is None and found.inode:
            unusable = found
    return unusable or Found(command, command, problem="was not found in the job's PATH")


def find_script(path: str, cwd: str) -> Found:
    return _find(path, cwd, _file_problem)


def find_directory(path: str) -> Found:
    return _find(path, "", _directory_problem)


def read_kind(found: Found) -> Found:
    """With `is_script`, which takes opening it for reading: that hangs where nothing else of a look-up does."""
    try:
        with _opened(found.path) as fd:
            now = os.fstat(fd)
            is_same = (now.st_dev, now.st_ino, now.st_ctime_ns) == (found.device, found.inode, found.changed_ns)
            is_script = is_same and stat.S_ISREG(now.st_mode) and _begins_as_script(fd)
            return found._replace(is_script=is_script)
    except (OSError, ValueError):  # it is not there, or no longer
        return found


def _find(path: str, cwd: str, problem_of: Callable[[os.stat_result], str]) -> Found:
    whole = os.path.join(cwd or "/", path)
    if len(os.fsencode(whole)) > PATH_MAX_BYTES:  # to walk through it would be work for nothing
        return Found(name_of(whole), "", problem="is no path: it is too long")
    try:
        named = os.path.join(os.path.realpath(os.path.dirname(whole)), os.path.basename(whole))
        with _opened(whole) as fd:
            real = os.readlink(f"/proc/self/fd/{fd}")
            found = os.fstat(fd)
        problem = problem_of(found) or _path_problem(real, found)
        return Found(named, real, found.st_dev, found.st_ino, found.st_ctime_ns, problem=problem)
    except (OSError, ValueError) as error:  # ValueError: NUL
        text = error.strerror if isinstance(error, OSError) else None
        # Where it would be: an answer must not tell what is there and what is not outside of the roots.
        return Found(whole, _real_or_not(whole), problem=(text or "is no path").lower())


@contextmanager
def _opened(path: str) -> Iterator[int]:
    # O_PATH: needs no permission to read, and waits for no writer of a FIFO.
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _file_problem(found: os.stat_result) -> str:
    return "" if stat.S_ISREG(found.st_mode) else "is no regular file"


def _program_problem(found: os.stat_result) -> str:
    return _file_problem(found) or ("" if found.st_mode & 0o111 else "is not executable")


def _directory_problem(found: os.stat_result) -> str:
    return "" if stat.S_ISDIR(found.st_mode) else "is no directory"


def _path_problem(real: str, found: os.stat_result) -> str:
    # What the kernel calls it is what it will be run by: that must lead to the very same file. It does not when the
    # file was removed or lies in another mount namespace (/proc/PID/root), or was never in a file system (memfd).
    try:
        again = os.stat(real)
    except OSError:
        return "has no path that leads to it"
    if (again.st_dev, again.st_ino) != (found.st_dev, found.st_ino):
        return "has no path that leads to it"
    return ""


def _begins_as_script(fd: int) -> bool:
    try:
        readable = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # what cannot be read cannot be interpreted
        return False
    try:
        return os.read(readable, 2) == b"#!"
    finally:
        os.close(readable)


def _real_or_not(path: str) -> str:
    try:
        return os.path.realpath(path)
    except (OSError, ValueError):
        return path
