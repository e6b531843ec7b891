"""What tries to outlive its job, or to hold up another one, with the supervisor around it; at both levels."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Final

import pytest

from tests.support.contained import LEAVE_CGROUP, apart
from tests.support.programs import SLEEP, is_alive
from tests.support.waiting import eventually_sync, next_tick, stays
from tests.support.workers import PATIENCE_S, Refused, SupervisorProcess
from worker_svc.job import JobState, LeaderExit, Outcome
from worker_svc.linux.processes import snapshot
from worker_svc.record.paths import STORE_NAME
from worker_svc.supervisor.containment import SUBREAPER


@pytest.fixture
def supervisor_options(level: str) -> tuple[str, ...]:
    return ("--containment", level)


def escapee(tmp_path: Path, script: str = "") -> str:
    """Says in a file who it is once it has got away, and from then on stands still: in the middle of an exec nothing
    would tell whose it is.
    """
    tell = f"echo $$ > {tmp_path}/pid.new; mv {tmp_path}/pid.new {tmp_path}/pid"
    return f"{script or ':'}; mkfifo {tmp_path}/never; {tell}; read nothing < {tmp_path}/never"


def pid_of(tmp_path: Path) -> int:
    file = tmp_path / "pid"
    return int(eventually_sync(lambda: file.exists() and file.read_text()))


BY: Final = {
    "marked": "",
    "unmarked": "env -i",
    "another's mark": "env WORKER_JOB_ID=victim",
    "no mark of ours": "env WORKER_JOB_ID=victim WORKER_JOB_MARK=0123456789abcdef0123456789abcdef-0-victim",
}


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("leaves", ["", LEAVE_CGROUP], ids=["stays in its cgroup", "leaves its cgroup"])
def test_a_stop_ends_who_got_away_and_holds_up_nobody(
    supervisor: SupervisorProcess, tmp_path: Path, by: str, leaves: str
) -> None:
    go = tmp_path / "go"
    wait_for_go = ["sh", "-c", f"until [ -e {go} ]; do sleep 0.02; done"]
    supervisor.run("victim", wait_for_go, leader_exit=int(LeaderExit.WAIT))
    next_tick()
    supervisor.run("j", apart(escapee(tmp_path, leaves), BY[by]))
    pid = pid_of(tmp_path)
    supervisor.client.ask("stop", job_id="j", signal=None, grace_s=None)
    record = supervisor.wait_finished("j")
    assert (record.outcome, record.stuck) == (Outcome.STOPPED, "")
    eventually_sync(lambda: not is_alive(pid))
    assert supervisor.record("victim").state is JobState.RUNNING
    go.touch()
    assert supervisor.wait_finished("victim").outcome is Outcome.SUCCEEDED


@pytest.mark.parametrize("leaves", ["", LEAVE_CGROUP], ids=["stays in its cgroup", "leaves its cgroup"])
def test_who_got_away_ends_with_its_leader(supervisor: SupervisorProcess, tmp_path: Path, leaves: str) -> None:
    supervisor.run("older", SLEEP)
    next_tick()
    until_there = f"until [ -e {tmp_path}/pid ]; do sleep 0.02; done; exit 3"
    record = supervisor.finish("j", apart(escapee(tmp_path, leaves), "", until_there))
    assert (record.exit_code, record.stuck) == (3, "")
    eventually_sync(lambda: not is_alive(pid_of(tmp_path)))
    assert is_alive(supervisor.record("older").pid)


def test_who_may_be_two_jobs_is_named_and_ended_with_the_last(
    supervisor: SupervisorProcess, level: str, tmp_path: Path
) -> None:
    """Its leader is gone before it could be seen below it, and its environment is no help."""
    supervisor.run("older", SLEEP)
    next_tick()
    until_there = f"until [ -e {tmp_path}/pid ]; do sleep 0.02; done; exit 3"
    record = supervisor.finish("j", apart(escapee(tmp_path), "env -i", until_there))
    pid = pid_of(tmp_path)
    assert record.exit_code == 3
    if level == SUBREAPER:
        assert re.fullmatch(rf"pid {pid} \([RSD]\) runs on, being this job's or another's", record.stuck)
        assert is_alive(pid)
        next_tick()
        assert supervisor.finish("newer", ["true"]).stuck == ""
        assert is_alive(pid)
        supervisor.client.ask("stop", job_id="older", signal=None, grace_s=None)
        assert supervisor.wait_finished("older").stuck == ""
    eventually_sync(lambda: not is_alive(pid))


def test_a_job_waits_for_who_left_its_cgroup(supervisor: SupervisorProcess, tmp_path: Path) -> None:
    script = f"{LEAVE_CGROUP}; echo $$ > {tmp_path}/pid; until [ -e {tmp_path}/go ]; do sleep 0.02; done"
    until_there = f"until [ -s {tmp_path}/pid ]; do sleep 0.02; done; exit 3"
    supervisor.run("j", apart(script, "", until_there), leader_exit=int(LeaderExit.WAIT))
    eventually_sync(lambda: not is_alive(supervisor.record("j").pid))
    assert stays(lambda: supervisor.record("j").state is JobState.RUNNING)
    (tmp_path / "go").touch()
    assert supervisor.wait_finished("j").exit_code == 3


def test_who_left_an_adopted_job_is_ended_too(supervisor: SupervisorProcess, tmp_path: Path) -> None:
    """A new supervisor knows the marks that an earlier one gave."""
    supervisor.run("j", apart(escapee(tmp_path, LEAVE_CGROUP)))
    pid = pid_of(tmp_path)
    supervisor.kill()
    supervisor.start()
    assert is_alive(pid)
    supervisor.client.ask("stop", job_id="j", signal=None, grace_s=None)
    assert supervisor.wait_finished("j").stuck == ""
    eventually_sync(lambda: not is_alive(pid))


def test_what_nobody_has_a_record_of_is_ended_by_its_mark_alone(supervisor: SupervisorProcess, tmp_path: Path) -> None:
    supervisor.run("j", apart(escapee(tmp_path, LEAVE_CGROUP), "env WORKER_JOB_ID=another"))
    pid = pid_of(tmp_path)
    supervisor.kill()
    os.kill(supervisor.record("j").pid, signal.SIGKILL)
    eventually_sync(lambda: not is_alive(supervisor.record("j").pid))
    supervisor.start()
    eventually_sync(lambda: not is_alive(pid), PATIENCE_S)


def test_a_paused_job_goes_on_by_a_resume_only(supervisor: SupervisorProcess) -> None:
    supervisor.run("j", ["sh", "-c", "while :; do echo; sleep 0.01; done"])
    supervisor.client.ask("pause", job_id="j")
    with pytest.raises(Refused, match="precondition: the job is paused: ResumeJob"):
        supervisor.client.ask("signal", job_id="j", signal=int(signal.SIGCONT))

    def stands() -> bool:
        before = supervisor.output("j")
        return stays(lambda: supervisor.output("j") == before, 0.1)

    eventually_sync(stands)
    written = supervisor.output("j")
    assert supervisor.record("j").paused
    supervisor.client.ask("resume", job_id="j")
    supervisor.client.ask("signal", job_id="j", signal=int(signal.SIGCONT))
    eventually_sync(lambda: len(supervisor.output("j")) > len(written))


def test_the_timeout_of_a_paused_job_runs_on(supervisor: SupervisorProcess) -> None:
    supervisor.run("j", SLEEP, timeout_s=0.5)
    supervisor.client.ask("pause", job_id="j")
    assert supervisor.wait_finished("j").outcome is Outcome.TIMED_OUT


def test_orphans_are_reaped_while_their_job_runs(supervisor: SupervisorProcess) -> None:
    supervisor.run(
        "j", ["sh", "-c", "for n in 1 2 3 4 5; do (setsid sleep 0.1 &); done; sleep 0.2; echo; exec sleep 1000"]
    )
    supervisor.wait_output("j", b"\n")

    def zombies() -> list[int]:
        return [one.pid for one in snapshot().values() if one.ppid == supervisor.pid and one.state == "Z"]

    eventually_sync(lambda: not zombies())
    assert supervisor.record("j").state is JobState.RUNNING


def test_the_secret_of_the_marks_is_told_to_nobody(supervisor: SupervisorProcess) -> None:
    supervisor.run("j", ["env"])
    supervisor.wait_finished("j")
    with closing(sqlite3.connect(supervisor.path / STORE_NAME)) as db:
        (secret,) = db.execute("SELECT value FROM meta WHERE key = 'mark_secret'").fetchone()
    assert len(bytes.fromhex(secret)) == 32
    told = [supervisor.output("j").decode(), supervisor.log(), str(supervisor.client.ask("status"))]
    told.append(str(supervisor.client.hello()))
    assert not any(secret in text for text in told)
    assert (supervisor.path / STORE_NAME).stat().st_mode & 0o777 == 0o600
