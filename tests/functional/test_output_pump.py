"""The pump's own bookkeeping, with both implementations."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.support.workers import ROOT
from worker_svc.supervisor.spawn import IMPLEMENTATION, NATIVE, PYTHON


@pytest.mark.parametrize("implementation", [NATIVE, PYTHON])
def test_a_pipe_that_a_child_holds_for_a_moment_is_reported_no_more(implementation: str, tmp_path: Path) -> None:
    """Between clone and exec, children of the spawner have all fds of the supervisor: to close one is not enough to
    take it out of epoll, and its event would lead to what is freed by then: a crash, once in thousands of jobs.
    """
    if implementation == NATIVE != IMPLEMENTATION:
        pytest.skip("the C extension is not built")
    module = "_native" if implementation == NATIVE else "pump_fallback"
    code = f"""
        import os, sys
        from worker_svc.supervisor.spawn import {module} as pump
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        pump.pump_start(writer)
        def watched():
            found = set()
            for fd in os.listdir("/proc/self/fd"):
                try:
                    if "eventpoll" in os.readlink(f"/proc/self/fd/{{fd}}"):
                        lines = open(f"/proc/self/fdinfo/{{fd}}").read().splitlines()
                        found |= {{int(line.split()[1]) for line in lines if line.startswith("tfd:")}}
                except FileNotFoundError:
                    pass
            return found
        before = watched()
        for number in range(300):
            ours, theirs = os.pipe()
            os.set_blocking(ours, False)
            childs = os.dup(ours)
            out = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            handle = pump.pump_add(number, ours, out, 0, 0, 4096, False)
            os.write(theirs, b"text")
            os.close(theirs)
            assert pump.pump_finish(handle)[0] == 4
            assert watched() <= before, (number, watched(), before)
            os.close(childs)
        print("ok")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "out")],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=50, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("ok\n", "")
