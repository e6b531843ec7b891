"""What /proc tells of processes (proc_pid_stat(5), proc_pid_environ(5), proc_pid_wchan(5))."""

from __future__ import annotations

import errno
import os
from typing import Final, NamedTuple

# An environment and arguments together are at most a quarter of the stack limit (execve(2)), usually 2 MiB.
_ENVIRON_MAX_BYTES: Final = 8 * 1024 * 1024
# Parents may die while one looks, on purpose too.
_LOOKS_MAX: Final = 100
_LINE_MAX: Final = 64
# The loop has other jobs to look after.
_TREE_MAX: Final = 1000
# 52 numbers and a name of at most 64 bytes.
_STAT_MAX_BYTES: Final = 2048


class Process(NamedTuple):
    pid: int
    state: str
    ppid: int
    pgrp: int
    session: int
    threads: int
    start_ticks: int

    @property
    def identity(self) -> tuple[int, int]:
        return self.pid, self.start_ticks

    @property
    def is_alive(self) -> bool:
        # A main thread that ended before the others shows as a zombie, but the process lives.
        return self.state not in "ZX" or self.threads > 1


class Survivor(NamedTuple):
    """A process that did not die: its state (D: it waits in the kernel, uninterruptibly) and in which function."""

    pid: int
    state: str
    wchan: str


def process(pid: int) -> Process | None:
    """None: there is no such process, or we cannot see it."""
    text = _read(f"/proc/{pid}/stat", _STAT_MAX_BYTES)
    if not text:
        return None
    # The name in field 2 can hold spaces and brackets.
    fields = text.rpartition(b")")[2].split(None, 20)
    return Process(
        pid,
        fields[0].decode(),
        int(fields[1]),
        int(fields[2]),
        int(fields[3]),
        int(fields[17]),
        int(fields[19]),
    )


def is_there(pid: int, start_ticks: int) -> bool:
    """Whether the process with this identity lives, or is a zombie."""
    one = process(pid)
    return one is not None and one.start_ticks == start_ticks


def snapshot() -> dict[int, Process]:
    """All processes, one after the other: not the state of one moment."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            one = process(int(name))
            if one is not None:
                found[one.pid] = one
    return found


def own_children(main_pid: int) -> list[int] | None:
    """The children of our main thread, zombies too. None: this kernel does not tell (CONFIG_PROC_CHILDREN).

    A subreaper's orphans go to its first living thread (find_new_reaper in kernel/exit.c). proc_tid_children(5) warns
    that the list is reliable only while no child goes away: ours do that only when this thread reaps them.
    """
    text = _read(f"/proc/self/task/{main_pid}/children", 1024 * 1024)
    return None if text is None else [int(pid) for pid in text.split()]


def process_tree(root: Process) -> list[Process]:
    """What is below a process now, itself not included, and no more than a good many of them."""
    found: list[Process] = []
    todo = [root]
    while todo and len(found) < _TREE_MAX:
        parent = todo.pop()
        children = [one for pid in _children(parent.pid) if (one := process(pid)) and one.ppid == parent.pid]
        # Looked at last: if it ended meanwhile, these may be the children of who has its number now.
        if children and is_there(*parent.identity):
            found += children
            todo += children
    return found


def lineage(pid: int) -> list[Process] | None:
    """A process, its parent and so on, up to the last one that we can see; empty: the process is gone, or not ours to
    see. None: it cannot be told, since there are too many, or they die faster than we look."""
    for _ in range(_LOOKS_MAX):
        one = process(pid)
        if one is None:
            return []
        found = [one]
        while found[-1].ppid and len(found) < _LINE_MAX:
            child, parent = found[-1], process(found[-1].ppid)
            # Looked at last: if its parent died meanwhile, who has that number now is none of its line.
            now = process(child.pid)
            if now is None or (now.start_ticks, now.ppid) != (child.start_ticks, child.ppid):
                break
            if parent is None:
                return found
            found.append(parent)
        else:
            return found if len(found) < _LINE_MAX else None
    return None


def _children(pid: int) -> list[int]:
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except (FileNotFoundError, ProcessLookupError):
        return []
    lists = (_read(f"/proc/{pid}/task/{thread}/children", 1024 * 1024) or b"" for thread in threads)
    return [int(child) for text in lists for child in text.split()]


def environ_value(pid: int, name: bytes) -> str:
    """The value of a variable that the process was executed with; empty if there is none."""
    text = b"\0" + (_read(f"/proc/{pid}/environ", _ENVIRON_MAX_BYTES) or b"")
    return os.fsdecode(text.partition(b"\0" + name + b"=")[2].partition(b"\0")[0])


def survivor(one: Process) -> Survivor:
    wchan = (_read(f"/proc/{one.pid}/wchan", 256) or b"").decode(errors="replace").strip()
    return Survivor(one.pid, one.state, "" if wchan == "0" else wchan)


def _read(path: str, limit: int) -> bytes | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise  # else a process would seem to be gone
        return None
    try:
        if limit <= _STAT_MAX_BYTES:
            return os.read(fd, limit)  # the kernel makes such a short file in one piece
        parts = []
        while limit > 0:
            part = os.read(fd, min(limit, 64 * 1024))
            if not part:
                break
            parts.append(part)
            limit -= len(part)
        return b"".join(parts)
    except OSError:  # ESRCH: it went away meanwhile
        return None
    finally:
        os.close(fd)


def group_path_of(pid: int) -> str:
    """Where its group is in the v2 hierarchy, as proc_pid_cgroup(5) has it; empty: it is gone."""
    try:
        with open(f"/proc/{pid}/cgroup", errors="surrogateescape") as file:
            return next((line[3:].rstrip("\n") for line in file if line.startswith("0::")), "")
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise
        return ""
