"""Jobs started without a supervisor: for the tests of the spawners."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from worker_svc.supervisor.spawn import IMPLEMENTATION, NATIVE, LaunchPlan, spawn

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ROOT = Path(__file__).parents[2]
STATUS = ("cat", "/proc/self/status")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may change the user of a process")


def skip_unless_built(implementation: str) -> None:
    if implementation == NATIVE and IMPLEMENTATION != NATIVE:
        pytest.skip("the native spawner is not built: python setup.py build_ext --inplace")


class Ended(NamedTuple):
    exit_code: int
    """As of subprocess: the negative signal number of who was killed."""
    output: str
    pid: int


class Launchpad:
    """Starts jobs by one of the implementations, their output in one directory."""

    def __init__(self, implementation: str, directory: Path) -> None:
        self.implementation = implementation
        self.directory = directory
        self._number = 0

    def plan(self, *argv: str, env: dict[str, str] | None = None, **fields: Any) -> LaunchPlan:
        self._number += 1
        given: dict[str, Any] = {
            "cwd": "/",
            "stdin": b"",
            "stdout_path": str(self.directory / f"out-{self._number}"),
            "stderr_path": "",
        }
        return LaunchPlan(list(argv), {"PATH": PATH} if env is None else env, **(given | fields))

    def run(self, *argv: str, **fields: Any) -> Ended:
        """Runs it to its end. Raises SpawnFailed."""
        return self.run_plan(self.plan(*argv, **fields))

    def run_plan(self, plan: LaunchPlan) -> Ended:
        spawned = spawn(plan, self.implementation)
        os.close(spawned.pidfd)
        _, status = os.waitpid(spawned.pid, 0)
        output = Path(plan.stdout_path).read_text()
        return Ended(os.waitstatus_to_exitcode(status), output, spawned.pid)


def drop_capabilities() -> None:
    """Makes this process, if it is root, one as in a tight container: it may reach every file, and no more."""
    import ctypes

    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH; and CAP_SETFCAP, which only root needs for a user namespace of its own
    kept = 1 << 1 | 1 << 2 | 1 << 31
    for number in range(64):
        if not kept >> number & 1:
            libc.prctl(24, number, 0, 0, 0)  # PR_CAPBSET_DROP: or the next execve of root would give them back
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    sets = (ctypes.c_uint32 * 6)(kept, kept, 0, 0, 0, 0)
    assert libc.syscall(126 if os.uname().machine == "x86_64" else 91, header, sets) == 0  # capset


def refuse_system_calls(*numbers: int) -> None:
    """Makes them fail with ENOSYS in this process and its children, as the seccomp profiles of containers do."""
    import ctypes
    import struct

    load, jump_equal, give = 0x20, 0x15, 0x06
    code = struct.pack("HBBI", load, 0, 0, 0)
    for number in numbers:
        code += struct.pack("HBBI", jump_equal, 0, 1, number)
        code += struct.pack("HBBI", give, 0, 0, 0x00050000 | 38)  # SECCOMP_RET_ERRNO, ENOSYS
    code += struct.pack("HBBI", give, 0, 0, 0x7FFF0000)  # SECCOMP_RET_ALLOW
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(code)
    program = struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer))
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS, which PR_SET_SECCOMP needs
    assert libc.prctl(22, 2, program, 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def cgroup2_root() -> Path | None:
    """Where a cgroup v2 hierarchy is mounted that we may make groups in."""
    for line in Path("/proc/mounts").read_text(errors="surrogateescape").splitlines():
        _, where, kind, *_ = line.split(" ")
        if kind == "cgroup2" and os.access(where, os.W_OK):
            return Path(where)
    return None


def status_of_job(ended: Ended) -> dict[str, str]:
    """What `cat /proc/self/status` printed."""
    return dict(line.split(":\t", 1) for line in ended.output.splitlines() if ":\t" in line)


def build_native(directory: Path, *flags: str) -> Path | str:
    """The extension built with further compiler flags; a string says why that cannot be."""
    import sysconfig

    compiler = shutil.which("cc")
    include = sysconfig.get_path("include")
    if compiler is None:
        return "there is no C compiler"
    if not (Path(include) / "Python.h").exists():
        return f"there is no {include}/Python.h"
    source = Path(sys.modules["worker_svc.supervisor.spawn"].__file__ or "").parent / "_native.c"
    target = directory / "_native.abi3.so"
    command = [compiler, "-shared", "-fPIC", "-std=gnu11", "-DPy_LIMITED_API=0x030B0000", f"-I{include}", *flags]
    done = subprocess.run([*command, "-o", target, source], capture_output=True, text=True, check=False)
    return target if done.returncode == 0 else f"{compiler} failed: {done.stderr.strip()[-500:]}"


def run_apart(code: str, *args: str, **fields: Any) -> str:
    """Runs it in a Python of its own; its output."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *args],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=50, **fields,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return str(done.stdout)
