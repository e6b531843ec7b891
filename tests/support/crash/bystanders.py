"""Processes of our own user that have nothing to do with any job: whoever signals one is caught."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.support.crash.reaper import Reaper
from tests.support.programs import state_of
from tests.support.waiting import eventually_sync

# Writes each signal it gets, and by whom it was sent.
_RECORDER: Final = """
import os, signal, sys
numbers = [n for n in signal.valid_signals() if n not in (signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD)]
signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
os.setsid() if sys.argv[2] == "session" else None
with open(sys.argv[1], "a", buffering=1) as record:
    record.write("ready\\n")
    while True:
        got = signal.sigwaitinfo(numbers)
        record.write(f"signal {got.si_signo} from pid {got.si_pid}\\n")
"""
# Forks all the time, so that the numbers of dead processes soon belong to its children; says if one ended by a signal.
_CHURN: Final = """
import os, random, signal, sys, time
pace_s, living = float(sys.argv[2]), set()
with open(sys.argv[1], "a", buffering=1) as record:
    record.write("ready\\n")
    while True:
        pid = os.fork()
        if pid == 0:
            if random.random() < 0.5:
                os.setsid()
            time.sleep(random.uniform(0, 40 * pace_s))
            os._exit(0)
        living.add(pid)
        time.sleep(pace_s)
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if not pid:
                break
            if status:
                record.write(f"signal {os.WTERMSIG(status)} to the child {pid}\\n")
"""


class Bystanders:
    def __init__(self, folder: Path, reaper: Reaper, churn_pace_s: float = 0.0) -> None:
        self._reaper = reaper
        self._records = folder / "bystanders"
        self._records.mkdir()
        self._processes = [self._start(_RECORDER, f"{n}", "session" if n % 2 else "") for n in range(4)]
        if churn_pace_s:
            self._processes.append(self._start(_CHURN, "churn", str(churn_pace_s)))
        for path in self._paths():
            eventually_sync(lambda path=path: path.exists() and path.read_text(), 30)  # type: ignore[misc]

    def _start(self, code: str, name: str, option: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-S", "-E", "-c", code, str(self._records / name), option])
        self._reaper.spare(process.pid)
        return process

    def _paths(self) -> list[Path]:
        return [self._records / Path(process.args[-2]).name for process in self._processes]  # type: ignore[index,arg-type]

    def end(self) -> list[str]:
        """What was done to them."""
        problems = []
        for process, path in zip(self._processes, self._paths(), strict=True):
            if state_of(process.pid) not in ("S", "R", "D"):
                problems.append(f"the bystander {path.name} is {state_of(process.pid) or 'dead'}")
            lines = path.read_text().splitlines()
            problems += [f"the bystander {path.name} got a {line}" for line in lines if line != "ready"]
            os.kill(process.pid, signal.SIGKILL)
            process.wait(30)
        return problems
