"""Starts a process without the C extension: the same promises, slower.

Nothing of Python runs in a forked child: other threads of ours may hold locks that it would wait for (fork(2),
airflow#65942).
* What needs no more than fork, chdir and exec is done by the C code of `subprocess`. Not by its vfork, which would hold
  the GIL until execve returns: on a dead file system that is never (cpython#104372). no_new_privs is an attribute of
  a thread (PR_SET_NO_NEW_PRIVS(2const)) that its children inherit: so a thread of its own takes it, starts the process
  and ends.
* All else is done by launcher.py, a fresh interpreter that becomes the job: it joins the cgroup, carries out the steps
  and executes the program. It is not born in the cgroup, but no code of the job's runs before it is in it.
"""

from __future__ import annotations

import ctypes
import errno
import marshal
import os
import resource
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Final

from worker_svc.job.limits import Limits
from worker_svc.linux.syscalls import memory_file
from worker_svc.linux.threads import start_thread
from worker_svc.supervisor.spawn.explain import cwd_error, explain, explain_exec
from worker_svc.supervisor.spawn.plan import (
    Attempt,
    JobFds,
    LaunchPlan,
    Spawned,
    SpawnFailed,
    candidates_of,
    start_ticks_of,
)
from worker_svc.supervisor.spawn.steps import RLIMITS, Op, Place, Program

_PR_SET_NO_NEW_PRIVS: Final = 38
# include/linux/sched.h, in the flags of proc_pid_stat(5): forked and not yet executed.
_PF_FORKNOEXEC: Final = 0x40
_HANGS_AFTER_S: Final = 0.1
_LAUNCHER: Final = os.path.join(os.path.dirname(__file__), "launcher.py")
_prctl: Final = ctypes.CDLL(None, use_errno=True).prctl
_prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)
# subprocess resets these itself.
_SIGNALS: Final = tuple(sorted(map(int, signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ})))

# The switch that the documentation of subprocess names; see above.
setattr(subprocess, "_USE_VFORK", False)  # noqa: B010 - declared final


def _set(option: int) -> None:
    if _prctl(option, 1, 0, 0, 0) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def start(plan: LaunchPlan, program: Program, files: JobFds, attempt: Attempt) -> Spawned:
    """Raises SpawnFailed; then no process is left."""
    # Ignored signals are inherited through execve, and subprocess leaves all but a few as they are.
    if program.is_plain and plan.cgroup_fd < 0 and files.program < 0 and not any(map(_is_ignored, _SIGNALS)):
        return _start_plain(plan, program, files, attempt)
    return _start_by_launcher(plan, program, files, attempt)


def _is_ignored(number: int) -> bool:
    return signal.getsignal(number) is signal.SIG_IGN


def _spawned(pid: int, pidfd: int) -> Spawned:
    return Spawned(pid, pidfd, start_ticks_of(pid) or 0)


def _start_plain(plan: LaunchPlan, program: Program, files: JobFds, attempt: Attempt) -> Spawned:
    candidates = candidates_of(plan)
    wants_no_new_privs = any(op == Op.NO_NEW_PRIVS for op, *_ in program.steps)
    came: list[int | BaseException] = []

    def run() -> None:
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            if wants_no_new_privs:
                _set(_PR_SET_NO_NEW_PRIVS)
            came.append(_popen_first(plan, program, files, candidates))
        except BaseException as error:  # carried over to the thread that waits
            came.append(error)

    try:
        thread = start_thread(run, "fork")
    except RuntimeError as error:
        raise SpawnFailed("no thread could be made to start it: a limit on their number is reached") from error
    _wait_for(thread, attempt)
    pid = came[0]
    if isinstance(pid, BaseException):
        raise pid
    if attempt.is_killed and _never_executed(pid):
        os.waitpid(pid, 0)
        raise SpawnFailed(explain(plan, program, Place.KILLED, signal.SIGKILL, candidates, 0))
    try:
        pidfd = os.pidfd_open(pid)
        _put_back(pid, program.inherited)
    except OSError:
        # No fd is free. It is our child and not reaped: its number is still its own.
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    return _spawned(pid, pidfd)


def _wait_for(thread: threading.Thread, attempt: Attempt) -> None:
    """For the end of a start, which may hang: then its process is looked for, so that it can be given up."""
    thread.join(_HANGS_AFTER_S)
    held = 0
    while thread.is_alive():
        for pid in _children_of_thread(thread):
            if pid != held:  # each candidate that is tried is another
                _drop(attempt)
                with suppress(OSError):  # it has failed meanwhile; or no fd is free
                    attempt.put(os.pidfd_open(pid))
                    held = pid
        thread.join(_HANGS_AFTER_S)
    _drop(attempt)


def _drop(attempt: Attempt) -> None:
    pidfd = attempt.take()
    if pidfd >= 0:
        os.close(pidfd)


