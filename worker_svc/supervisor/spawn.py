"""From a launch plan to a running process, in a few threads, since exec from a dead file system hangs."""

from __future__ import annotations

import errno
import os
import queue
import stat
import subprocess
import threading
from collections.abc import Callable
from typing import Any, Final, NamedTuple

SPAWNER_THREADS: Final = 2
_PATH_FALLBACK: Final = "/usr/local/bin:/usr/bin:/bin"
# execve(2) reads this much of a script to find its interpreter (BINPRM_BUF_SIZE).
_SHEBANG_MAX_BYTES: Final = 256


class LaunchPlan(NamedTuple):
    argv: list[str]
    env: dict[str, str]
    cwd: str
    stdin: bytes
    stdout_path: str
    stderr_path: str
    """Empty: into the file of standard output."""


class Spawned(NamedTuple):
    pid: int
    pidfd: int
    start_ticks: int


class SpawnFailed(Exception):
    """The process could not be started; nothing of it is left. The text names the field and the remedy."""


class Spawner:
    """Runs `spawn` in threads; `done` is called in such a thread with the token and what came of it."""

    def __init__(self, done: Callable[[Any, Spawned | SpawnFailed], None]) -> None:
        self._done = done
        self._plans: queue.SimpleQueue[tuple[Any, LaunchPlan]] = queue.SimpleQueue()
        for number in range(SPAWNER_THREADS):
            threading.Thread(target=self._work, name=f"spawner-{number}", daemon=True).start()

    def submit(self, token: object, plan: LaunchPlan) -> None:
        self._plans.put((token, plan))

    def _work(self) -> None:
        while True:
            token, plan = self._plans.get()
            result: Spawned | SpawnFailed
            try:
                result = spawn(plan)
            except SpawnFailed as failure:
                result = failure
            except Exception as error:  # a fault of ours must end one job, not the thread that starts all others
                result = SpawnFailed(f"the supervisor could not start it: {error!r}")
            self._done(token, result)


def spawn(plan: LaunchPlan) -> Spawned:
    """Starts the process: in a session of its own, its output appended to its files. Raises SpawnFailed."""
    executable = _find_executable(plan)
    fds: list[int] = []
    made: list[str] = []
    try:
        stdin = _stdin_fd(plan.stdin)
        fds.append(stdin)
        stdout = _create(plan.stdout_path)
        fds.append(stdout)
        made.append(plan.stdout_path)
        stderr = stdout
        if plan.stderr_path:
            stderr = _create(plan.stderr_path)
            fds.append(stderr)
            made.append(plan.stderr_path)
        return _exec(plan, executable, stdin, stdout, stderr)
    except (OSError, SpawnFailed) as error:
        for path in made:
            os.unlink(path)
        if isinstance(error, SpawnFailed):
            raise
        raise SpawnFailed(f"the supervisor could not prepare the job: {error}") from error
    finally:
        for fd in fds:
            os.close(fd)


def _exec(plan: LaunchPlan, executable: str, stdin: int, stdout: int, stderr: int) -> Spawned:
    try:
        # No preexec_fn, so that CPython uses vfork. close_fds is off because every fd of ours is close-on-exec
        # (PEP 446), and walking a thousand of them would cost more than the spawn.
        process = subprocess.Popen(
            plan.argv,
            executable=executable,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cwd=plan.cwd,
            env=plan.env,
            close_fds=False,
            start_new_session=True,
        )
    except OSError as error:
        raise SpawnFailed(_explain(error, executable, plan)) from error
    except ValueError as error:  # what JobSpec.validate lets through and Popen does not, should there be any
        raise SpawnFailed(f"command: {error}") from error
    # The loop reaps the child; a Popen that believes it still runs would reap it behind our back (Popen.__del__).
    process.returncode = 0
    return Spawned(process.pid, os.pidfd_open(process.pid), start_ticks_of(process.pid) or 0)


def _stdin_fd(content: bytes) -> int:
    if not content:
        return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    # A memory file: no reader or writer has to stay around to feed a pipe.
    fd = os.memfd_create("stdin", os.MFD_CLOEXEC)
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _create(path: str) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    return os.open(path, flags, 0o600)


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


def _find_executable(plan: LaunchPlan) -> str:
    command = plan.argv[0]
    if "/" in command:
        return command
    search = plan.env.get("PATH", _PATH_FALLBACK)
    refused = ""
    for folder in search.split(":"):
        # An empty entry is the current directory (execvp(3)), which is the job's.
        candidate = os.path.join(plan.cwd, folder or ".", command)
        try:
            mode = os.stat(candidate).st_mode
        except OSError:  # not there or not reachable: execvp(3) goes on to the next entry too
            continue
        if stat.S_ISREG(mode):
            if os.access(candidate, os.X_OK):
                return candidate
            refused = refused or candidate
    if refused:
        raise SpawnFailed(_not_executable(refused))
    raise SpawnFailed(f"command: {command!r} was not found in the job's PATH ({search})")


def _explain(error: OSError, executable: str, plan: LaunchPlan) -> str:
    cwd_problem = _cwd_problem(plan.cwd)
    if cwd_problem:
        return cwd_problem
    path = os.path.join(plan.cwd, executable)
    try:
        mode = os.stat(path).st_mode
    except OSError as found:
        return f"command: {executable}: {(found.strerror or str(found)).lower()}"
    if stat.S_ISDIR(mode):
        return f"command: {executable} is a directory, not a program"
    if error.errno == errno.EACCES and not os.access(path, os.X_OK):
        return _not_executable(executable)
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
        interpreter = _interpreter(path)
        if interpreter:
            return f"command: {executable}: its interpreter {interpreter!r} cannot be run: {error.strerror}"
    if error.errno == errno.ENOEXEC:
        return (
            f"command: {executable} is not a program for this machine; "
            "a script must begin with #! and its interpreter, or be the path of a command such as bash"
        )
    if error.errno == errno.E2BIG:
        return "args: the arguments and the environment together are too long for this machine"
    return f"command: {executable}: {error.strerror}"


def _cwd_problem(cwd: str) -> str:
    try:
        if not stat.S_ISDIR(os.stat(cwd).st_mode):
            return f"cwd: {cwd} is not a directory"
    except OSError as error:
        return f"cwd: {cwd}: {(error.strerror or str(error)).lower()}"
    return "" if os.access(cwd, os.X_OK) else f"cwd: {cwd}: permission denied"


def _not_executable(path: str) -> str:
    return f"command: {path} is not executable: chmod +x it, or make it the path of a command such as bash"


def _interpreter(path: str) -> str:
    try:
        with open(path, "rb") as file:
            head = file.read(_SHEBANG_MAX_BYTES)
    except OSError:  # unreadable: then it has no interpreter that we could name
        return ""
    words = head.partition(b"\n")[0][2:].split(maxsplit=1)
    return os.fsdecode(words[0]) if head.startswith(b"#!") and words else ""
