"""Containment of jobs at the best level that this machine offers: Initialize, Kill, Cleanup, and what goes between.

Two levels: "cgroup", a cgroup v2 group for each job; "subreaper", a session and process group for each job. What left
these falls to us as an orphan, sooner or later (orphans.py). All calls are synchronous and short; nothing here waits
for a process to die.
"""

from __future__ import annotations

import os
import select
import signal
from contextlib import suppress
from typing import Final

from worker_svc.job import Exit
from worker_svc.job.limits import BY_NAME, NO_LIMITS, OF_TREE, Limits
from worker_svc.linux.kinship import Kinship
from worker_svc.linux.processes import Process, Survivor, process, process_tree, survivor
from worker_svc.supervisor.containment import signals, subreaper
from worker_svc.supervisor.containment.container import Container, ContainmentError
from worker_svc.supervisor.containment.groups import NAME_PREFIX, Groups, Unenforceable, Usage, parse_events
from worker_svc.supervisor.containment.hierarchy import Unusable, find_base
from worker_svc.supervisor.containment.marks import Marks
from worker_svc.supervisor.containment.sweep import Sweep, send

CGROUP: Final = "cgroup"
SUBREAPER: Final = "subreaper"
# Not allowed in a job id: what follows tells apart the groups of jobs that had the same id one after the other.
_AGAIN: Final = "~"
_AGAIN_MAX: Final = 100
# A process's state in proc_pid_stat(5).
_STOPPED: Final = "T"


