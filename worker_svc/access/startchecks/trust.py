"""Who else can change a file, or put another in its place: by the file, its directories and the links to it."""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Final, NamedTuple

_LINKS_MAX: Final = 40
"""As the kernel follows of one path."""
_WHOLE_UID_MAP: Final = 2**32 - 1


class Who(Enum):
    EVERYBODY = "everybody"
    USER = "user"
    """Who owns it, and is neither root nor ourselves."""
    GROUP = "group"


class Danger(NamedTuple):
    who: Who
    path: Path
    number: int
    """The number of the user or group."""
    mode: int

    def text(self, what: str) -> str:
        """`what` they can change; with the command that mends it."""
        if self.who is Who.USER:
            mend = f"chown -h {os.geteuid()} {self._named}"
            return f"{self.path}: belongs to user {self.number}, who can change {what}: {mend}"
        whom = "everybody" if self.who is Who.EVERYBODY else f"group {self.number}"
        classes = ("g" if self.mode & stat.S_IWGRP else "") + ("o" if self.mode & stat.S_IWOTH else "")
        return f"{self.path}: {whom} can change {what} (mode {self.mode:04o}): chmod {classes}-w {self._named}"

    @property
    def _named(self) -> str:
        return shlex.quote(str(self.path))


def who_else_can_replace(path: Path, *, leaf: bool = True, entries: bool = False) -> Iterator[Danger]:
    """All who can, besides root and ourselves. What is not there yet is of interest only by what leads to it.

    Without `leaf` the file itself does not count. A group counts if it is neither root's nor ours, of the file itself
    any group. With `entries` it is a directory in which new files are a danger too.
    """
    steps, is_whole = _way_to(path)
    for step, found in steps:
        is_leaf = is_whole and step is steps[-1][0]
        if stat.S_ISLNK(found.st_mode):
            if is_others(found.st_uid):
                yield Danger(Who.USER, step, found.st_uid, 0)
        elif leaf or not is_leaf:
            yield from who_else_can_write(step, found, any_group=is_leaf, entries=entries and is_leaf)


def who_else_can_write(
    path: Path, found: os.stat_result, *, any_group: bool, entries: bool = False
) -> Iterator[Danger]:
    """Whoever owns a file can, whatever its mode. In sticky directories only the owners of entries can change those."""
    mode = stat.S_IMODE(found.st_mode)
    if is_others(found.st_uid):
        yield Danger(Who.USER, path, found.st_uid, mode)
    if stat.S_ISDIR(found.st_mode) and mode & stat.S_ISVTX and not entries:
        return
    if not (stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)):
        return  # /dev/null is everybody's
    if mode & stat.S_IWOTH:
        yield Danger(Who.EVERYBODY, path, -1, mode)
    elif mode & stat.S_IWGRP and (any_group or found.st_gid not in (0, os.getegid())):
        yield Danger(Who.GROUP, path, found.st_gid, mode)


def is_others(uid: int) -> bool:
    return uid not in (0, os.geteuid()) and not (uid == _overflow_uid() and _is_in_user_namespace())


def _way_to(path: Path) -> tuple[list[tuple[Path, os.stat_result]], bool]:
    """Each directory, link and file that the kernel goes through, and whether all of them are there."""
    at, links = Path("/"), 0
    steps = [(at, at.lstat())]
    todo = list(reversed((Path.cwd() / path).parts[1:]))
    while todo:
        part = todo.pop()
        step = at.parent if part == ".." else at / part
        try:
            found = step.lstat()
            target = step.readlink() if stat.S_ISLNK(found.st_mode) else None
        except OSError:
            return steps, False
        steps.append((step, found))
        if target is None:
            at = step
            continue
        links += 1
        if links > _LINKS_MAX:
            return steps, False
        at = Path("/") if target.is_absolute() else at
        todo += reversed(target.parts[1:] if target.is_absolute() else target.parts)
    return steps, True


def _overflow_uid() -> int:
    """The owner that files show whose owners have no number in our user namespace: nobody in it can be them."""
    try:
        return int(Path("/proc/sys/kernel/overflowuid").read_text())
    except (OSError, ValueError):
        return 65534


def _is_in_user_namespace() -> bool:
    """Whether there are users who have no number here."""
    try:
        size = int(Path("/proc/self/uid_map").read_text().split()[2])
    except (OSError, ValueError, IndexError):
        return False
    return size < _WHOLE_UID_MAP
