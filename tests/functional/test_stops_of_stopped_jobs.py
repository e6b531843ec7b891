"""A job that stands still (SIGSTOP) when it is asked to end sees the signal all the same, as with timeout(1).

The grace is longer than any test: a job that did not see it would outlast the test.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.contained import skip_unless
from tests.support.programs import state_of
from tests.support.waiting import eventually_sync
from tests.support.workers import PATIENCE_S, SupervisorProcess, start_fields
from worker_svc.job import JobState, Outcome, OutputPolicy
from worker_svc.supervisor.containment import CGROUP, SUBREAPER

_GRACE_S = 1000.0
_TIDY = "trap 'echo tidied up; exit 5' TERM; echo ready; "
STOPS_ITSELF = ["sh", "-c", _TIDY + "kill -STOP $$; while :; do sleep 0.05; done"]
# What it waits for has a group of its own; before that ends, a shell's trap does not run.
WAITS_FOR_STOPPED = ["sh", "-c", _TIDY + "setsid sh -c 'kill -STOP $$; sleep 0.05'; while :; do sleep 0.05; done"]


def wait_stopped(supervisor: SupervisorProcess, job_id: str) -> int:
    """Until some process of the job stands still. Its leader's pid."""
    pid = supervisor.wait_state(job_id, JobState.RUNNING, JobState.STOPPING).pid

    def some_stopped() -> bool:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return any(state_of(one) == "T" for one in (pid, *map(int, children)))

    eventually_sync(some_stopped, PATIENCE_S, "nothing of it is stopped")
    return pid


@pytest.mark.parametrize("level", [CGROUP, SUBREAPER])
@pytest.mark.parametrize("argv", [STOPS_ITSELF, WAITS_FOR_STOPPED], ids=["itself", "what-it-waits-for"])
@pytest.mark.parametrize("adopted", [False, True])
def test_a_stopped_job_sees_the_stop_signal(tmp_path: Path, level: str, argv: list[str], adopted: bool) -> None:
    skip_unless(level)
    supervisor = SupervisorProcess(tmp_path / "state")
    supervisor.options = ("--containment", level)
    with supervisor:
        supervisor.run("j", argv, stop_grace_s=_GRACE_S)
        wait_stopped(supervisor, "j")
        if adopted:
            supervisor.kill()
            supervisor.start()
        supervisor.client.ask("stop", job_id="j", signal=None, grace_s=None)
        supervisor.wait_finished("j")
        assert supervisor.output("j") == b"ready\ntidied up\n"


def test_a_job_that_an_operator_stopped_in_the_midst_of_its_grace(tmp_path: Path) -> None:
    """Asked again, with a signal."""
    with SupervisorProcess(tmp_path / "state") as supervisor:
        supervisor.run("j", ["sh", "-c", "trap '' INT; " + STOPS_ITSELF[2]], stop_signal=2, stop_grace_s=_GRACE_S)
        pid = wait_stopped(supervisor, "j")
        supervisor.client.ask("stop", job_id="j", signal=None, grace_s=None)
        eventually_sync(lambda: state_of(pid) != "T", PATIENCE_S)
        os.kill(pid, signal.SIGSTOP)
        wait_stopped(supervisor, "j")
        supervisor.client.ask("stop", job_id="j", signal=int(signal.SIGTERM), grace_s=None)
        assert supervisor.wait_finished("j").exit_code == 5


def test_a_stopped_job_sees_its_timeout(tmp_path: Path) -> None:
    with SupervisorProcess(tmp_path / "state") as supervisor:
        record = supervisor.finish("j", STOPS_ITSELF, timeout_s=0.5, stop_grace_s=_GRACE_S)
        assert (record.outcome, record.exit_code) == (Outcome.TIMED_OUT, 5)


def test_a_stopped_job_sees_its_output_limit(tmp_path: Path) -> None:
    argv = ["sh", "-c", _TIDY + "head -c 200000 /dev/zero; " + "kill -STOP $$; while :; do sleep 0.05; done"]
    fields: dict[str, Any] = {"output_max_bytes": 1000, "output_policy": int(OutputPolicy.STOP)}
    with SupervisorProcess(tmp_path / "state") as supervisor:
        record = supervisor.finish("j", argv, stop_grace_s=_GRACE_S, **fields)
        assert (record.outcome, record.exit_code) == (Outcome.OUTPUT_LIMIT, 5)


def test_a_stopped_job_sees_the_shutdown(tmp_path: Path) -> None:
    with SupervisorProcess(tmp_path / "state") as supervisor:
        for number in range(3):
            supervisor.client.send("start", **start_fields(f"j{number}", STOPS_ITSELF, stop_grace_s=_GRACE_S))
        for number in range(3):
            wait_stopped(supervisor, f"j{number}")
        supervisor.client.ask("shutdown", stop_jobs=True)
        for number in range(3):
            assert supervisor.wait_finished(f"j{number}").exit_code == 5
        assert supervisor.wait_exit() == 0