class Containment:
    """All containers of one state directory. One thread only calls it: the one that reaps."""

    def __init__(self, state_id: str, secret: bytes, *, level: str = "", base: str = "") -> None:
        """secret: keys the marks of processes. level: forces one of the two, ContainmentError if it is not to be had;
        empty: the best. base: `base_path` of an earlier supervisor of the same state."""
        self._marks = Marks(state_id, secret)
        self._containers: dict[str, Container] = {}
        """By mark."""
        self._by_name: dict[str, Container] = {}
        """Those with a cgroup."""
        self._sweep = Sweep(self._containers, self._by_name, self._marks, self._group_of)
        self._orphans = self._sweep.orphans
        self._changes = select.epoll(flags=select.EPOLL_CLOEXEC)
        self._watched: dict[int, Container] = {}
        self._leftovers: list[str] = []
        self._groups: Groups | None = None
        self.reason = f"the level {level} was asked for" if level == SUBREAPER else ""
        """Why the level is not "cgroup"; empty if it is."""
        if level != SUBREAPER:
            try:
                self._groups = Groups(find_base(state_id, base))
            except (Unusable, OSError) as error:
                self.reason = f"no cgroup can be used: {error}"
                if level == CGROUP:
                    raise ContainmentError("", self.reason) from error
        self.level = SUBREAPER if self._groups is None else CGROUP
        self._earlier = self._names_by_job()
        """The groups that an earlier supervisor left, until their jobs are adopted: there may be thousands."""
        self.kinship = Kinship(os.getpid(), state_id, self._groups.base.proc_path if self._groups else "")
        subreaper.set_child_subreaper()

    @property
    def base_path(self) -> str:
        """The group that holds the jobs' groups, to be told to the next supervisor; empty at the other level."""
        return self._groups.base.path if self._groups else ""

    @property
    def events_fd(self) -> int:
        """For epoll: readable when `take_events` has something to tell."""
        return self._changes.fileno()

    def unenforceable(self) -> dict[str, str]:
        """The limits of the tree that cannot be enforced here, each with what is missing."""
        reasons = {limit.name: self._why_not(limit.name) for limit in OF_TREE}
        return {field: reason for field, reason in reasons.items() if reason}

    def _why_not(self, field: str) -> str:
        return self._groups.why_not(field) if self._groups else f"it takes cgroup v2, and {self.reason}"

    def check(self, limits: Limits) -> None:
        """Raises ContainmentError for the first limit that cannot be enforced: before a job is accepted."""
        for field in limits:
            missing = self._why_not(field) if BY_NAME[field].file else ""
            if missing:
                raise ContainmentError(field, missing)

    def marks(self, container: Container) -> dict[str, str]:
        """The environment variables that every process of the job must be started with."""
        return self._marks.variables(container.job_id, container.mark)

    def _group_of(self, pid: int) -> str:
        return self._groups.group_of(pid) if self._groups else ""

    # Initialize

    def create(self, job_id: str, limits: Limits = NO_LIMITS, *, accepted_ns: int = 0) -> Container:
        """A container for a job that is to be started. Raises ContainmentError, having left nothing."""
        if self._groups is None:
            self.check(limits)
        name = self._make_group(self._groups, job_id, limits) if self._groups else ""
        container = self._add(job_id, accepted_ns, name)
        self._orphans.starting[container.number] = container
        try:
            if self._groups:
                container.cgroup_fd = self._groups.open(name)
        except OSError as error:
            self.remove(container)
            raise ContainmentError("", error.strerror or str(error)) from error
        return container

    def _make_group(self, groups: Groups, job_id: str, limits: Limits) -> str:
        first = f"{NAME_PREFIX}{job_id}"
        name = first
        try:
            for again in range(1, _AGAIN_MAX):
                try:
                    groups.make(name, limits)
                    return name
                except FileExistsError:
                    # What an earlier job of this id left. Removed, or killed and let be, never joined.
                    if not groups.remove(name):
                        groups.kill(name)
                        self._keep_leftover(name)
                        name = f"{first}{_AGAIN}{again}"
        except Unenforceable as error:
            raise ContainmentError(error.field, error.missing) from error
        except OSError as error:
            raise ContainmentError("", f"{groups.base.path}/{name}: {error.strerror}") from error
        raise ContainmentError("", f"{groups.base.path}/{first}: earlier jobs of this id will not die")

    def _add(self, job_id: str, accepted_ns: int, name: str) -> Container:
        self._orphans.last_number += 1
        container = Container(job_id, self._marks.of(job_id, accepted_ns), name, self._orphans.last_number)
        self._containers[container.mark] = container
        if name:
            self._by_name[name] = container
        return container

    def started(self, container: Container, pid: int, pidfd: int, start_ticks: int) -> None:
        """The leader is there. `pidfd` stays the caller's, who keeps it open until `leader_gone`."""
        self.take_over(container, pid, pidfd, start_ticks)
        self._orphans.add_leader(container)
        self._close_cgroup_fd(container)

    def adopt(
        self, job_id: str, pid: int = 0, pidfd: int = -1, start_ticks: int = 0, *, accepted_ns: int = 0
    ) -> Container:
        """The container of a job that an earlier supervisor started, whatever level that one had. pid 0: of the
        leader nothing is known, or it is gone."""
        container = self._add(job_id, accepted_ns, self._existing_group(job_id))
        container.is_child = False
        if pid:
            self.take_over(container, pid, pidfd, start_ticks)
        return container

    def find_leader(self, container: Container) -> Process | None:
        """For an adopted job whose leader is not on record: the process that leads its session, if it is there."""
        leaders = [one for one in self._members(container) if one.session == one.pid]
        return min(leaders, key=lambda one: one.start_ticks, default=None)

    def take_over(self, container: Container, pid: int, pidfd: int, start_ticks: int) -> None:
        """The leader of an adopted job was found; the pidfd stays the caller's, as in `started`."""
        container.pid, container.pidfd, container.start_ticks = pid, pidfd, start_ticks
        self._sweep.leaders[pid] = container

    def _names_by_job(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self._groups.names() if self._groups else ():
            found.setdefault(name.removeprefix(NAME_PREFIX).partition(_AGAIN)[0], []).append(name)
        return found

    def _existing_group(self, job_id: str) -> str:
        # The last one made is the job's; the others are what jobs of the same id left.
        names = sorted(self._earlier.pop(job_id, ()), key=lambda name: int(name.partition(_AGAIN)[2] or 0))
        for name in names[:-1]:
            self._keep_leftover(name)
        return names[-1] if names else ""

    def strangers(self) -> list[tuple[str, int]]:
        """Jobs that are none here, of which something is left, and when they were accepted (0: not known). Once all
        jobs were adopted, these are to be adopted and killed."""
        found = {job for job in self._sweep.marked_jobs() if self._marks.of(*job) not in self._containers}
        known = {container.job_id for container in self._containers.values()} | {job_id for job_id, _ in found}
        return [*found, *((job_id, 0) for job_id in self._names_by_job().keys() - known)]

    # Signals

    def signal(self, container: Container, number: int, *, wakes: bool = False) -> None:
        """To the leader's process group; if the leader is gone, to each process. Raises PermissionError.

        wakes: SIGCONT follows, since whoever was stopped (SIGSTOP, SIGTSTP, SIGTTIN) would not see the signal; it goes
        to stopped ones of other groups too, which those that were signalled may wait for."""
        numbers = (number, signal.SIGCONT) if wakes else (number,)
        if container.pidfd >= 0:
            below = self._remember(container)
            for each in numbers:
                signals.signal_job(container.pidfd, container.pid, each, is_child=container.is_child)
            for one in below if wakes else ():
                if one.state == _STOPPED and one.pgrp != container.pid:
                    with suppress(PermissionError):  # it changed its user
                        send(one, signal.SIGCONT)
            return
        for one in self._members(container):
            for each in numbers:
                self._send(container, one, each)

    def _remember(self, container: Container) -> list[Process]:
        """What is below the leader now, before a signal that may end it: whatever it turns itself into, it is the
        job's."""
        below: list[Process] = []
        with suppress(OSError):  # no fd is free; the signal matters more
            leader = process(container.pid)
            if leader is not None and leader.start_ticks == container.start_ticks:
                below = process_tree(leader)
                self._orphans.remember(container, below)
        return below

    def _send(self, container: Container, one: Process, number: int) -> None:
        if self._groups and container.name and self._groups.holds(container.name, one.pid):
            groups, name = self._groups, container.name
            signals.signal_verified(one.pid, number, lambda pid: groups.holds(name, pid))
        else:
            send(one, number)

    def freeze(self, container: Container) -> bool:
        """Pauses the whole job. False: not all of it stands still yet; `take_events` tells when to look again. Raises
        OSError; then part of it may stand still, until `thaw`."""
        if self._groups and container.name:
            self.watch(container)  # first: it may fail for want of an fd
            if self._groups.freeze(container.name, True):
                return self.is_frozen(container)
        self.signal(container, signal.SIGSTOP)
        self._signal_others(container, signal.SIGSTOP)
        return True

    def thaw(self, container: Container) -> None:
        """Raises OSError; then the leader's group, at least, stands still."""
        if not (self._groups and container.name and self._groups.freeze(container.name, False)):
            self._signal_others(container, signal.SIGCONT)
            self.signal(container, signal.SIGCONT)
        if container.pidfd >= 0:
            self._unwatch(container)

    def is_frozen(self, container: Container) -> bool:
        return bool(self._groups and container.name and self._groups.events(container.name)[1])

    def _signal_others(self, container: Container, number: int) -> None:
        if container.pidfd >= 0 and not container.name:
            self._sweep.signal_others(container, number)

    # Kill

    def kill(self, container: Container) -> bool:
        """SIGKILL to the whole tree. True: nothing of it lives any more.

        False: it is watched, look again when `take_events` or `reap_orphans` names it; and in any case call again
        after a while, since it may fork faster than one call may take.
        """
        if container.name and not container.is_child:
            self._sweep.members(container)  # who left the cgroup is not ours: from now on it is known
        if self._is_gone(container):
            return True
        # By the kernel, all of the group in one step. At the cgroup level too: pam_systemd(8), run by root's su or
        # sudo, moves a process into a cgroup of its own.
        if container.pidfd >= 0:
            self._remember(container)
            # PermissionError: nobody in it is still of our user. They show as survivors.
            with suppress(PermissionError):
                signals.signal_job(container.pidfd, container.pid, signal.SIGKILL, is_child=container.is_child)
        if self._groups and container.name:
            self._groups.kill(container.name)
        if not (container.name and self._sweep.is_empty(container)):
            self._sweep.kill(container)
        is_gone = self._is_gone(container)
        if not is_gone:
            self.watch(container)
        return is_gone

    def _is_gone(self, container: Container) -> bool:
        is_empty = self.is_empty(container)
        return not (container.is_child and self._orphans.claim(container)) and is_empty

    def is_empty(self, container: Container) -> bool:
        """Whether no process of the job lives; zombies do not."""
        if self._groups and container.name and self._groups.events(container.name)[0]:
            return False
        return not self._is_joining(container) and self._sweep.is_empty(container)

    def _is_joining(self, container: Container) -> bool:
        """Whether the leader lives, if it is not in its group: a spawner that cannot have it born there moves it."""
        return bool(container.name) and container.is_child and container.pidfd >= 0 and not self.has_exited(container)

    def survivors(self, container: Container) -> list[Survivor]:
        """What lives in spite of a kill, with what it waits in."""
        return [survivor(one) for one in self._members(container)]

    def doubtful(self, container: Container) -> list[Survivor]:
        """What lives and may be the job's or another's, so that it is left alone until the last of them ends."""
        return [survivor(one) for one in self._orphans.maybe_of(container)]

    def _members(self, container: Container) -> list[Process]:
        if not (self._groups and container.name):
            return self._sweep.members(container)
        inside = {one.pid: one for pid in self._groups.pids(container.name) if (one := process(pid)) is not None}
        outside = [] if self._sweep.is_empty(container) else self._sweep.members(container)
        return [one for one in (inside | {one.pid: one for one in outside}).values() if one.is_alive]

    # Events

    def watch(self, container: Container) -> bool:
        """From now on the container is named when it may have become empty. False: nobody tells, so look from time to
        time: a job of an earlier supervisor, without a cgroup."""
        if container.watched:
            return bool(container.name) or container.is_child
        if not (self._groups and container.name):
            container.watched = True
            return container.is_child
        try:
            container.events_fd = self._groups.open_events(container.name)
        except FileNotFoundError:
            return False
        container.watched = True
        os.pread(container.events_fd, 4096, 0)  # what changes after this is an event
        self._watched[container.events_fd] = container
        self._changes.register(container.events_fd, select.EPOLLPRI)
        return True

    def _unwatch(self, container: Container) -> None:
        container.watched = False
        if container.events_fd >= 0:
            self._changes.unregister(container.events_fd)
            del self._watched[container.events_fd]
            os.close(container.events_fd)
            container.events_fd = -1

    def take_events(self) -> list[Container]:
        """The watched containers that became empty, or froze or thawed: look with `is_empty` and `is_frozen`."""
        changed = []
        for fd, _ in self._changes.poll(0):
            container = self._watched[fd]
            try:
                parse_events(os.pread(fd, 4096, 0).decode())
            except OSError:  # ENODEV: the group was removed by somebody else
                self._changes.modify(fd, 0)
            changed.append(container)
        return changed

    def reap_orphans(self) -> list[Container]:
        """After SIGCHLD: reaps dead children that are no leaders. Names the watched containers that may be empty."""
        self._orphans.reap()
        return [container for container in self._orphans.take_reaped() if container.watched]

    # The leader's end

    def has_exited(self, container: Container) -> bool:
        """Whether the leader, our child, has exited; it is asked for until it has."""
        container.has_exited = container.has_exited or signals.has_exited(container.pid)
        return container.has_exited

    def take_exit(self, container: Container) -> Exit | None:
        """Reaps the leader, our child: `kill` first, since till then its number is safely the job's. None: it lives."""
        ended = signals.take_exit(container.pid)
        if ended is not None:
            self.leader_gone(container)
        return ended

    def leader_gone(self, container: Container) -> None:
        """The leader is reaped, by whomever; its pidfd is not used any more."""
        self._orphans.drop_leader(container)
        container.pidfd = -1

    # Cleanup

    def usage(self, container: Container, *, oom_kills: bool = True) -> Usage:
        """What the whole tree has used up to now; all None without a cgroup, where wait4(2) tells the leader's.
        `oom_kills`: these too, which cost a file more. Raises OSError."""
        return self._groups.usage(container.name, oom_kills) if self._groups and container.name else Usage()

    def remove(self, container: Container) -> bool:
        """Lets go of the container, also of one whose spawn failed. False: its group could not be removed yet, being
        not empty; `tidy` does it later."""
        self._unwatch(container)
        self._close_cgroup_fd(container)
        self._orphans.starting.pop(container.number, None)  # of one whose spawn failed
        if self._containers.get(container.mark) is container:
            del self._containers[container.mark]
            self._by_name.pop(container.name, None)
        if self._sweep.leaders.get(container.pid) is container:
            del self._sweep.leaders[container.pid]
        if self._groups is None or not container.name or self._groups.remove(container.name):
            return True
        self._keep_leftover(container.name)
        return False

    def _keep_leftover(self, name: str) -> None:
        if name not in self._leftovers:
            self._leftovers.append(name)

    def tidy(self) -> int:
        """Kills and removes what `remove` could not. The number of groups that are still left."""
        if self._groups:
            for name in self._leftovers[:]:
                self._groups.kill(name)
                if self._groups.remove(name):
                    self._leftovers.remove(name)
        return len(self._leftovers)

    def close(self) -> None:
        """Before the process ends. The base goes too if no job is in it."""
        self._changes.close()
        if self._groups:
            with suppress(OSError):  # jobs run on in it, for the next supervisor
                os.rmdir(self._groups.base.path)
            self._groups.close()

    def _close_cgroup_fd(self, container: Container) -> None:
        if container.cgroup_fd >= 0:
            os.close(container.cgroup_fd)
            container.cgroup_fd = -1
