"""What to start, what came of it, and the files that a job is given."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress
from typing import Final, NamedTuple

from worker_svc.job import error_message, name_of
from worker_svc.job.identity import Identity, Sandbox
from worker_svc.job.limits import Limits
from worker_svc.job.spec import CheckedFile, OutputVia
from worker_svc.linux.search_path import PATH_FALLBACK, search_folders
from worker_svc.linux.syscalls import memory_file
from worker_svc.supervisor.journal import note

_NO_PIDFD: Final = b"\xff\xff\xff\xff"
# The sticky bit means nothing to a pipe: it tells the pipes of a job's output from all others. The second mode is that
# of standard error, where that is separate.
PIPE_MODES: Final = (0o1600, 0o1700)


class LaunchPlan(NamedTuple):
    argv: list[str]
    env: dict[str, str]
    cwd: str
    stdin: bytes
    stdout_path: str
    stderr_path: str
    """Empty: into the file of standard output."""
    limits: Limits = {}  # noqa: RUF012 - never mutated; NamedTuple has no default_factory
    inherited: Limits = {}  # noqa: RUF012
    """What the supervisor changed for itself and a job gets back, unless `limits` says otherwise."""
    identity: Identity = Identity()
    sandbox: Sandbox = Sandbox()
    hidden: str = ""
    """A directory that is out of reach under any sandbox; empty: none."""
    cgroup_fd: int = -1
    """The directory of the cgroup v2 group to start in; stays the caller's. -1: the supervisor's own group."""
    user_env: tuple[str, ...] = ()
    """Which of HOME, USER, LOGNAME and SHELL to set from the user database where `identity.user` is given."""
    checked: tuple[CheckedFile, ...] = ()
    """What a policy has decided about: these files are run, or none."""
    output_via: OutputVia = OutputVia.FILE

    def __repr__(self) -> str:
        return f"LaunchPlan({name_of(self.argv[0])!r})"


class Spawned(NamedTuple):
    pid: int
    pidfd: int
    start_ticks: int
    outputs: tuple[tuple[int, int], ...] = ()
    """Where output comes through pipes: of each, its reading end and the file it is for. The caller's."""


class SpawnFailed(Exception):
    """The process could not be started; nothing of it is left. The text names the field and the remedy."""

    def __init__(self, text: str) -> None:
        super().__init__(error_message(text))


class Attempt:
    """One start under way, which another thread can give up: it may hang in a file system for ever."""

    def __init__(self) -> None:
        self.slot = bytearray(_NO_PIDFD + bytes(4))
        """Two ints: the pidfd of the process, -1 while there is none (in the native spawner the child writes it); and
        not 0 once it is being killed."""
        self._lock = threading.Lock()

    def put(self, pidfd: int) -> None:
        self.slot[:4] = pidfd.to_bytes(4, sys.byteorder, signed=True)

    def take(self) -> int:
        """The pidfd, from now on the caller's."""
        with self._lock:
            pidfd = self._pidfd
            self.put(-1)
        return pidfd

    def kill(self) -> bool:
        """Kills the process, whether it has executed its program or not. False: there is none (yet, or any more)."""
        with self._lock:  # while it is held the fd cannot be closed and come to be another's
            pidfd = self._pidfd
            if pidfd < 0:
                return False
            self.slot[4] = 1  # first: then it is there to see for who finds the process dead
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            except ProcessLookupError:
                return False
            return True

    @property
    def is_killed(self) -> bool:
        return self.slot[4] != 0

    @property
    def _pidfd(self) -> int:
        return int.from_bytes(self.slot[:4], sys.byteorder, signed=True)


