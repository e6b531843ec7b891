"""One cgroup per job below the base: made, limited, killed, awaited, counted, removed.

Files and rules: Documentation/admin-guide/cgroup-v2.rst. Everything is relative to an open fd of the base.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from typing import Final, NamedTuple

from worker_svc.job.limits import BY_NAME, Limits
from worker_svc.linux.processes import group_path_of
from worker_svc.supervisor.containment.hierarchy import Base
from worker_svc.supervisor.containment.ownership import claim
from worker_svc.supervisor.containment.signals import signal_verified

NAME_PREFIX: Final = "job-"
# No such group, or (ENODEV) it was removed while its file was open.
_GONE: Final = (errno.ENOENT, errno.ENODEV)
_CPU_PERIOD_US: Final = 100_000


class Unenforceable(Exception):
    def __init__(self, field: str, missing: str) -> None:
        super().__init__(missing)
        self.field = field
        self.missing = missing


class Usage(NamedTuple):
    """What the whole tree has used, its dead processes included; None: not known."""

    cpu_ns: int | None = None
    peak_memory_bytes: int | None = None
    oom_kills: int | None = None


class Groups:
    def __init__(self, base: Base) -> None:
        self.base = base
        self.has_kill = True
        """Whether there is cgroup.kill (Linux 5.14)."""
        self._fd = base.fd
        self._enabled: set[str] = set()
        self._look_what_is_enabled()

    def _look_what_is_enabled(self) -> None:
        self._enabled = set((self._read("cgroup.subtree_control") or "").split())
        if "memory" in self.base.controllers:
            self._enable("memory")  # for everybody's peak and OOM kills; the others when a job first asks for them

    def close(self) -> None:
        os.close(self._fd)

    def names(self) -> list[str]:
        return [entry for entry in os.listdir(self.base.path) if entry.startswith(NAME_PREFIX)]

    def make(self, name: str, limits: Limits) -> None:
        """Makes the group with the limits that it can hold, or nothing. Raises FileExistsError, another OSError,
        Unenforceable."""
        asked = {name: value for name, value in limits.items() if BY_NAME[name].file}
        if not self._exists("cgroup.procs"):  # an operator removed the base
            os.close(self._fd)
            self._fd = claim(self.base.path)
            self._look_what_is_enabled()
        for field in asked:
            missing = self.why_not(field)
            if missing:
                raise Unenforceable(field, missing)
            self._enable(BY_NAME[field].controller, field)
        os.mkdir(name, 0o755, dir_fd=self._fd)
        try:
            for field, value in asked.items():
                self._limit(name, field, value)
            if "memory_max_bytes" in asked:
                # All or nothing: a job of which the kernel took one process would go on in a state nobody planned,
                # and could end with any status. This way its end is an OOM kill and nothing else.
                self._write(f"{name}/memory.oom.group", "1")
        except BaseException:
            os.rmdir(name, dir_fd=self._fd)
            raise

    def why_not(self, field: str) -> str:
        """Why a limit cannot be enforced; empty if it can."""
        limit = BY_NAME[field]
        missing = self.base.missing.get(limit.controller)
        if missing:
            return missing
        if not any(os.access(f"{self.base.path}/{one}", os.F_OK) for one in _alternatives(limit.file)):
            return f"the kernel offers no {limit.file}"
        return ""

    def _enable(self, controller: str, field: str = "") -> None:
        if controller in self._enabled:
            return
        try:
            self._write("cgroup.subtree_control", f"+{controller}")
        except OSError as error:
            if not field:
                return  # accounting is good to have, not asked for
            raise Unenforceable(field, f"the {controller} controller cannot be enabled: {error.strerror}") from error
        self._enabled.add(controller)

    def _limit(self, name: str, field: str, value: float) -> None:
        text = str(value)
        if field == "cpu_max_cores":
            text = f"{max(1000, round(value * _CPU_PERIOD_US))} {_CPU_PERIOD_US}"
        file = BY_NAME[field].file
        file = next((one for one in _alternatives(file) if self._exists(f"{name}/{one}")), file)
        try:
            self._write(f"{name}/{file}", text)
        except OSError as error:
            raise Unenforceable(field, f"{file} refused {text}: {error.strerror}") from error

    def open(self, name: str) -> int:
        return os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._fd)

    def open_events(self, name: str) -> int:
        """For epoll: EPOLLPRI when populated or frozen changed since it was last read."""
        return os.open(f"{name}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._fd)

    def events(self, name: str) -> tuple[bool, bool]:
        """Whether a living process is in the group or below, and whether all of them are frozen."""
        return parse_events(self._read(f"{name}/cgroup.events") or "")

    def kill(self, name: str) -> None:
        """SIGKILL to everything in the group and below. With cgroup.kill that includes what is just being forked."""
        if self.has_kill:
            try:
                self._write(f"{name}/cgroup.kill", "1")
                return
            except OSError as error:
                if error.errno not in _GONE:
                    raise
                if not self._exists(f"{name}/cgroup.procs"):
                    return  # the group itself
                self.has_kill = False
        self._kill_each(name)

    def _kill_each(self, name: str) -> None:
        """Before Linux 5.14. Frozen processes do not fork, and die of a SIGKILL all the same."""
        self.freeze(name, True)
        signalled: set[int] = set()
        for _ in range(100):
            new = {pid for pid in self.pids(name) if pid not in signalled}
            if not new:
                break
            for pid in new:
                try:
                    signal_verified(pid, signal.SIGKILL, lambda pid: self.holds(name, pid))
                except PermissionError:
                    continue  # it changed its user: it shows as a survivor
            signalled |= new
        self.freeze(name, False)

    def holds(self, name: str, pid: int) -> bool:
        """Whether the process is in the group or below."""
        return self.group_of(pid) == name

    def group_of(self, pid: int) -> str:
        """The group below the base that the process is in, itself or below; empty: none."""
        path = group_path_of(pid)
        base = f"{self.base.proc_path}/"
        return path.removeprefix(base).partition("/")[0] if path.startswith(base) else ""

    def pids(self, name: str) -> list[int]:
        """The processes in the group and below; zombies are in none."""
        found = []
        for group in self._tree(name):
            try:
                text = self._read(f"{group}/cgroup.procs")
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:  # a threaded group below: its processes show in its domain
                    raise
                continue
            found += [int(pid) for pid in (text or "").split() if pid != "0"]
        return found

    def freeze(self, name: str, on: bool) -> bool:
        """False: this kernel cannot (before 5.2), or the group is gone."""
        try:
            self._write(f"{name}/cgroup.freeze", "1" if on else "0")
        except OSError as error:
            if error.errno not in _GONE:
                raise
            return False
        return True

    def usage(self, name: str, oom_kills: bool) -> Usage:
        cpu_us = _value(self._read(f"{name}/cpu.stat"), "usage_usec")
        if "memory" not in self._enabled:
            return Usage(None if cpu_us is None else cpu_us * 1000)
        peak = self._read(f"{name}/memory.peak")  # Linux 5.19
        return Usage(
            None if cpu_us is None else cpu_us * 1000,
            int(peak) if peak else None,
            _value(self._read(f"{name}/memory.events"), "oom_kill") if oom_kills else None,
        )

    def remove(self, name: str) -> bool:
        """False: somebody is still in it, if only dying."""
        try:
            os.rmdir(name, dir_fd=self._fd)
        except FileNotFoundError:
            return True
        except OSError:  # EBUSY, as a rule
            return self._remove_nested(name)
        return True

    def _remove_nested(self, name: str) -> bool:
        for group in self._tree(name):
            try:
                os.rmdir(group, dir_fd=self._fd)
            except FileNotFoundError:
                continue
            except OSError:
                return False
        return True

    def _tree(self, name: str) -> Iterator[str]:
        """The groups that the job made below its own, deepest first, then its own."""
        try:
            with os.scandir(f"{self.base.path}/{name}") as entries:
                below = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        except FileNotFoundError:
            return
        for entry in below:
            yield from self._tree(f"{name}/{entry}")
        yield name

    def _exists(self, path: str) -> bool:
        return os.access(path, os.F_OK, dir_fd=self._fd)

    def _read(self, path: str) -> str | None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._fd)
        except FileNotFoundError:
            return None
        try:
            parts = []
            while part := os.read(fd, 64 * 1024):
                parts.append(part)
                if len(part) < 4096 and not path.endswith("procs"):
                    break
            return b"".join(parts).decode()
        except OSError as error:
            if error.errno == errno.ENODEV:  # removed meanwhile
                return None
            raise
        finally:
            os.close(fd)

    def _write(self, path: str, text: str) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=self._fd)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)


def parse_events(text: str) -> tuple[bool, bool]:
    """populated and frozen of cgroup.events; of a group that is gone: not populated."""
    return "populated 1" in text, "frozen 1" in text


def _alternatives(file: str) -> tuple[str, ...]:
    # io.weight is blk-iocost's; with the BFQ scheduler in charge there is its own (block/bfq-cgroup.c).
    return ("io.weight", "io.bfq.weight") if file == "io.weight" else (file,)


def _value(text: str | None, key: str) -> int | None:
    for line in (text or "").splitlines():
        name, _, value = line.partition(" ")
        if name == key:
            return int(value)
    return None
