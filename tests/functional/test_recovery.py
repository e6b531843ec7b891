"""What a new supervisor makes of what an earlier one left: adopted, or LOST with the reason; nobody else is touched."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from tests.support import programs
from tests.support.programs import is_alive
from tests.support.stages import in_state
from tests.support.waiting import eventually_sync
from tests.support.workers import PATIENCE_S, SupervisorProcess, start_fields
from worker_svc.job import Event, JobSpec, JobState, Outcome
from worker_svc.linux import failpoints
from worker_svc.record.paths import STORE_NAME
from worker_svc.record.writer import JobStore
from worker_svc.supervisor.ledger import Ledger
from worker_svc.supervisor.life import adoption
from worker_svc.supervisor.life.job import Ask, Job, Terms
from worker_svc.supervisor.life.moves import Moves
from worker_svc.supervisor.life.process import Process
from worker_svc.supervisor.life.running import Running
from worker_svc.supervisor.spawn import start_ticks_of

# Leaves a process behind in a session of its own, which has executed another program.
LEAVES_SESSION = ["sh", "-c", "setsid sleep 999 & exit 3"]


def change(supervisor: SupervisorProcess, statement: str, *values: Any) -> None:
    """In the store of one that is dead."""
    with sqlite3.connect(supervisor.path / STORE_NAME) as db:
        db.execute(statement, values)
    db.close()


def arm(supervisor: SupervisorProcess, **points: int) -> None:
    """For the next one that is started."""
    named = {name.replace("_", "-"): passes for name, passes in points.items()}
    (supervisor.path / failpoints.FILE_NAME).write_text(json.dumps(named))


def restart(supervisor: SupervisorProcess) -> None:
    supervisor.kill()
    supervisor.start()


# Identity


def test_a_number_that_is_anothers_now_is_never_signalled(
    supervisor: SupervisorProcess, bystander: subprocess.Popen[bytes]
) -> None:
    supervisor.run("j", programs.SLEEP)
    pid = supervisor.record("j").pid
    supervisor.kill()
    os.kill(pid, signal.SIGKILL)
    # A tick of 10 ms apart, the least by which two of one number can differ.
    ticks = start_ticks_of(bystander.pid)
    assert ticks is not None
    change(supervisor, "UPDATE jobs SET pid = ?, start_ticks = ?", bystander.pid, ticks - 1)
    supervisor.start()
    record = supervisor.wait_finished("j")
    assert (record.outcome, record.reason) == (Outcome.LOST, "lost: it ended while no supervisor was there")


def test_a_number_that_nobody_has(supervisor: SupervisorProcess) -> None:
    supervisor.run("j", programs.SLEEP)
    pid = supervisor.record("j").pid
    supervisor.kill()
    os.kill(pid, signal.SIGKILL)
    change(supervisor, "UPDATE jobs SET pid = ?", 2**22 - 1)
    supervisor.start()
    assert supervisor.wait_finished("j").outcome is Outcome.LOST


@pytest.mark.parametrize("former", [JobState.RUNNING, JobState.STOPPING, JobState.STARTING])
def test_after_a_reboot_what_ran_is_lost(
    supervisor: SupervisorProcess, former: JobState, bystander: subprocess.Popen[bytes]
) -> None:
    supervisor.run("j", programs.SLEEP)
    pid = supervisor.record("j").pid
    supervisor.kill()
    os.kill(pid, signal.SIGKILL)
    # The number, and the start time too, are now those of a process that has nothing to do with it.
    change(
        supervisor,
        "UPDATE jobs SET boot_id = 'another', state = ?, pid = ?, start_ticks = ?",
        int(former),
        0 if former is JobState.STARTING else bystander.pid,
        start_ticks_of(bystander.pid),
    )
    change(supervisor, "UPDATE meta SET value = 'another' WHERE key = 'boot_id'")
    supervisor.start()
    record = supervisor.wait_finished("j")
    assert record.outcome is Outcome.LOST
    assert record.reason.startswith("lost: machine rebooted")


@pytest.mark.parametrize("on_reboot", ["start", "drop"])
def test_after_a_reboot_what_was_queued(tmp_path: Path, on_reboot: str) -> None:
    with SupervisorProcess(tmp_path / "state", slots=1, on_reboot=on_reboot) as supervisor:
        supervisor.run("first", programs.SLEEP)
        for number in range(3):
            supervisor.run(f"j{number}", programs.exits(number))
        pid = supervisor.record("first").pid
        supervisor.kill()
        os.kill(pid, signal.SIGKILL)
        change(supervisor, "UPDATE jobs SET boot_id = 'another' WHERE state = ?", int(JobState.RUNNING))
        change(supervisor, "UPDATE meta SET value = 'another' WHERE key = 'boot_id'")
        supervisor.start()
        records = [supervisor.wait_finished(f"j{number}") for number in range(3)]
        if on_reboot == "start":
            assert [record.exit_code for record in records] == [0, 1, 2]
            started = [event.job_id for event in supervisor.events() if event.to_state is JobState.RUNNING]
            assert started == ["first", "j0", "j1", "j2"]
        else:
            assert {record.outcome for record in records} == {Outcome.LOST}
            assert "on_reboot" in records[0].reason


# Exit statuses of adopted jobs


@pytest.mark.parametrize("status", [0, 1, 7, 255])
def test_the_status_of_one_that_ends_after(supervisor: SupervisorProcess, tmp_path: Path, status: int) -> None:
    supervisor.run("j", programs.until_exists(tmp_path / "go", status))
    restart(supervisor)
    (tmp_path / "go").touch()
    record = supervisor.wait_finished("j")
    assert (record.exit_code, record.outcome is Outcome.LOST) == (status, False)


def test_the_status_of_one_that_nobody_has_reaped_yet() -> None:
    child = subprocess.Popen(programs.exits(7))
    ticks = start_ticks_of(child.pid)
    assert ticks is not None
    pidfd = os.pidfd_open(child.pid)
    eventually_sync(lambda: programs.state_of(child.pid) == "Z", PATIENCE_S)
    ended = adoption.exit_of(pidfd, child.pid, ticks)
    assert ended is not None
    assert (ended.exit_code, ended.signal) == (7, None)
    assert adoption.exit_of(pidfd, child.pid, ticks + 1) is None, "another process of that number"
    child.wait()
    os.close(pidfd)


def test_who_still_runs_has_no_status() -> None:
    child = subprocess.Popen(programs.SLEEP)
    pidfd = os.pidfd_open(child.pid)
    assert adoption.exit_of(pidfd, child.pid, start_ticks_of(child.pid) or 0) is None
    child.kill()
    child.wait()
    os.close(pidfd)


def test_what_an_adopted_job_leaves_behind_is_ended(supervisor: SupervisorProcess, tmp_path: Path) -> None:
    script = f"(setsid sleep 999 & echo $! >{tmp_path}/left); until [ -e {tmp_path}/go ]; do sleep 0.02; done; exit 5"
    supervisor.run("j", ["sh", "-c", script])
    left = int(eventually_sync(lambda: (tmp_path / "left").exists() and (tmp_path / "left").read_text(), PATIENCE_S))
    restart(supervisor)
    (tmp_path / "go").touch()
    record = supervisor.wait_finished("j")
    assert (record.exit_code, record.stuck) == (5, "")
    eventually_sync(lambda: not is_alive(left), PATIENCE_S)


# A job that was starting


def start_and_die(supervisor: SupervisorProcess, argv: list[str], point: str) -> None:
    """The supervisor dies at a point of the start of job `j`."""
    supervisor.kill()
    arm(supervisor, **{point: 1})
    supervisor.start()
    supervisor.client.send("start", **start_fields("j", argv))
    assert supervisor.wait_exit() == -signal.SIGKILL
    supervisor.hang_up()


def test_one_that_was_started_and_not_recorded_is_found(supervisor: SupervisorProcess, tmp_path: Path) -> None:
    start_and_die(supervisor, programs.until_exists(tmp_path / "go", 7), "after_spawn")
    supervisor.start()
    assert supervisor.wait_state("j", JobState.RUNNING).pid
    (tmp_path / "go").touch()
    assert supervisor.wait_finished("j").exit_code == 7


def test_one_that_was_not_started_is_not_started_again(supervisor: SupervisorProcess, tmp_path: Path) -> None:
    start_and_die(supervisor, ["touch", str(tmp_path / "ran")], "before_spawn")
    supervisor.start()
    record = supervisor.wait_finished("j")
    assert record.outcome is Outcome.LOST
    assert "may or may not have run" in record.reason
    assert not (tmp_path / "ran").exists()


def test_what_it_left_behind_is_not_taken_for_it(supervisor: SupervisorProcess, tmp_path: Path) -> None:
    """Its own first process has ended: a session that it left behind must not lend it its status."""
    start_and_die(supervisor, LEAVES_SESSION, "after_spawn")
    supervisor.start()
    assert supervisor.wait_finished("j").outcome is Outcome.LOST
    eventually_sync(lambda: not _of_state(supervisor), PATIENCE_S, "something of it is left")


def _of_state(supervisor: SupervisorProcess) -> list[int]:
    with sqlite3.connect(supervisor.path / STORE_NAME) as db:
        (state_id,) = db.execute("SELECT value FROM meta WHERE key = 'state_id'").fetchone()
    db.close()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if f"WORKER_STATE_ID={state_id}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return [pid for pid in found if is_alive(pid)]


@pytest.mark.parametrize("cause, outcome", [(1, Outcome.STOPPED), (2, Outcome.TIMED_OUT)])
def test_a_stop_while_it_starts_outlives_the_supervisor(
    supervisor: SupervisorProcess, cause: int, outcome: Outcome
) -> None:
    """The stop was answered: it must happen, whoever does it."""
    start_and_die(supervisor, programs.SLEEP, "after_spawn")
    change(supervisor, "UPDATE jobs SET stop_cause = ?", cause)  # as the stop of a job that is starting leaves it
    supervisor.start()
    record = supervisor.wait_finished("j")
    assert (record.outcome, record.signal) == (outcome, signal.SIGTERM)


def test_a_stop_while_it_starts_is_on_record(supervisor: SupervisorProcess) -> None:
    supervisor.run("warm", programs.TRUE)
    with supervisor.paused():
        first = supervisor.client.send("start", **start_fields("j", programs.SLEEP))
        second = supervisor.client.send("stop", job_id="j", signal=None, grace_s=None)
    supervisor.client.answer(first)
    supervisor.client.answer(second)
    assert supervisor.wait_finished("j").outcome is Outcome.STOPPED


# Stops and timeouts


def test_a_stop_is_on_record_before_the_signal(tmp_path: Path) -> None:
    """Else what it brings about would, after a crash, be taken for the job's own end."""
    store = JobStore(str(tmp_path))
    ledger = Ledger(store)
    moves = Moves(ledger)
    job, containment = Job("j", "", 0), Mock()
    house = Mock(ledger=ledger, moves=moves, containment=containment)
    ledger.add(job, JobSpec("true"), b"")
    container = Mock(pid=7, pidfd=-1)
    running = Running(Process(house, job, Terms(stop_signal=signal.SIGTERM), container, 0))
    moves.move(job, Event.LAUNCH, in_state(JobState.STARTING))
    moves.move(job, Event.SPAWNED, running)
    job.now.stop(Ask(grace_s=0.0))
    containment.signal.assert_not_called()
    containment.kill.assert_not_called()
    assert ledger.commit(Mock())
    for effect in ledger.take_urgent():
        effect()
    containment.signal.assert_called_once_with(container, signal.SIGTERM, wakes=True)
    containment.kill.assert_called_once_with(container)
    store.close()


