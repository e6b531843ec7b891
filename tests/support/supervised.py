"""What several tests of the supervisor share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.support.workers import (
    SupervisorProcess,
)

IS_ROOT = os.geteuid() == 0


def with_slots(state: Path, slots: int, queue_length: int = 100) -> SupervisorProcess:
    return SupervisorProcess(state, slots=slots, queue_length=queue_length)


def with_code(tmp_path: Path, code: str) -> SupervisorProcess:
    """A supervisor that runs this first."""
    (tmp_path / "first.py").write_text(
        f"import runpy, sys, time\n{code}\n"
        "sys.argv = ['supervisor', *sys.argv[sys.argv.index('worker_svc.supervisor') + 1:]]\n"
        "runpy.run_module('worker_svc.supervisor', run_name='__main__', alter_sys=True)\n"
    )
    supervisor = SupervisorProcess(tmp_path / "state", keep_age_s=3600.0)
    supervisor.run_as = [sys.executable, "-S", str(tmp_path / "first.py")]
    return supervisor