def _children_of_thread(thread: threading.Thread) -> list[int]:
    try:
        with open(f"/proc/self/task/{thread.native_id}/children", encoding="ascii") as file:
            return [int(pid) for pid in file.read().split()]
    except OSError:
        return []


def _never_executed(pid: int) -> bool:
    """Whether our child was killed between fork and execve."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        flags = int(file.read().rpartition(b")")[2].split()[6])
    return bool(flags & _PF_FORKNOEXEC)


def _put_back(pid: int, inherited: Limits) -> None:
    """From outside, a moment after the start: what a job of the native spawner has from the beginning."""
    for name, (soft, _) in inherited.get("rlimits", {}).items():
        number = RLIMITS[name]
        resource.prlimit(pid, number, (soft, resource.getrlimit(number)[1]))
    if "oom_score_adj" in inherited:
        with open(f"/proc/{pid}/oom_score_adj", "w", encoding="ascii") as file:
            file.write(str(inherited["oom_score_adj"]))


def _popen_first(plan: LaunchPlan, program: Program, files: JobFds, candidates: list[str]) -> int:
    """As execvp(3): the first that is there and may be run. Others are left out before: each would cost a fork."""
    last = at = 0
    there = [index for index, path in enumerate(candidates) if len(candidates) == 1 or os.access(path, os.X_OK)]
    for index in there or range(len(candidates)):
        try:
            process = subprocess.Popen(
                plan.argv,
                executable=candidates[index],
                stdin=files.stdin,
                stdout=files.stdout,
                stderr=files.stderr,
                cwd=plan.cwd or "/",
                env=program.env,
                start_new_session=True,
            )
        except OSError as error:
            last = error.errno or errno.EIO
            at = index
            if last not in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
                break
        except ValueError as error:  # a NUL, should JobSpec.validate let one through
            raise SpawnFailed(f"command: {error}") from error
        else:
            # The loop reaps the child; a Popen that believes it still runs would reap it behind our back.
            process.returncode = 0
            return process.pid
    problem = cwd_error(plan.cwd or "/")
    if problem:
        at_cwd = next(index for index, step in enumerate(program.steps) if step[0] == Op.CHDIR)
        raise SpawnFailed(explain(plan, program, at_cwd, problem, candidates, at))
    raise SpawnFailed(explain_exec(plan, last, candidates, at))


def _start_by_launcher(plan: LaunchPlan, program: Program, files: JobFds, attempt: Attempt) -> Spawned:
    candidates = candidates_of(plan)
    encode = os.fsencode
    order = {
        "candidates": [encode(path) for path in candidates],
        "argv": [encode(text) for text in plan.argv],
        "env": [encode(f"{key}={value}") for key, value in program.env.items()],
        "steps": program.steps,
        "cgroup_fd": plan.cgroup_fd,
        "exec_fd": files.program,
    }
    reader, writer = os.pipe2(os.O_CLOEXEC)
    order_fd = -1
    try:
        try:
            order_fd = memory_file("order", marshal.dumps(order))
            pid = _start_launcher(plan, files, order_fd, writer)
        finally:
            os.close(writer)
            if order_fd >= 0:
                os.close(order_fd)
        pidfd = os.pidfd_open(pid)
        attempt.put(pidfd)
        answer = _read_all(reader)
    finally:
        os.close(reader)
    attempt.take()
    if answer == b"E":  # it said that it executes, and then nothing, not even of an error: it did
        return _spawned(pid, pidfd)
    os.close(pidfd)
    _, status = os.waitpid(pid, 0)
    _, _, numbers = answer.partition(b"{")
    if numbers:
        failed, number, tried = (int(word) for word in numbers.split(b" "))
        raise SpawnFailed(explain(plan, program, failed, number, candidates, tried))
    if os.WIFSIGNALED(status):
        raise SpawnFailed(explain(plan, program, Place.KILLED, os.WTERMSIG(status), candidates, 0))
    raise SpawnFailed(f"the supervisor's launcher failed with exit status {os.waitstatus_to_exitcode(status)}")


def _start_launcher(plan: LaunchPlan, files: JobFds, order_fd: int, writer: int) -> int:
    passed_on = [fd for fd in (order_fd, writer, plan.cgroup_fd, files.program) if fd >= 0]
    try:
        process = subprocess.Popen(
            # Isolated, without site-packages: nothing that the environment or a user could slip in.
            [sys.executable, "-I", "-S", _LAUNCHER, str(order_fd), str(writer)],
            stdin=files.stdin,
            stdout=files.stdout,
            stderr=files.stderr,
            cwd="/",
            pass_fds=passed_on,
            start_new_session=True,
        )
    except OSError as error:
        raise SpawnFailed(f"the supervisor's launcher could not be started: {error}") from error
    process.returncode = 0  # as above
    return process.pid


def _read_all(fd: int) -> bytes:
    parts = []
    while part := os.read(fd, 4096):
        parts.append(part)
    return b"".join(parts)
