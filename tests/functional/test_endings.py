"""How jobs end: by themselves, by a stop, by their time."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.support import programs
from tests.support.contained import skip_unless
from tests.support.programs import is_alive, rss_bytes
from tests.support.supervised import with_slots
from tests.support.waiting import eventually_sync
from tests.support.workers import (
    Refused,
    SupervisorProcess,
    start_fields,
)
from worker_svc.job import DURATION_MAX_S, JobState, Outcome
from worker_svc.supervisor.containment import CGROUP, SUBREAPER

# How jobs end


@pytest.mark.parametrize(
    "status, outcome, reason",
    [
        (0, Outcome.SUCCEEDED, ""),
        (1, Outcome.FAILED, "exit status 1"),
        (3, Outcome.FAILED, "exit status 3"),
        (127, Outcome.FAILED, "exit status 127"),
        (255, Outcome.FAILED, "exit status 255"),
    ],
)
def test_exit_codes(supervisor: SupervisorProcess, status: int, outcome: Outcome, reason: str) -> None:
    assert supervisor.run("j", programs.exits(status)) == {"state": JobState.RUNNING, "existed": False}
    record = supervisor.wait_finished("j")
    assert (record.outcome, record.exit_code, record.signal, record.reason) == (outcome, status, None, reason)
    assert record.pid > 0
    assert record.started_ns is not None
    assert record.finished_ns is not None
    assert record.accepted_ns <= record.started_ns <= record.finished_ns
    assert record.wall_ns is not None
    assert record.wall_ns > 0
    assert record.cpu_ns is not None


@pytest.mark.parametrize("number", programs.DEADLY, ids=lambda number: number.name)
def test_signals(supervisor: SupervisorProcess, number: signal.Signals) -> None:
    record = supervisor.finish("j", programs.kills_self(number))
    assert (record.outcome, record.exit_code, record.signal) == (Outcome.SIGNALED, None, number)
    assert record.reason.startswith("signal: ")


def test_each_move_is_an_event(supervisor: SupervisorProcess) -> None:
    record = supervisor.finish("j", programs.exits(3))
    events = supervisor.events()
    assert [(event.sequence, event.from_state.name, event.to_state.name) for event in events] == [
        (1, "NEW", "STARTING"),
        (2, "STARTING", "RUNNING"),
        (3, "RUNNING", "FINISHED"),
    ]
    assert [event.pid for event in events] == [0, record.pid, record.pid]
    assert (events[2].outcome, events[2].exit_code, events[2].wall_ns) == (Outcome.FAILED, 3, record.wall_ns)
    assert record.last_sequence == 3
    supervisor.client.ask("status")
    assert supervisor.client.sequence == 3


def test_time_and_memory_of_a_job(state: Path) -> None:
    """Told also when the supervisor was started by something large: Linux hands peaks down to what is spawned."""
    supervisor = SupervisorProcess(state)
    large = "import os, sys; x = b'x' * (200 << 20); os.execv(sys.argv[1], sys.argv[1:])"
    supervisor.run_as = [sys.executable, "-S", "-c", large]
    with supervisor:
        _time_and_memory(supervisor)


def _time_and_memory(supervisor: SupervisorProcess) -> None:
    code = "import time\nx = bytearray(64 << 20)\nfor i in range(0, len(x), 4096): x[i] = 1\n"
    code += "while time.process_time() < 0.05: pass"
    record = supervisor.finish("j", programs.python(code))
    assert record.cpu_ns is not None
    assert record.cpu_ns >= 50_000_000
    assert record.peak_memory_bytes is not None
    assert 64 << 20 < record.peak_memory_bytes < 256 << 20


@pytest.mark.parametrize("level", [CGROUP, SUBREAPER])
def test_many_ends_in_one_turn(state: Path, level: str) -> None:
    """Each is heard of in more than one way, and what is heard of a job that has ended meanwhile is nobody's."""
    skip_unless(level)
    supervisor = SupervisorProcess(state)
    supervisor.options = ("--containment", level)
    with supervisor:
        for number in range(20):
            supervisor.run(f"j{number}", ["sh", "-c", "sleep 999 & wait"])
        pids = [supervisor.wait_state(f"j{number}", JobState.RUNNING).pid for number in range(20)]
        with supervisor.paused():
            for pid in pids:
                os.killpg(pid, signal.SIGKILL)
            eventually_sync(lambda: not any(map(is_alive, pids)))
        for number in range(20):
            assert supervisor.wait_finished(f"j{number}").signal == signal.SIGKILL
        assert "fault" not in supervisor.log()


# Stopping


