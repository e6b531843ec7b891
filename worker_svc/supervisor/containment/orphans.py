"""Our children that are no leaders: what the jobs' processes left to us when they ended.

We are a child subreaper (PR_SET_CHILD_SUBREAPER(2const)), so every process of our jobs is a descendant of ours,
whatever it did: once its parent is dead it is our child, and of the same job as all that is below it. Of which one is
told, in this order, by
  1. descent: it was seen below the leader or another orphan of the job before;
  2. the session or group that the job's leader founded, while that number is sure to be still the leader's;
     or a session that a process known by 1 leads: sessions are only inherited;
  3. the cgroup it is in;
  4. the mark in the environment it was executed with, which a job can take away, but not make up;
  5. elimination: when it was first seen, no other job could have started it.
What none of these tells is nobody's for sure. It is ended with the last job that may have started it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Final

from worker_svc.linux.processes import (
    Process,
    environ_value,
    own_children,
    process,
    process_tree,
    snapshot,
)
from worker_svc.supervisor.containment.container import Container
from worker_svc.supervisor.containment.marks import MARK_VARIABLE
from worker_svc.supervisor.containment.signals import group_exists

_LOOKS_MAX: Final = 100
# Candidates to choose from.
_FEW: Final = 4
# A job may leave us any number of orphans: the loop has other jobs to look after.
_JUDGED_MAX: Final = 64
_NAMED_MAX: Final = 8
# waitid(2): only what is this thread's child. Orphans are the main thread's, leaders those of the spawner's threads.
_WNOTHREAD: Final = 0x20000000
_MARK: Final = MARK_VARIABLE.encode()


class _Orphan:
    __slots__ = ("candidates", "met_after", "owner", "start_ticks")

    def __init__(self, start_ticks: int, met_after: int) -> None:
        self.start_ticks = start_ticks
        self.met_after = met_after
        """The number of the last container that was made before it was met."""
        self.owner: Container | None = None
        self.candidates: tuple[int, ...] = ()
        """While its owner is unclear: the containers that may have started it, if these are all and few. Empty: they
        are many, or it may be of a job that is gone by now."""

    def may_be_of(self, container: Container) -> bool:
        """As far as time tells. (When a starting job was started is known once it is there.)"""
        is_older = container.number <= self.met_after and container.start_ticks <= self.start_ticks
        return container.is_child and is_older


class Orphans:
    def __init__(
        self, containers: dict[str, Container], by_name: dict[str, Container], group_of: Callable[[int], str]
    ) -> None:
        """The containers by mark, and by the name of their cgroup; `group_of` tells the name of the job's cgroup that a
        process is in, empty if none."""
        self._containers = containers
        self._by_name = by_name
        self._group_of = group_of
        self._us = os.getpid()
        self._session = os.getsid(0)
        self._leaders: dict[int, Container] = {}
        self._met: dict[int, _Orphan] = {}
        """By pid: a number stays theirs until we reap them."""
        self._unclear: dict[int, _Orphan] = {}
        """Those of them that have no owner."""
        self._has_news = False
        """Whether something was learnt since they were last judged."""
        self._reaped: list[_Orphan] = []
        """The unclear ones that were reaped since the last look: the children they left are not met yet."""
        self._lost_one: set[Container] = set()
        """Containers of which an orphan was reaped, to be told."""
        self._suspects: dict[int, int] = {}
        """Dead children that may be a leader we have not been told of yet → the last container made before."""
        self.starting: dict[int, Container] = {}
        """Containers whose leader is not known yet, by number, so in order."""
        self.last_number = 0

    def remember(self, container: Container, found: list[Process]) -> None:
        """They were seen to be the job's."""
        if found:
            container.remember(found)
            self._has_news = True

    def add_leader(self, container: Container) -> None:
        self._has_news = True
        self.starting.pop(container.number, None)
        self._leaders[container.pid] = container
        self._forget(container.pid)

    def _forget(self, pid: int) -> None:
        """It is no orphan."""
        self._suspects.pop(pid, None)
        self._met.pop(pid, None)
        self._unclear.pop(pid, None)

    def drop_leader(self, container: Container) -> None:
        if self._leaders.get(container.pid) is container:
            del self._leaders[container.pid]

    # Whose they are

    def of(self, container: Container) -> list[Process] | None:
        """Our living children that are of the job: its orphans, and without a cgroup its leader. With a cgroup, only
        those that are not in there. None of them: none of the job lives.

        For as long as it has a living process, the topmost one of its line is our child. Those that exit while we look
        leave theirs at the end of the list: the answer "none" holds once the list names nobody new.

        None: cannot be told now, since new orphans come faster than we look.
        """
        leader = () if container.name else (container.pid,)
        checked: set[int] = set()
        for _ in range(_LOOKS_MAX):
            candidates = {*self._look(), *leader} - checked
            if not candidates:
                return []
            found = [one for pid in candidates if (one := self._if_of(container, pid)) is not None]
            if found:
                return found
            checked |= candidates
        return None

    def _if_of(self, container: Container, pid: int) -> Process | None:
        """The process, if it lives and is the job's, outside of its cgroup."""
        orphan = self._met.get(pid)
        if orphan is not None and orphan.owner is container:
            start_ticks = orphan.start_ticks
        elif pid == container.pid:
            start_ticks = container.start_ticks
        else:
            return None
        one = process(pid)
        if one is None or one.start_ticks != start_ticks or not one.is_alive:
            return None
        return None if container.name and self._group_of(pid) == container.name else one

    def maybe_of(self, container: Container) -> list[Process]:
        """Some living ones of which nothing tells whose they are, and which the job may have started."""
        found: list[Process] = []
        for pid, orphan in self._unclear.items():
            if len(found) == _NAMED_MAX:
                break
            one = process(pid) if orphan.may_be_of(container) else None
            if one is not None and one.is_alive:
                found.append(one)
        return found

    def claim(self, container: Container) -> bool:
        """The job ends: what no other living one may have started is taken for its. False: there was none."""
        claimed = False
        for pid, orphan in list(self._unclear.items()):
            others = (one for one in self._containers.values() if one is not container)
            if not any(orphan.may_be_of(one) for one in others):
                self._give(pid, orphan, container)
                claimed = True
        return claimed

    def number_is_sure(self, container: Container) -> bool:
        """Whether the leader's number is still its own: it cannot go to another process as long as somebody, if only
        the leader's zombie, is in the group of that number."""
        if not container.pid:
            return False
        leader = process(container.pid)
        if leader is not None:
            return leader.start_ticks == container.start_ticks
        return container.pidfd >= 0 and group_exists(container.pidfd)

    def _look(self) -> list[int]:
        """Our children but the leaders we know; those that are new are met."""
        found = [pid for pid in self._children() if pid not in self._leaders]
        for pid in found:
            if pid not in self._met:
                self._meet(pid)
        self._reaped.clear()
        if self._has_news:
            self._has_news = False
            for pid, orphan in list(islice(self._unclear.items(), _JUDGED_MAX)):
                self._judge(pid, orphan)  # now, while who may tell is there
        return found

    def _children(self) -> list[int]:
        """Our children. Where the kernel has a list of them, without what other threads started: the leaders."""
        children = own_children(self._us)
        return [one.pid for one in snapshot().values() if one.ppid == self._us] if children is None else children

    def _meet(self, pid: int) -> None:
        one = process(pid)
        if one is None or one.ppid != self._us or one.session == self._session:
            return  # reaped by a spawner thread; or on its way from fork to setsid
        orphan = _Orphan(one.start_ticks, self.last_number)
        below = process_tree(one)
        owner = next((told for each in (one, *below) if (told := self._told_by(each)) is not None), None)
        earlier = any(other.start_ticks <= one.start_ticks for other in (*self._unclear.values(), *self._reaped))
        self._met[pid] = self._unclear[pid] = orphan
        if owner is not None:
            self._give(pid, orphan, owner)
            self.remember(owner, below)  # while it is below
        elif not earlier:  # else it may be of one of these, whose job may be gone by now
            found = [container.number for container in self._containers.values() if orphan.may_be_of(container)]
            orphan.candidates = tuple(found) if len(found) <= _FEW else ()
            self._eliminate(pid, orphan)

    def _judge(self, pid: int, orphan: _Orphan) -> None:
        """Gives an unclear one to its owner, if it can be told by now."""
        one = process(pid)
        owner = self._told_by(one) if one is not None else None
        if owner is not None:
            self._give(pid, orphan, owner)
        elif orphan.candidates:
            self._eliminate(pid, orphan)

    def _eliminate(self, pid: int, orphan: _Orphan) -> None:
        living = {one.number: one for one in self._containers.values() if one.number in orphan.candidates}
        left = [number for number in orphan.candidates if number not in living or orphan.may_be_of(living[number])]
        if len(left) == 1 and left[0] in living:
            self._give(pid, orphan, living[left[0]])

    def _give(self, pid: int, orphan: _Orphan, owner: Container) -> None:
        orphan.owner = owner
        self._unclear.pop(pid, None)
        self._has_news = True

    def _told_by(self, one: Process) -> Container | None:
        found = self._known(one)
        if found is not None:
            return found
        for number in (one.session, one.pgrp):
            container = self._leaders.get(number)
            if container is not None and self.number_is_sure(container):
                return container
        leader = process(one.session) if one.session != one.pid else None
        found = self._known(leader) if leader is not None else None
        if found is not None:
            return found
        group = self._group_of(one.pid)
        if group:
            return self._by_name.get(group)
        return self._containers.get(environ_value(one.pid, _MARK))

    def _known(self, one: Process) -> Container | None:
        orphan = self._met.get(one.pid)
        if orphan is not None and orphan.owner is not None and orphan.start_ticks == one.start_ticks:
            return orphan.owner
        for container in self._containers.values():
            if container.known and one.identity in container.known:
                return container
        return None

    # Their end

    def reap(self) -> None:
        """Reaps the dead ones."""
        try:
            if os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT | _WNOTHREAD) is None:
                return
        except ChildProcessError:
            return
        for pid in self._look():
            if not self._reap(pid):
                continue
            self._suspects.pop(pid, None)
            orphan = self._met.pop(pid, None)
            if self._unclear.pop(pid, None) is not None and orphan is not None:
                self._reaped.append(orphan)
            elif orphan is not None and orphan.owner is not None:
                self._lost_one.add(orphan.owner)

    def take_reaped(self) -> Iterable[Container]:
        """The containers that lost an orphan since the last call."""
        found, self._lost_one = self._lost_one, set()
        return found

    def _reap(self, pid: int) -> bool:
        try:
            dead = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if dead is None:
                return False
            # It may be the leader of a job whose spawner has not told us yet: only once all that were starting when it
            # was first seen dead have a leader, or none, is it none of theirs.
            seen = self._suspects.setdefault(pid, self.last_number)
            if self.starting and next(iter(self.starting)) <= seen:
                return False
            return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG) is not None
        except ChildProcessError:  # a spawner thread took it: a child whose exec failed
            self._forget(pid)
            return False
