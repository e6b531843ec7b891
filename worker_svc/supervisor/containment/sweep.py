"""Without a cgroup: which processes are a job's, found in /proc.

We are a child subreaper (PR_SET_CHILD_SUBREAPER(2const)), so every process of our jobs is a descendant of ours,
whatever it did: once its parent is dead it is our child. A child of ours that is no leader is therefore an orphan of
exactly one job, and its descendants are of the same job. Which one is told, in this order, by
  1. the session or group that the job's leader founded, while that number is sure to be still the leader's;
  2. the environment it was executed with: job id and state id;
  3. elimination: no other living container could have started it.
Jobs of an earlier supervisor are not below us; they are found by 1, 2 and descent among all processes.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

from worker_svc.supervisor.containment.container import Container
from worker_svc.supervisor.containment.processes import (
    Process,
    environ_has,
    environ_value,
    own_children,
    process,
    snapshot,
)
from worker_svc.supervisor.containment.signals import group_exists, signal_verified

JOB_VARIABLE: Final = "WORKER_JOB_ID"
STATE_VARIABLE: Final = "WORKER_STATE_ID"
# The loop has other jobs to look after; who is not done by then is called again.
_KILL_BUDGET_NS: Final = 50_000_000
# What was signalled takes a moment to die. If it takes longer than this, SIGCHLD will tell.
_DYING_S: Final = 0.0002
_QUIET_ROUNDS: Final = 10
_LOOKS_MAX: Final = 100


class Sweep:
    def __init__(self, state_id: str, containers: dict[str, Container]) -> None:
        self._state_entry = f"{STATE_VARIABLE}={state_id}".encode()
        self._containers = containers
        self._us = os.getpid()
        self._session = os.getsid(0)
        self._leaders: dict[int, Container] = {}
        self._owners: dict[int, str] = {}
        """Of orphans: pid → job id. A number stays theirs until we reap them, which drops it here."""
        self._suspects: dict[int, int] = {}
        """Dead children that may be a leader we have not been told of yet → the last container made before."""
        self.starting: dict[int, Container] = {}
        """Containers whose leader is not known yet, by number, so in order."""
        self.last_number = 0

    def add_leader(self, container: Container) -> None:
        self._leaders[container.pid] = container
        self._suspects.pop(container.pid, None)

    def drop_leader(self, container: Container) -> None:
        if self._leaders.get(container.pid) is container:
            del self._leaders[container.pid]

    def kill(self, container: Container) -> bool:
        """SIGKILL to every process of the job, and to what it forks meanwhile. True: none is left alive."""
        deadline_ns = time.monotonic_ns() + _KILL_BUDGET_NS
        signalled: set[tuple[int, int]] = set()
        self.reap_orphans()
        self._kill_new(self.members(container), signalled)
        quiet_rounds = 0
        while quiet_rounds < _QUIET_ROUNDS and time.monotonic_ns() < deadline_ns:
            # Of a child's job it is enough, and fast, to look at what becomes an orphan: whatever is forked while its
            # parent dies does. Nothing can slip by, not even a process that forks and exits for ever.
            found = self._living_roots(container) if container.is_child else self.members(container)
            if found == [] and (container.is_child or quiet_rounds):
                return True
            if self._kill_new(found or [], signalled):
                quiet_rounds = 0
            else:
                quiet_rounds += 1
                time.sleep(_DYING_S)
            self.reap_orphans()
        return False

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
        return (self._living_roots if container.is_child else self.members)(container) == []

    def members(self, container: Container) -> list[Process]:
        """The living processes of the job."""
        roots = self._living_roots(container) if container.is_child else None
        if roots == []:
            return []
        table = snapshot()
        seeds = {one.pid for one in roots or ()}
        seeds |= {pid for pid, start in container.known or () if pid in table and table[pid].start_ticks == start}
        if self._number_is_sure(container):
            seeds |= {one.pid for one in table.values() if container.pid in (one.session, one.pgrp)}
        if not container.is_child:
            seeds |= {one.pid for one in table.values() if self._has_marks(container, one)}
        found = [one for one in self._tree(seeds, table) if one.is_alive]
        container.known = {one.identity for one in found} or None
        return found

    def marked_jobs(self) -> set[str]:
        """The job ids that living processes with our state id carry."""
        found = set()
        for one in snapshot().values():
            if one.pid != self._us and one.is_alive and environ_has(one.pid, (self._state_entry,)):
                found.add(environ_value(one.pid, JOB_VARIABLE.encode()))
        return found - {""}

    def _living_roots(self, container: Container) -> list[Process] | None:
        """Our living children that are of the job: its leader and its orphans. None of them: none of the job lives.

        For as long as it has a living process, the topmost one of its line is our child. Those that exit while we look
        leave theirs at the end of the list: the answer "none" holds once the list names nobody new.

        None: cannot be told now, since new orphans come faster than we look.
        """
        is_sure = self._number_is_sure(container)
        checked: set[int] = set()
        found = []
        for _ in range(_LOOKS_MAX):
            candidates = {*self._children(), container.pid} - checked
            if not candidates:
                return []
            for pid in candidates:
                if self._leaders.get(pid, container) is container:
                    one = process(pid)
                    if one is not None and one.is_alive and self._owns(container, one, is_sure):
                        found.append(one)
            if found:
                return found
            checked |= candidates
        return None

    def _children(self) -> list[int]:
        """Our children. Where the kernel has a list of them, without what other threads started: the leaders."""
        children = own_children(self._us)
        return [one.pid for one in snapshot().values() if one.ppid == self._us] if children is None else children

    def _owns(self, container: Container, child: Process, is_sure: bool) -> bool:
        """Whether a living child of ours is the job's leader or orphan."""
        if child.pid in self._leaders:
            return child.start_ticks == container.start_ticks
        if child.ppid != self._us or child.session == self._session:
            return False  # a number that went to somebody else; or on its way from fork to setsid
        owner = self._owners.get(child.pid, "")
        if owner not in self._containers:
            owner = self._marked_owner(child.pid)
            if not owner and is_sure and container.pid in (child.session, child.pgrp):
                owner = container.job_id
            if owner:
                self._owners[child.pid] = owner
        return owner == container.job_id if owner else self._is_only_origin(container, child)

    def _marked_owner(self, pid: int) -> str:
        """The job of ours that the environment names; empty: none."""
        if not environ_has(pid, (self._state_entry,)):
            return ""
        owner = environ_value(pid, JOB_VARIABLE.encode())
        return owner if owner in self._containers else ""

    def _number_is_sure(self, container: Container) -> bool:
        """Whether the leader's number is still its own: it cannot go to another process as long as somebody, if only
        the leader's zombie, is in the group of that number."""
        if not container.pid:
            return False
        leader = process(container.pid)
        if leader is not None:
            return leader.start_ticks == container.start_ticks
        return container.pidfd >= 0 and group_exists(container.pidfd)

    def _tree(self, roots: Iterable[int], table: dict[int, Process]) -> list[Process]:
        """These processes and all their descendants, but never ourselves and init."""
        below: dict[int, list[int]] = {}
        for one in table.values():
            below.setdefault(one.ppid, []).append(one.pid)
        found: dict[int, Process] = {}
        todo = list(roots)
        while todo:
            pid = todo.pop()
            if pid in table and pid not in found and pid not in (1, self._us):
                found[pid] = table[pid]
                todo += below.get(pid, ())
        return list(found.values())

    def _is_only_origin(self, container: Container, orphan: Process) -> bool:
        """Whether no other container can have started an orphan without marks. One whose leader we do not know yet
        may have, or even be it."""
        return not any(
            other is not container
            and other.is_child
            and not other.name
            and (not other.start_ticks or other.start_ticks <= orphan.start_ticks)
            for other in self._containers.values()
        )

    def _has_marks(self, container: Container, one: Process) -> bool:
        if one.pid == self._us or not one.is_alive or one.start_ticks < container.start_ticks:
            return False
        return environ_has(one.pid, (f"{JOB_VARIABLE}={container.job_id}".encode(), self._state_entry))

    def reap_orphans(self) -> bool:
        """Reaps the dead children that are no leaders. False: there was none."""
        try:
            if os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                return False
        except ChildProcessError:
            return False
        reaped = False
        for pid in self._children():
            if pid not in self._leaders and self._reap(pid):
                self._owners.pop(pid, None)
                self._suspects.pop(pid, None)
                reaped = True
        return reaped

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
            self._suspects.pop(pid, None)
            return False


def send(one: Process, number: int, *, group: bool = False) -> bool:
    """Signals just this process, not one that has its number by now. Raises PermissionError."""

    def is_it(pid: int) -> bool:
        found = process(pid)
        return found is not None and found.start_ticks == one.start_ticks and found.is_alive

    return signal_verified(one.pid, number, is_it, group=group)