def test_stop(supervisor: SupervisorProcess) -> None:
    supervisor.run("j", programs.SLEEP)
    supervisor.client.ask("stop", job_id="j", signal=None, grace_s=None)
    record = supervisor.wait_finished("j")
    assert (record.outcome, record.signal, record.reason) == (Outcome.STOPPED, signal.SIGTERM, "signal: terminated")
    assert [event.reason for event in supervisor.events()][2:] == ["stop requested", "signal: terminated"]


def test_stop_with_the_jobs_own_signal(supervisor: SupervisorProcess) -> None:
    supervisor.run("j", programs.EXIT_ON_USR1, stop_signal=int(signal.SIGUSR1))
    supervisor.wait_output("j", b"ready\n")
    supervisor.client.ask("stop", job_id="j")
    record = supervisor.wait_finished("j")
    assert (record.outcome, record.exit_code) == (Outcome.STOPPED, 7)
    assert record.reason == "stopped (exit status 7)"


def test_after_the_grace_it_is_killed(supervisor: SupervisorProcess) -> None:
    supervisor.run("j", programs.IGNORE_TERM, stop_grace_s=0.3)
    supervisor.wait_output("j", b"ready\n")
    supervisor.client.ask("stop", job_id="j")
    assert supervisor.record("j").state is JobState.STOPPING
    record = supervisor.wait_finished("j")
    *_, stopping, finished = supervisor.events()
    assert finished.at_ns - stopping.at_ns >= 300_000_000
    assert (record.outcome, record.signal, record.reason) == (Outcome.STOPPED, signal.SIGKILL, "signal: killed")


def test_asked_again_the_nearer_end_counts(supervisor: SupervisorProcess) -> None:
    supervisor.run("j", programs.IGNORE_TERM, stop_grace_s=600.0)
    supervisor.wait_output("j", b"ready\n")
    supervisor.client.ask("stop", job_id="j")
    assert supervisor.record("j").state is JobState.STOPPING
    supervisor.client.ask("stop", job_id="j", grace_s=0.2)
    supervisor.client.ask("stop", job_id="j", grace_s=600.0)
    assert supervisor.wait_finished("j").signal == signal.SIGKILL


def test_no_grace_is_kill_at_once(supervisor: SupervisorProcess) -> None:
    supervisor.run("j", programs.IGNORE_TERM, stop_grace_s=600.0)
    supervisor.client.ask("stop", job_id="j", grace_s=0.0)
    assert supervisor.wait_finished("j").signal in (signal.SIGKILL, signal.SIGTERM)  # before or after its trap


def test_asked_again_with_another_signal(supervisor: SupervisorProcess) -> None:
    argv = ["sh", "-c", "trap '' TERM; trap 'exit 7' USR1; echo ready; while :; do sleep 999 & wait; done"]
    supervisor.run("j", argv, stop_grace_s=600.0)
    supervisor.wait_output("j", b"ready\n")
    supervisor.client.ask("stop", job_id="j")
    supervisor.client.ask("stop", job_id="j", signal=int(signal.SIGUSR1))
    assert supervisor.wait_finished("j").exit_code == 7


def test_stops_that_come_before_the_process_does(supervisor: SupervisorProcess) -> None:
    """All in one turn: the nearer end counts here too. SIGCONT does nothing, so that only the grace can end it."""
    client = supervisor.client
    fields = start_fields("j", programs.SLEEP, stop_signal=int(signal.SIGCONT), stop_grace_s=600.0)
    numbers, batch = [], b""
    for op, rest in (("start", fields), ("stop", {"job_id": "j", "grace_s": 0.0}), ("stop", {"job_id": "j"})):
        number, frame = client.frame(op, **rest)
        numbers.append(number)
        batch += frame
    client.send_bytes(batch)
    for number in numbers:
        client.answer(number)
    record = supervisor.wait_finished("j")
    assert (record.outcome, record.signal) == (Outcome.STOPPED, signal.SIGKILL)


def test_stop_of_a_finished_job_is_fine_and_of_an_unknown_one_is_not(supervisor: SupervisorProcess) -> None:
    record = supervisor.finish("j", programs.TRUE)
    supervisor.client.ask("stop", job_id="j")
    assert supervisor.record("j") == record
    with pytest.raises(Refused, match="not_found: job not found"):
        supervisor.client.ask("stop", job_id="unknown")


def test_stop_of_one_that_waits(state: Path) -> None:
    with with_slots(state, 1) as supervisor:
        supervisor.run("a", programs.SLEEP)
        assert supervisor.run("b", programs.SLEEP)["state"] == JobState.QUEUED
        assert supervisor.run("c", programs.SLEEP)["state"] == JobState.QUEUED
        supervisor.client.ask("stop", job_id="b")
        record = supervisor.record("b")
        assert (record.state, record.outcome, record.pid) == (JobState.FINISHED, Outcome.STOPPED, 0)
        assert record.reason == "stopped before it started"
        status = supervisor.client.ask("status")
        assert (status["running"], status["queued"]) == (1, 1)
        supervisor.client.ask("stop", job_id="a")
        supervisor.wait_state("c", JobState.RUNNING)
        assert supervisor.record("b") == record


