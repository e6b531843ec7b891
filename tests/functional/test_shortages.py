"""A supervisor that gets no more threads or memory from some moment on: what it needs it has, and it ends no job.

(Of files: test_exhaustion.py.)
"""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from tests.support import programs
from tests.support.programs import open_fds, status_field
from tests.support.spawning import skip_unless_built
from tests.support.waiting import eventually_sync
from tests.support.workers import PATIENCE_S, Refused, SupervisorProcess
from worker_svc.job import JobState
from worker_svc.supervisor.reserve import Reserve
from worker_svc.supervisor.spawn import NATIVE, PYTHON


def threads_of(supervisor: SupervisorProcess) -> int:
    return status_field(supervisor.pid, "Threads", 10)


def test_jobs_need_no_thread_that_was_not_there_before_the_first(supervisor: SupervisorProcess) -> None:
    before = threads_of(supervisor)
    for number in range(3):
        supervisor.finish(f"j{number}", programs.TRUE, output_max_bytes=1_000_000)
    supervisor.client.ask("delete", job_id="j0")
    eventually_sync(lambda: not list((supervisor.path / "output").glob("j0.*")), PATIENCE_S)
    assert threads_of(supervisor) == before


@pytest.mark.parametrize("spawner", [NATIVE, PYTHON])
def test_no_address_space_is_left_from_the_start(tmp_path: Path, spawner: str) -> None:
    """As by `ulimit -v`: a stack for a thread cannot be had, nor any larger piece of memory."""
    skip_unless_built(spawner)
    supervisor = SupervisorProcess(tmp_path / "state")
    supervisor.options = ("--spawner", spawner)
    with supervisor:
        assert supervisor.client.ask("status")["running"] == 0
        supervisor.run("before", programs.until_exists(tmp_path / "go", 3))
        size = status_field(supervisor.pid, "VmSize", 10) * 1024
        resource.prlimit(supervisor.pid, resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
        for number in range(20):
            try:
                supervisor.run(f"j{number}", programs.exits(4), stdin=b"x" * 500_000, output_max_bytes=1_000_000)
            except (Refused, ConnectionError):  # refused for a good reason, or asked to connect and ask again
                supervisor.hang_up()
        (tmp_path / "go").touch()
        assert supervisor.wait_finished("before").exit_code == 3
        resource.prlimit(supervisor.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        for job_id in {moved.job_id for moved in supervisor.events()}:
            assert supervisor.wait_finished(job_id).state is JobState.FINISHED
        assert supervisor.finish("after", programs.exits(5)).exit_code == 5
        assert "supervisor.fault" not in supervisor.log()


def test_a_reserve_is_let_go_of_and_comes_back() -> None:
    before = open_fds(os.getpid())
    reserve = Reserve()
    assert reserve.is_whole
    held = len(open_fds(os.getpid())) - len(before)
    assert held > 0
    for _ in range(2):
        reserve.spend()
        assert not reserve.is_whole
    assert len(open_fds(os.getpid())) == len(before)
    assert reserve.refill()
    assert len(open_fds(os.getpid())) == len(before) + held
    reserve.spend()
