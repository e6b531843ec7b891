"""A start that hangs, its program being on a dead file system: it ends when its time has passed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import programs, stalled_fs
from tests.support.waiting import eventually_sync
from tests.support.workers import PATIENCE_S, SupervisorProcess, start_fields
from worker_svc.job import DURATION_MAX_S, JobState, Outcome
from worker_svc.supervisor.spawn import IMPLEMENTATION, NATIVE, PYTHON


@pytest.fixture
def hangs(tmp_path: Path) -> Iterator[list[str]]:
    with stalled_fs.mounted_or_skip(tmp_path) as mount_point:
        yield [str(mount_point / "program")]


@pytest.fixture
def supervisor_options(spawner: str) -> tuple[str, ...]:
    return ("--spawner", spawner)


@pytest.fixture
def supervisor_settings() -> dict[str, Any]:
    return {"slots": 1}


@pytest.mark.parametrize("level", ["", "subreaper"])
def test_its_time_passes_and_the_slot_is_free(tmp_path: Path, hangs: list[str], level: str) -> None:
    for spawner in (NATIVE, PYTHON) if IMPLEMENTATION == NATIVE else (PYTHON,):
        supervisor = SupervisorProcess(tmp_path / spawner, slots=1)
        supervisor.options = ("--spawner", spawner, *(("--containment", level) if level else ()))
        with supervisor:
            started = supervisor.client.send("start", **start_fields("j", hangs, timeout_s=0.5, stop_grace_s=1000))
            supervisor.wait_state("j", JobState.STARTING)
            queued = supervisor.client.send("start", **start_fields("next", programs.TRUE))
            record = supervisor.wait_finished("j")
            assert record.outcome is Outcome.TIMED_OUT
            assert record.reason.startswith("timed out after 0.5 s")
            # The launcher of the Python spawner cannot be seen to hang: it counts as started, and as ended at once.
            assert supervisor.client.answer(started)["state"] in (JobState.STOPPING, JobState.FINISHED)
            supervisor.client.answer(queued)
            assert supervisor.wait_finished("next").outcome is Outcome.SUCCEEDED


def test_a_stop_with_a_long_grace_does_not_take_the_timeout_away(
    supervisor: SupervisorProcess, hangs: list[str]
) -> None:
    supervisor.client.send("start", **start_fields("j", hangs, timeout_s=0.8, stop_grace_s=1000))
    supervisor.wait_state("j", JobState.STARTING)
    supervisor.client.ask("stop", job_id="j", signal=None, grace_s=DURATION_MAX_S)
    record = supervisor.wait_finished("j")
    assert record.outcome is Outcome.STOPPED
    assert record.reason in ("stopped before it started", "signal: killed")


def test_a_start_that_goes_through_in_time_has_all_of_its_time(supervisor: SupervisorProcess) -> None:
    assert supervisor.finish("j", programs.SLEEP, timeout_s=0.5).outcome is Outcome.TIMED_OUT
    started, *_, finished = (moved for moved in supervisor.events() if moved.from_state is not JobState.NEW)
    assert finished.at_ns - started.at_ns >= 500_000_000


def test_those_that_wait_behind_it_are_given_up_too(supervisor: SupervisorProcess, hangs: list[str]) -> None:
    """More than there are threads: some have no process yet when their time has passed."""
    supervisor.settings["slots"] = 100
    client = supervisor.connect()
    for number in range(80):
        client.send("start", **start_fields(f"j{number}", hangs, timeout_s=0.5))
    outcomes = [supervisor.wait_finished(f"j{number}").outcome for number in range(80)]
    assert set(outcomes) == {Outcome.TIMED_OUT}
    assert eventually_sync(lambda: supervisor.client.ask("status")["running"] == 0)
    client.close()


def test_what_no_signal_ends_is_named_and_holds_up_nobody(tmp_path: Path) -> None:
    """It opens a file on a file system that is deaf to interruption, too: it waits in state D."""
    with SupervisorProcess(tmp_path / "state", slots=2) as supervisor:
        with stalled_fs.mounted_or_skip(tmp_path, "--deaf") as mount_point:
            supervisor.run("dead", ["sh", "-c", f": < {mount_point}/program"])
            pid = supervisor.wait_state("dead", JobState.RUNNING).pid
            eventually_sync(Path(f"{mount_point}.asked").exists, PATIENCE_S, "it does not hang")
            supervisor.client.ask("stop", job_id="dead", grace_s=0)
            stuck = eventually_sync(lambda: supervisor.record("dead").stuck, PATIENCE_S)
            assert stuck == f"pid {pid} (D) waits in request_wait_answer"
            assert supervisor.record("dead").state is JobState.STOPPING
            assert supervisor.finish("other", programs.TRUE).outcome is Outcome.SUCCEEDED
        # With the file system goes what it waited for.
        assert supervisor.wait_finished("dead").outcome is Outcome.STOPPED
