"""From the step that failed and its errno to a text for the user: the field, what is wrong, the remedy."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
from typing import Final

from worker_svc.job import name_of
from worker_svc.supervisor.spawn.plan import LaunchPlan
from worker_svc.supervisor.spawn.scripts import file_problem, head_of, interpreter_of, script_problem
from worker_svc.supervisor.spawn.steps import LANDLOCK_ABI_MIN, Op, Place, Program, has_landlock

_MISSING: Final = (errno.ENOENT, errno.ENOTDIR, errno.EACCES)


def explain(plan: LaunchPlan, program: Program, failed: int, number: int, candidates: list[str], tried: int) -> str:
    """failed: the index of a step, or a Place; number: the errno, or the signal for Place.KILLED."""
    if failed >= 0:
        return f"{program.fields[failed]}: {_step_problem(plan, program, failed, number)}"
    if failed == Place.EXEC:
        return explain_exec(plan, number, candidates, tried)
    if failed == Place.KILLED:
        return f"command: the process was ended before it could run its program (signal {_signal(number)})"
    if failed == Place.CGROUP or (failed == Place.CLONE and plan.cgroup_fd >= 0 and number != errno.EAGAIN):
        return f"the job's cgroup could not be joined: {os.strerror(number)}"
    if failed == Place.CLONE and number == errno.EAGAIN:
        return "no process could be made: a limit on their number is reached (pids.max, RLIMIT_NPROC or kernel.pid_max)"
    what = {
        Place.CLONE: "no process could be made",
        Place.SESSION: "setsid failed",
        Place.FDS: "its fds could not be set",
    }
    return f"the supervisor could not start it: {what.get(Place(failed), failed)}: {os.strerror(number)}"


def _step_problem(plan: LaunchPlan, program: Program, failed: int, number: int) -> str:
    op, a, *_ = program.steps[failed]
    words = os.strerror(number)
    is_refused = number in (errno.EPERM, errno.EACCES)
    if op == Op.CHDIR:
        return _cwd_problem(plan, number)
    if op == Op.RLIMIT and number == errno.EPERM:
        return f"cannot be raised above the hard limit here, {resource.getrlimit(a)[1]}: that needs CAP_SYS_RESOURCE"
    if op == Op.NICE and is_refused:
        return f"{a} is below the supervisor's own: that needs CAP_SYS_NICE or RLIMIT_NICE"
    if op == Op.WRITE and is_refused:
        return "cannot be lowered without CAP_SYS_RESOURCE"
    if op == Op.AFFINITY and number == errno.EINVAL:
        usable = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        return f"not all of these CPUs can be used here; the supervisor's are {usable}"
    if op in (Op.UNSHARE, Op.PRIVATE_TMP, Op.LOOPBACK) and (is_refused or number in (errno.ENOSPC, errno.EINVAL)):
        return f"needs CAP_SYS_ADMIN, or user namespaces for unprivileged users and no other user to run as ({words})"
    if op in (Op.GROUPS, Op.GID, Op.UID) and number == errno.EPERM:
        return "running as another user or group needs root (CAP_SETUID and CAP_SETGID)"
    if op == Op.LANDLOCK and number in (errno.ENOSYS, errno.EOPNOTSUPP):
        return f"needs Landlock with ABI {LANDLOCK_ABI_MIN} (Linux 6.2), which this kernel does not offer"
    if op == Op.LANDLOCK_RULE and number == errno.ELOOP:
        return "is, or goes by, a symbolic link below a path that jobs may change: one of them could have made it"
    if op == Op.LANDLOCK_RULE:
        return words.lower()
    if op == Op.LANDLOCK_ENFORCE and number == errno.EPERM:
        return "Landlock needs identity.no_new_privs, or CAP_SYS_ADMIN"
    return f"could not be applied: {words}"


def explain_exec(plan: LaunchPlan, number: int, candidates: list[str], tried: int) -> str:
    command = plan.argv[0]
    if number == errno.E2BIG:
        return "args: the arguments and the environment together are too long for this machine"
    if number == errno.EAGAIN:
        return "limits.rlimits.nproc: the user has that many processes already"
    if number == errno.ENOMEM:
        return "limits.rlimits: there is not enough memory to load the program: raise as, data or stack"
    executable = candidates[tried]
    if "/" not in command:
        # What was refused, or is there and yet "not found" (then its interpreter is missing).
        there = [path for path in candidates if _is_file(path)]
        if not there:
            found = f"command: {name_of(command)!r} was not found in the job's PATH: give its whole path, or set PATH"
            return found + _sandbox_hint(plan, number)
        if number in _MISSING and executable not in there:
            executable = there[0]
    path, executable = os.path.join(plan.cwd, executable), name_of(executable)
    why = file_problem(path, number) or script_problem(path, plan.cwd, number)
    if why:
        sep = " " if why.startswith("is ") else ": "
        return f"command: {executable}{sep}{why}{_sandbox_hint(plan, number) if sep == ': ' else ''}"
    head = head_of(path)
    either = f" or its interpreter {name_of(interpreter_of(head)[0])!r}" if head.startswith(b"#!") else ""
    return f"command: {executable}{either}: {os.strerror(number).lower()}{_sandbox_hint(plan, number)}"


def _sandbox_hint(plan: LaunchPlan, number: int) -> str:
    if number not in _MISSING:
        return ""
    if has_landlock(plan) and number == errno.EACCES:
        return " (the sandbox's paths must include the program and its libraries)"
    if plan.sandbox.private_tmp:
        return " (with sandbox.private_tmp, /tmp is empty)"
    return f" (as user {plan.identity.user})" if plan.identity.user else ""


def _cwd_problem(plan: LaunchPlan, number: int) -> str:
    if number == errno.ENOTDIR:
        return f"{name_of(plan.cwd)} is not a directory"
    if number == errno.ESTALE:
        return f"{name_of(plan.cwd)} was moved or replaced after the worker's policy allowed it: start the job again"
    return f"{name_of(plan.cwd)}: {os.strerror(number).lower()}{_sandbox_hint(plan, number)}"


def cwd_error(cwd: str) -> int:
    """Why a process cannot be there, as an errno; 0: it can."""
    try:
        if not stat.S_ISDIR(os.stat(cwd).st_mode):
            return errno.ENOTDIR
    except OSError as error:
        return error.errno or errno.EIO
    return 0 if os.access(cwd, os.X_OK) else errno.EACCES


def _is_file(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:  # not there or not reachable: execvp(3) goes on to the next one too
        return False


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