def test_a_timeout_goes_on_and_the_grace_after_it(supervisor: SupervisorProcess) -> None:
    supervisor.run("j", programs.IGNORE_TERM, timeout_s=0.5, stop_grace_s=0.3)
    supervisor.wait_output("j", b"ready\n")
    restart(supervisor)
    record = supervisor.wait_finished("j")
    assert (record.outcome, record.signal) == (Outcome.TIMED_OUT, signal.SIGKILL)


def test_a_stop_that_breaks_off_a_start_is_a_stop(supervisor: SupervisorProcess) -> None:
    """Whenever it comes, with no grace: before the process, while it starts, or just after."""
    supervisor.run("warm", programs.TRUE)
    for number in range(40):
        with supervisor.paused():
            requests = [
                supervisor.client.send("start", **start_fields(f"j{number}", programs.SLEEP)),
                supervisor.client.send("stop", job_id=f"j{number}", signal=None, grace_s=0),
            ]
        for request in requests:
            supervisor.client.answer(request)
        assert supervisor.wait_finished(f"j{number}").outcome is Outcome.STOPPED


def test_a_job_frozen_behind_the_record_goes_on(supervisor: SupervisorProcess, tmp_path: Path) -> None:
    """Its supervisor died after it had frozen the cgroup, before that was on record."""
    supervisor.run("j", ["sh", "-c", "until [ -e go ]; do sleep 0.02; done"], cwd=str(tmp_path))
    pid = supervisor.wait_state("j", JobState.RUNNING).pid
    group = Path(f"/proc/{pid}/cgroup").read_text().rpartition("0::")[2].strip()
    mounts = [line.split() for line in Path("/proc/mounts").read_text(errors="surrogateescape").splitlines()]
    mount_point = next((fields[1] for fields in mounts if fields[2] == "cgroup2"), "")
    if not group.endswith("job-j") or not mount_point:
        pytest.skip("the job has no cgroup of its own here")
    supervisor.kill()
    freezer = Path(mount_point + group, "cgroup.freeze")
    freezer.write_text("1")
    eventually_sync(lambda: "frozen 1" in freezer.with_name("cgroup.events").read_text())
    supervisor.start()
    eventually_sync(lambda: freezer.read_text().strip() == "0", PATIENCE_S, "it is frozen still")
    (tmp_path / "go").touch()
    assert supervisor.wait_finished("j").outcome is Outcome.SUCCEEDED
