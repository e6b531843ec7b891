"""What of a job is in no cgroup of its own: found among our children and in /proc, and ended.

Whose our children are, orphans.py says. Jobs of an earlier supervisor are not below us: they are found by session,
group, mark and descent among all processes.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final

from worker_svc.linux.processes import Process, environ_value, is_there, process, snapshot
from worker_svc.supervisor.containment.container import Container
from worker_svc.supervisor.containment.marks import MARK_VARIABLE, Marks
from worker_svc.supervisor.containment.orphans import Orphans
from worker_svc.supervisor.containment.signals import signal_verified

# The loop has other jobs to look after; who is not done by then is called again.
_KILL_BUDGET_NS: Final = 50_000_000
# What was signalled takes a moment to die. If it takes longer than this, SIGCHLD will tell.
_DYING_S: Final = 0.0002
_QUIET_ROUNDS: Final = 10
# Looking for many adopted jobs, one after the other, may take one part in so many of the time.
_WALK_AGAIN: Final = 20
_MARK: Final = MARK_VARIABLE.encode()


class _Walk:
    """All processes, and what each job has to look up of them: a look at one job costs what there is of that job."""

    def __init__(self, table: dict[int, Process], marks: dict[int, str]) -> None:
        self.table = table
        self.good_until_ns = 0
        self.marked: dict[str, list[int]] = {}
        """The pids by the mark that they carry."""
        for pid, mark in marks.items():
            self.marked.setdefault(mark, []).append(pid)
        self.below: dict[int, list[int]] = {}
        """The children of each."""
        self.inside: dict[int, set[int]] = {}
        """Who is in a session or a group, by its number."""
        for pid, one in table.items():
            self.below.setdefault(one.ppid, []).append(pid)
            for number in (one.session, one.pgrp):
                self.inside.setdefault(number, set()).add(pid)

    def tree(self, roots: Iterable[int], apart: tuple[int, ...]) -> list[Process]:
        """These processes and all their descendants, but never those `apart`."""
        found: dict[int, Process] = {}
        todo = list(roots)
        while todo:
            pid = todo.pop()
            if pid in self.table and pid not in found and pid not in apart:
                found[pid] = self.table[pid]
                todo += self.below.get(pid, ())
        return list(found.values())


class Sweep:
    def __init__(
        self,
        containers: dict[str, Container],
        by_name: dict[str, Container],
        marks: Marks,
        group_of: Callable[[int], str],
    ) -> None:
        """As of Orphans."""
        self.orphans = Orphans(containers, by_name, group_of)
        self._marks = marks
        self._group_of = group_of
        self._us = os.getpid()
        self._last_walk: _Walk | None = None
        self.leaders: dict[int, Container] = {}
        """Whose leader has, or had, a number."""

    def kill(self, container: Container) -> bool:
        """SIGKILL to every process of the job, and to what it forks meanwhile. True: none is left alive."""
        deadline_ns = time.monotonic_ns() + _KILL_BUDGET_NS
        signalled: set[tuple[int, int]] = set()
        self.orphans.reap()
        self._kill_new(self.members(container), signalled)
        quiet_rounds = 0
        while quiet_rounds < _QUIET_ROUNDS and time.monotonic_ns() < deadline_ns:
            # For a child's job it is enough, and fast, to look at what becomes an orphan: whatever is forked while its
            # parent dies does. Nothing can slip by, not even a process that forks and exits for ever.
            found = self.orphans.of(container) if container.is_child else self._unrelated(container)
            if found == [] and (container.is_child or quiet_rounds):
                return True
            if self._kill_new(found or [], signalled):
                quiet_rounds = 0
            else:
                quiet_rounds += 1
                time.sleep(_DYING_S)
            self.orphans.reap()
        return False

    def _unrelated(self, container: Container) -> list[Process]:
        """What there is of an earlier supervisor's job, whose processes are not below us. With a cgroup, what was found
        before: there are too many jobs for a walk each time."""
        if not container.name:
            return self.members(container)
        found = [process(pid) for pid, start in container.known or () if is_there(pid, start)]
        return [one for one in found if one is not None and one.is_alive]

    def _kill_new(self, found: list[Process], signalled: set[tuple[int, int]]) -> bool:
        """Kills those that were not before. False: there were none."""
        new = [one for one in found if one.identity not in signalled]
        for one in new:
            signalled.add(one.identity)
            with suppress(PermissionError):  # it changed its user: it shows as a survivor
                # A group as a whole: no fork(2) in it can evade that.
                send(one, signal.SIGKILL, group=one.pgrp == one.pid)
        return bool(new)

    def signal_others(self, container: Container, number: int) -> None:
        """Signals what is not in the leader's own group."""
        for one in self.members(container):
            if one.pgrp != container.pid:
                with suppress(PermissionError):
                    send(one, number)

    def is_empty(self, container: Container) -> bool:
        """Whether nothing of the job lives, outside of its cgroup if it has one."""
        return (self.orphans.of if container.is_child else self._unrelated)(container) == []

    def members(self, container: Container) -> list[Process]:
        """The living processes of the job, found without its cgroup."""
        roots = self.orphans.of(container) if container.is_child else None
        if roots == []:
            return []
        is_old = not container.is_child and bool(container.name)
        walk = _Walk(snapshot(), {}) if container.is_child else self._walk(may_be_old=is_old)
        table = walk.table
        seeds = {one.pid for one in roots or ()}
        seeds |= {pid for pid, start in container.known or () if pid in table and table[pid].start_ticks == start}
        if self.orphans.number_is_sure(container):
            seeds |= walk.inside.get(container.pid, set())
        seeds |= {pid for pid in walk.marked.get(container.mark, ()) if self._is_own(container, table[pid], walk)}
        found = walk.tree(seeds, (1, self._us))
        # Zombies too: one may lead the session of who lives. And who came after an old walk.
        later = {(pid, start) for pid, start in container.known or () if is_old and pid not in table}
        container.known = {one.identity for one in found} | later or None
        return [one for one in found if one.is_alive]

    def _is_own(self, container: Container, one: Process, walk: _Walk) -> bool:
        """Whether a process with its mark is an adopted job's: it is not if it has the mark from there, and is
        another's by cgroup, session, group or descent."""
        if one.start_ticks < container.start_ticks:
            return False
        if self._group_of(one.pid) not in ("", container.name):
            return False
        while one.pid not in (1, self._us):
            for number in (one.pid, one.session, one.pgrp):
                other, leader = self.leaders.get(number, container), walk.table.get(number)
                if other is not container and leader is not None and leader.start_ticks == other.start_ticks:
                    return False
            if one.ppid not in walk.table:
                break
            one = walk.table[one.ppid]
        return True

    def marked_jobs(self) -> set[tuple[str, int]]:
        """The jobs whose marks living processes carry, and when they were accepted."""
        found = {self._marks.read(mark) for mark in self._walk(may_be_old=False).marked}
        return {job for job in found if job is not None}

    def _walk(self, *, may_be_old: bool) -> _Walk:
        began_ns = time.monotonic_ns()
        if may_be_old and self._last_walk is not None and began_ns < self._last_walk.good_until_ns:
            return self._last_walk
        table = snapshot()
        marks = {
            pid: mark
            for pid, one in table.items()
            if pid != self._us and one.is_alive and (mark := environ_value(pid, _MARK))
        }
        took_ns = time.monotonic_ns() - began_ns
        walk = _Walk(table, marks)
        walk.good_until_ns = time.monotonic_ns() + took_ns * _WALK_AGAIN
        self._last_walk = walk if may_be_old else None
        return walk


def send(one: Process, number: int, *, group: bool = False) -> bool:
    """Signals just this process, not one that has its number by now. Raises PermissionError."""

    def is_it(pid: int) -> bool:
        found = process(pid)
        return found is not None and found.start_ticks == one.start_ticks and found.is_alive

    return signal_verified(one.pid, number, is_it, group=group)