class JobFds:
    """The fds for a job's 0, 1 and 2, made anew. Raises OSError or SpawnFailed and then leaves nothing behind."""

    def __init__(self, plan: LaunchPlan, owner: tuple[int, int] | None = None) -> None:
        """`owner`: user and group that the job runs as, if that is not us. What is its own it can open anew, as
        /dev/stderr."""
        self._made: list[str] = []
        self._fds: list[int] = []
        self._owner = owner
        self.outputs: list[tuple[int, int]] = []
        self.program = -1
        """The program itself, where it was checked; -1: it goes by its name."""
        try:
            for file in plan.checked:
                if file.field == "cwd":  # the child looks, once it is there
                    continue
                fd = self._keep(_open_checked(file))
                self.program = fd if file.field == "command" else self.program
            self.stdin = self._keep(_stdin_fd(plan.stdin))
            create = self._create_pipe if plan.output_via is OutputVia.PIPE else self._create
            self.stdout = self.stderr = create(plan.stdout_path)
            if plan.stderr_path:
                self.stderr = create(plan.stderr_path)
        except BaseException:
            self.close()
            self.unlink()
            raise

    def _keep(self, fd: int) -> int:
        self._fds.append(fd)
        return fd

    def _create(self, path: str) -> int:
        fd = self._open(path, os.O_APPEND)
        self._give_to_job(fd)
        return fd

    def _open(self, path: str, flag: int = 0) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW | flag
        try:
            fd = self._keep(os.open(path, flags, 0o600))
        except FileNotFoundError:  # somebody removed the folder: the next job needs it no less
            with suppress(FileExistsError):
                os.mkdir(os.path.dirname(path), 0o700)
            note("output.folder_made_anew", folder=os.path.dirname(path))
            fd = self._keep(os.open(path, flags, 0o600))
        self._made.append(path)
        return fd

    def _create_pipe(self, path: str) -> int:
        reader, writer = map(self._keep, os.pipe2(os.O_CLOEXEC))
        self._give_to_job(writer)
        os.fchmod(writer, PIPE_MODES[len(self.outputs)])
        self.outputs.append((reader, self._open(path)))
        # For reading too, so that it lives as long as the job does, whatever becomes of us.
        both = os.open(f"/proc/self/fd/{writer}", os.O_RDWR | os.O_CLOEXEC)
        self._fds.remove(writer)
        os.close(writer)
        return self._keep(both)

    def _give_to_job(self, fd: int) -> None:
        if self._owner is None:
            return
        try:
            os.fchown(fd, *self._owner)
        except PermissionError as error:
            text = "identity.user: running as another user needs root (CAP_SETUID, CAP_SETGID and CAP_CHOWN)"
            raise SpawnFailed(text) from error

    def hand_over(self) -> tuple[tuple[int, int], ...]:
        """The fds of `outputs`, which are the caller's from now on."""
        for pair in self.outputs:
            self._fds = [fd for fd in self._fds if fd not in pair]
        return tuple(self.outputs)

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())

    def unlink(self) -> None:
        for path in self._made:
            with suppress(FileNotFoundError):
                os.unlink(path)


def _open_checked(file: CheckedFile) -> int:
    """Raises SpawnFailed if its path leads to another file by now, or it was changed."""
    try:
        # O_PATH: needs no permission to read; the kernel checks that to execute when it does.
        fd = os.open(file.path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise SpawnFailed(f"{file.field}: {name_of(file.path)}: {(error.strerror or str(error)).lower()}") from error
    found = os.fstat(fd)
    if (found.st_dev, found.st_ino, found.st_ctime_ns) == file[2:]:
        return fd
    os.close(fd)
    raise SpawnFailed(
        f"{file.field}: {name_of(file.path)} was changed or replaced after the worker's policy allowed it: "
        "start the job again"
    )


def _stdin_fd(content: bytes) -> int:
    if not content:
        return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    # A memory file: no reader or writer has to stay around to feed a pipe.
    return memory_file("stdin", content)


def candidates_of(plan: LaunchPlan) -> list[str]:
    """The paths to try in turn, as execvp(3) does."""
    command = next((file.path for file in plan.checked if file.field == "command"), plan.argv[0])
    if "/" in command:
        return [command]
    search = plan.env.get("PATH", PATH_FALLBACK)
    return [os.path.join(plan.cwd, folder, command) for folder in search_folders(search)]


def start_ticks_of(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; with boot id and pid its identity. None: no such process.

    Field 22 of /proc/PID/stat (proc_pid_stat(5)); the name in field 2 can hold spaces and brackets.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(fields[19])