def test_jobs_stopped_in_the_queue_leave_nothing_behind(state: Path) -> None:
    with with_slots(state, 1) as supervisor:
        supervisor.run("a", programs.SLEEP)
        client = supervisor.client

        def churn(name: str, count: int) -> None:
            numbers = []
            for n in range(count):
                numbers.append(client.send("start", **start_fields(f"{name}{n}", programs.SLEEP, env={"X": "x" * 100})))
                numbers.append(client.send("stop", job_id=f"{name}{n}"))
                if len(numbers) > 200:
                    for number in numbers:
                        client.answer(number)
                    numbers.clear()
            for number in numbers:
                client.answer(number)

        churn("warm", 3000)
        before = rss_bytes(supervisor.pid)
        churn("more", 4000)
        grown = rss_bytes(supervisor.pid) - before
        assert grown < 768 * 1024, f"{grown} bytes for 4000 jobs that are finished"


# Time limits


def test_timeout(supervisor: SupervisorProcess) -> None:
    record = supervisor.finish("j", programs.SLEEP, timeout_s=0.3)
    assert (record.outcome, record.signal) == (Outcome.TIMED_OUT, signal.SIGTERM)
    assert record.reason == "timed out after 0.3 s (signal: terminated)"
    assert record.wall_ns is not None
    assert record.wall_ns >= 300_000_000


def test_timeout_of_one_that_ignores_the_signal(supervisor: SupervisorProcess) -> None:
    record = supervisor.finish("j", programs.IGNORE_TERM, timeout_s=0.5, stop_grace_s=0.2)
    assert record.outcome is Outcome.TIMED_OUT
    assert record.reason in ("timed out after 0.5 s (signal: killed)", "timed out after 0.5 s (signal: terminated)")


def test_time_in_the_queue_does_not_count(state: Path, tmp_path: Path) -> None:
    with with_slots(state, 1) as supervisor:
        supervisor.run("a", programs.sleeps(2.5))
        supervisor.run("b", programs.TRUE, timeout_s=2.0)
        assert supervisor.wait_finished("b").outcome is Outcome.SUCCEEDED


def test_a_stop_before_the_timeout_is_a_stop(supervisor: SupervisorProcess) -> None:
    supervisor.run("j", programs.IGNORE_TERM, timeout_s=0.6, stop_grace_s=1.0)
    supervisor.wait_output("j", b"ready\n")
    supervisor.client.ask("stop", job_id="j")
    assert supervisor.wait_finished("j").outcome is Outcome.STOPPED


def test_a_stop_with_a_long_grace_does_not_outlast_the_timeout(supervisor: SupervisorProcess) -> None:
    """From the timeout on, the job has its own grace at most, and was stopped all the same."""
    supervisor.run("j", programs.IGNORE_TERM, timeout_s=0.6, stop_grace_s=0.3)
    supervisor.wait_output("j", b"ready\n")
    supervisor.client.ask("stop", job_id="j", signal=None, grace_s=DURATION_MAX_S)
    record = supervisor.wait_finished("j")
    assert (record.outcome, record.signal) == (Outcome.STOPPED, signal.SIGKILL)
    assert record.wall_ns is not None
    assert record.wall_ns >= 900_000_000


def test_a_timeout_does_not_lengthen_the_grace(supervisor: SupervisorProcess) -> None:
    supervisor.run("j", programs.IGNORE_TERM, timeout_s=0.5, stop_grace_s=1000)
    supervisor.wait_output("j", b"ready\n")
    supervisor.client.ask("stop", job_id="j", signal=None, grace_s=0.8)
    assert supervisor.wait_finished("j").signal == signal.SIGKILL


@pytest.mark.parametrize("timeout_s", [30 * 86400.0, DURATION_MAX_S])
def test_a_timeout_in_the_far_future(supervisor: SupervisorProcess, timeout_s: float) -> None:
    """Farther than epoll can wait in one go (2**31 ms)."""
    supervisor.run("j", programs.SLEEP, timeout_s=timeout_s)
    supervisor.client.ask("status")
    supervisor.client.ask("stop", job_id="j")
    assert supervisor.wait_finished("j").outcome is Outcome.STOPPED
    assert supervisor.process is not None
    assert supervisor.process.poll() is None, supervisor.log()


def test_an_idle_exit_in_the_far_future(state: Path) -> None:
    with SupervisorProcess(state, idle_exit_s=DURATION_MAX_S) as supervisor:
        supervisor.client.ask("status")
        supervisor.hang_up()
        for _ in range(3):
            supervisor.client.ask("status")
            supervisor.hang_up()
