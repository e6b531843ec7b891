"""The supervisor, as a process of its own, with real children: what a worker relies on."""

from __future__ import annotations

import hashlib
import os
import resource
import select
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from tests.support import programs
from tests.support.programs import children_of, group_of, is_alive, open_fds, rss_bytes, sleeps_for, status_field
from tests.support.waiting import eventually_sync
from tests.support.workers import (
    BASE_ENV,
    PATIENCE_S,
    Refused,
    SocketClient,
    SupervisorProcess,
    environment_of,
    key_of,
    start_fields,
    with_spec,
)
from worker_svc.ipc import frames
from worker_svc.job import DURATION_MAX_S, SPEC_MAX_BYTES, JobRecord, JobState, Outcome
from worker_svc.supervisor.containment.marks import Marks
from worker_svc.supervisor.livejob import LiveJob
from worker_svc.supervisor.spawn import IMPLEMENTATION, NATIVE
from worker_svc.supervisor.timers import Timers

IS_ROOT = os.geteuid() == 0


def with_slots(state: Path, slots: int, queue_length: int = 100) -> SupervisorProcess:
    return SupervisorProcess(state, slots=slots, queue_length=queue_length)


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
    code = "x = bytearray(64 << 20)\nfor i in range(0, len(x), 4096): x[i] = 1\nfor i in range(2_000_000): pass"
    record = supervisor.finish("j", programs.python(code))
    assert record.cpu_ns is not None
    assert record.cpu_ns > 20_000_000
    assert record.peak_memory_bytes is not None
    assert 64 << 20 < record.peak_memory_bytes < 256 << 20


# Stopping


def test_stop(supervisor: SupervisorProcess) -> None:
    supervisor.run("j", programs.SLEEP)
    supervisor.client.ask("stop", id="j", signal=None, grace_s=None)
    record = supervisor.wait_finished("j")
    assert (record.outcome, record.signal, record.reason) == (Outcome.STOPPED, signal.SIGTERM, "signal: terminated")
    assert [event.reason for event in supervisor.events()][2:] == ["stop requested", "signal: terminated"]


def test_stop_with_the_jobs_own_signal(supervisor: SupervisorProcess) -> None:
    supervisor.run("j", programs.EXIT_ON_USR1, stop_signal=int(signal.SIGUSR1))
    supervisor.wait_output("j", b"ready\n")
    supervisor.client.ask("stop", id="j")
    record = supervisor.wait_finished("j")
    assert (record.outcome, record.exit_code) == (Outcome.STOPPED, 7)
    assert record.reason == "stopped (exit status 7)"


def test_after_the_grace_it_is_killed(supervisor: SupervisorProcess) -> None:
    supervisor.run("j", programs.IGNORE_TERM, stop_grace_s=0.3)
    supervisor.wait_output("j", b"ready\n")
    asked = time.monotonic()
    supervisor.client.ask("stop", id="j")
    assert supervisor.record("j").state is JobState.STOPPING
    record = supervisor.wait_finished("j")
    assert time.monotonic() - asked >= 0.3
    assert (record.outcome, record.signal, record.reason) == (Outcome.STOPPED, signal.SIGKILL, "signal: killed")


def test_asked_again_the_nearer_end_counts(supervisor: SupervisorProcess) -> None:
    supervisor.run("j", programs.IGNORE_TERM, stop_grace_s=600.0)
    supervisor.wait_output("j", b"ready\n")
    supervisor.client.ask("stop", id="j")
    assert supervisor.record("j").state is JobState.STOPPING
    supervisor.client.ask("stop", id="j", grace_s=0.2)
    supervisor.client.ask("stop", id="j", grace_s=600.0)
    assert supervisor.wait_finished("j").signal == signal.SIGKILL


def test_no_grace_is_kill_at_once(supervisor: SupervisorProcess) -> None:
    supervisor.run("j", programs.IGNORE_TERM, stop_grace_s=600.0)
    supervisor.client.ask("stop", id="j", grace_s=0.0)
    assert supervisor.wait_finished("j").signal in (signal.SIGKILL, signal.SIGTERM)  # before or after its trap


def test_asked_again_with_another_signal(supervisor: SupervisorProcess) -> None:
    argv = ["sh", "-c", "trap '' TERM; trap 'exit 7' USR1; echo ready; while :; do sleep 999 & wait; done"]
    supervisor.run("j", argv, stop_grace_s=600.0)
    supervisor.wait_output("j", b"ready\n")
    supervisor.client.ask("stop", id="j")
    supervisor.client.ask("stop", id="j", signal=int(signal.SIGUSR1))
    assert supervisor.wait_finished("j").exit_code == 7


def test_stops_that_come_before_the_process_does(supervisor: SupervisorProcess) -> None:
    """All in one turn: the nearer end counts here too. SIGCONT does nothing, so that only the grace can end it."""
    client = supervisor.client
    fields = start_fields("j", programs.SLEEP, stop_signal=int(signal.SIGCONT), stop_grace_s=600.0)
    numbers, batch = [], b""
    for op, rest in (("start", fields), ("stop", {"id": "j", "grace_s": 0.0}), ("stop", {"id": "j"})):
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
    supervisor.client.ask("stop", id="j")
    assert supervisor.record("j") == record
    with pytest.raises(Refused, match="not_found: job not found"):
        supervisor.client.ask("stop", id="unknown")


def test_stop_of_one_that_waits(state: Path) -> None:
    with with_slots(state, 1) as supervisor:
        supervisor.run("a", programs.SLEEP)
        assert supervisor.run("b", programs.SLEEP)["state"] == JobState.QUEUED
        assert supervisor.run("c", programs.SLEEP)["state"] == JobState.QUEUED
        supervisor.client.ask("stop", id="b")
        record = supervisor.record("b")
        assert (record.state, record.outcome, record.pid) == (JobState.FINISHED, Outcome.STOPPED, 0)
        assert record.reason == "stopped before it started"
        status = supervisor.client.ask("status")
        assert (status["running"], status["queued"]) == (1, 1)
        supervisor.client.ask("stop", id="a")
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
                numbers.append(client.send("stop", id=f"{name}{n}"))
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
        supervisor.run("a", programs.until_exists(tmp_path / "go"))
        queued = time.monotonic()
        supervisor.run("b", programs.until_exists(tmp_path / "go"), timeout_s=0.4)
        eventually_sync(lambda: time.monotonic() - queued > 0.5)
        (tmp_path / "go").touch()
        assert supervisor.wait_finished("b").outcome is Outcome.SUCCEEDED


def test_a_stop_before_the_timeout_is_a_stop(supervisor: SupervisorProcess) -> None:
    supervisor.run("j", programs.IGNORE_TERM, timeout_s=0.6, stop_grace_s=1.0)
    supervisor.wait_output("j", b"ready\n")
    supervisor.client.ask("stop", id="j")
    assert supervisor.wait_finished("j").outcome is Outcome.STOPPED


def test_a_stop_with_a_long_grace_does_not_outlast_the_timeout(supervisor: SupervisorProcess) -> None:
    """From the timeout on, the job has its own grace at most, and was stopped all the same."""
    supervisor.run("j", programs.IGNORE_TERM, timeout_s=0.6, stop_grace_s=0.3)
    supervisor.wait_output("j", b"ready\n")
    supervisor.client.ask("stop", id="j", signal=None, grace_s=DURATION_MAX_S)
    record = supervisor.wait_finished("j")
    assert (record.outcome, record.signal) == (Outcome.STOPPED, signal.SIGKILL)
    assert record.wall_ns is not None
    assert record.wall_ns >= 900_000_000


def test_a_timeout_does_not_lengthen_the_grace(supervisor: SupervisorProcess) -> None:
    supervisor.run("j", programs.IGNORE_TERM, timeout_s=0.5, stop_grace_s=1000)
    supervisor.wait_output("j", b"ready\n")
    supervisor.client.ask("stop", id="j", signal=None, grace_s=0.8)
    assert supervisor.wait_finished("j").signal == signal.SIGKILL


@pytest.mark.parametrize("timeout_s", [30 * 86400.0, DURATION_MAX_S])
def test_a_timeout_in_the_far_future(supervisor: SupervisorProcess, timeout_s: float) -> None:
    """Farther than epoll can wait in one go (2**31 ms)."""
    supervisor.run("j", programs.SLEEP, timeout_s=timeout_s)
    supervisor.client.ask("status")
    supervisor.client.ask("stop", id="j")
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


def test_timers_of_finished_jobs_do_not_pile_up() -> None:
    """A day's worth of jobs with a timeout of a day must not be kept for a day (budget: 0 for finished jobs)."""
    timers = Timers(Mock())
    for number in range(10_000):
        job = LiveJob(str(number), "", 0)
        job.state = JobState.RUNNING
        timers.after(86400.0, lambda: None, job)
        job.state = JobState.FINISHED
    assert len(timers._heap) < 1000


# Slots and the queue


def test_slots_and_the_order_of_the_queue(state: Path, tmp_path: Path) -> None:
    with with_slots(state, 2) as supervisor:
        states = [supervisor.run(job_id, programs.until_exists(tmp_path / job_id))["state"] for job_id in "abcde"]
        assert states == [JobState.RUNNING] * 2 + [JobState.QUEUED] * 3
        status = supervisor.client.ask("status")
        assert (status["running"], status["queued"]) == (2, 3)
        (tmp_path / "b").touch()
        supervisor.wait_state("c", JobState.RUNNING)
        assert supervisor.record("d").state is JobState.QUEUED
        for job_id in "acde":
            (tmp_path / job_id).touch()
        for job_id in "abcde":
            assert supervisor.wait_finished(job_id).outcome is Outcome.SUCCEEDED
        events = supervisor.events()
        launched = [event.job_id for event in events if event.to_state is JobState.STARTING]
        assert launched == ["a", "b", "c", "d", "e"]
        assert all(event.queued_ns is not None for event in events if event.to_state is JobState.STARTING)
        running = 0
        for event in events:
            running += (event.to_state is JobState.STARTING) - (event.to_state is JobState.FINISHED)
            assert running <= 2


def test_above_the_queue_is_refused(state: Path) -> None:
    with with_slots(state, 1, 1) as supervisor:
        supervisor.run("a", programs.SLEEP)
        supervisor.run("b", programs.SLEEP)
        with pytest.raises(Refused, match=r"exhausted: .*jobs\.queue_length") as caught:
            supervisor.run("c", programs.SLEEP)
        assert caught.value.code == "exhausted"
        assert len(supervisor.events()) == 3  # of a and b; c left no trace
        assert supervisor.run("b", programs.SLEEP) == {"state": JobState.QUEUED, "existed": True}
        supervisor.client.ask("stop", id="b")
        assert supervisor.run("c", programs.SLEEP)["state"] == JobState.QUEUED


def test_no_queue_at_all(state: Path) -> None:
    with with_slots(state, 1, 0) as supervisor:
        supervisor.run("a", programs.SLEEP)
        with pytest.raises(Refused, match="exhausted"):
            supervisor.run("b", programs.SLEEP)
        supervisor.client.ask("stop", id="a")
        supervisor.wait_finished("a")
        assert supervisor.run("b", programs.TRUE)["state"] == JobState.RUNNING


def test_new_settings_hold_at_once(state: Path) -> None:
    with with_slots(state, 1) as supervisor:
        supervisor.run("a", programs.SLEEP)
        supervisor.run("b", programs.SLEEP)
        supervisor.client.hello(slots=2)
        supervisor.wait_state("b", JobState.RUNNING)
        supervisor.client.hello(slots=1)
        assert supervisor.run("c", programs.SLEEP)["state"] == JobState.QUEUED


def test_a_queued_job_that_cannot_start(state: Path) -> None:
    with with_slots(state, 1) as supervisor:
        supervisor.run("a", programs.SLEEP)
        supervisor.run("b", ["no-such-command"])
        supervisor.run("c", programs.TRUE)
        supervisor.client.ask("stop", id="a")
        record = supervisor.wait_finished("b")
        assert (record.outcome, record.pid) == (Outcome.START_FAILED, 0)
        assert record.reason.startswith("command: 'no-such-command' was not found")
        assert supervisor.wait_finished("c").outcome is Outcome.SUCCEEDED


def test_a_slot_that_falls_free_in_the_same_turn(state: Path, tmp_path: Path) -> None:
    """The answer is RUNNING or QUEUED, as the contract says, never STARTING."""
    with with_slots(state, 1) as supervisor:
        supervisor.run("a", programs.until_exists(tmp_path / "go"))
        with supervisor.paused():
            # The request is ready before the exit is, so that it finds no slot.
            number = supervisor.client.send("start", **start_fields("b", programs.SLEEP))
            (tmp_path / "go").touch()
            eventually_sync(lambda: programs.state_of(supervisor.record("a").pid) == "Z")
        answer = supervisor.client.answer(number)
        assert answer["existed"] is False
        assert JobState(answer["state"]) in (JobState.QUEUED, JobState.RUNNING)
        supervisor.wait_state("b", JobState.RUNNING)


# The same start again


def test_the_same_start_again(supervisor: SupervisorProcess) -> None:
    supervisor.run("j", programs.SLEEP, fp="one")
    assert supervisor.run("j", programs.SLEEP, fp="one") == {"state": JobState.RUNNING, "existed": True}
    with pytest.raises(Refused, match="exists: job_id"):
        supervisor.run("j", programs.SLEEP, fp="two")
    supervisor.client.ask("stop", id="j")
    supervisor.wait_finished("j")
    assert supervisor.run("j", programs.SLEEP, fp="one") == {"state": JobState.FINISHED, "existed": True}
    with pytest.raises(Refused, match="exists: job_id"):
        supervisor.run("j", programs.SLEEP, fp="two")
    assert [event.to_state.name for event in supervisor.events()] == ["STARTING", "RUNNING", "STOPPING", "FINISHED"]


def test_the_same_start_of_one_that_could_not_start(supervisor: SupervisorProcess) -> None:
    texts = []
    for _ in range(2):
        with pytest.raises(Refused) as caught:
            supervisor.run("j", ["no-such-command"], fp="one")
        assert caught.value.code == "precondition"
        texts.append(caught.value.text)
    assert texts[0] == texts[1] == supervisor.record("j").reason
    assert len(supervisor.events()) == 2


@pytest.mark.parametrize("argv", [programs.SLEEP, ["no-such-command"]], ids=["starts", "fails"])
def test_many_of_the_same_start_in_one_turn(supervisor: SupervisorProcess, argv: list[str]) -> None:
    clients = [supervisor.connect() for _ in range(3)]
    asked = []
    with supervisor.paused():
        for client in clients * 2:
            asked.append((client, client.send("start", **start_fields("j", argv, fp="one"))))
        other = clients[0].send("start", **start_fields("j", argv, fp="two"))
    with pytest.raises(Refused, match="exists"):
        clients[0].answer(other)
    answers: list[Any] = []
    for client, number in asked:
        try:
            answers.append(client.answer(number))
        except Refused as error:
            answers.append(error.code)
    if argv is programs.SLEEP:
        assert all(answer["state"] == JobState.RUNNING for answer in answers)
        assert [answer["existed"] for answer in answers].count(False) == 1
        assert len(children_of(supervisor.pid)) == 1
    else:
        assert answers == ["precondition"] * 6
    for client in clients:
        client.close()


def test_who_hangs_up_is_not_answered_and_the_job_runs(supervisor: SupervisorProcess) -> None:
    with supervisor.paused():
        client = SocketClient(supervisor.path)
        key = key_of(supervisor.path)
        client.send("hello", protocol=frames.PROTOCOL_VERSION, version="test", key=key, settings={})
        client.send("start", **start_fields("j", programs.exits(3)))
        client.close()
    eventually_sync(lambda: supervisor.events(), PATIENCE_S)
    assert supervisor.wait_finished("j").exit_code == 3


# What a job is given


@pytest.mark.parametrize(
    "content",
    [b"", b"\0", b"x", b"line\n" * 1000, bytes(range(256)) * 4096],
    ids=["empty", "one NUL", "one byte", "lines", "1 MiB with NULs"],
)
def test_standard_input(supervisor: SupervisorProcess, content: bytes) -> None:
    assert supervisor.finish("j", programs.CAT_STDIN, stdin=content).exit_code == 0
    assert hashlib.sha256(supervisor.output("j")).digest() == hashlib.sha256(content).digest()


def test_standard_input_of_one_that_waited(state: Path) -> None:
    with with_slots(state, 1) as supervisor:
        supervisor.run("a", programs.SLEEP)
        supervisor.run("j", programs.CAT_STDIN, stdin=b"\0secret")
        supervisor.client.ask("stop", id="a")
        supervisor.wait_finished("j")
        assert supervisor.output("j") == b"\0secret"


def test_without_standard_input_it_is_dev_null(supervisor: SupervisorProcess) -> None:
    supervisor.run("j", programs.SLEEP)
    assert Path(f"/proc/{supervisor.record('j').pid}/fd/0").readlink() == Path("/dev/null")


def marks(supervisor: SupervisorProcess, job_id: str) -> dict[str, str]:
    """What tells a process of this job from all others."""
    with closing(sqlite3.connect(supervisor.path / "jobs.sqlite3")) as db:
        state_id, secret = (
            db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()[0]
            for key in ("state_id", "mark_secret")
        )
    made = Marks(state_id, bytes.fromhex(secret))
    return made.variables(job_id, made.of(job_id, supervisor.record(job_id).accepted_ns))


def test_the_environment_is_exactly_what_was_asked_for(supervisor: SupervisorProcess) -> None:
    asked = {"A": "", "B": "x=y\nz", "MARK": "over", "WORKER_JOB_ID": "a lie", "WORKER_JOB_MARK": "x", "é": "ü"}
    supervisor.run("j", programs.SLEEP, env=asked)
    assert environment_of(supervisor.record("j").pid) == {**BASE_ENV, **asked, **marks(supervisor, "j")}
    supervisor.run("plain", programs.SLEEP)
    assert environment_of(supervisor.record("plain").pid) == {**BASE_ENV, **marks(supervisor, "plain")}


def test_a_job_has_its_three_files_and_no_other(supervisor: SupervisorProcess) -> None:
    others = [supervisor.connect() for _ in range(5)]
    for number in range(10):
        supervisor.run(f"j{number}", programs.SLEEP, stdin=b"x", separate_stderr=bool(number % 2))
    for number in range(10):
        assert open_fds(supervisor.record(f"j{number}").pid) == [0, 1, 2]
    for client in others:
        client.close()


def test_a_job_leads_a_session_with_default_signals(supervisor: SupervisorProcess) -> None:
    supervisor.run("j", programs.SLEEP)
    pid = supervisor.record("j").pid
    assert os.getpgid(pid) == os.getsid(pid) == pid
    assert [status_field(pid, name) for name in ("SigIgn", "SigBlk", "SigCgt")] == [0, 0, 0]


def test_a_supervisor_started_with_odd_signals_gives_jobs_default_ones(state: Path) -> None:
    supervisor = SupervisorProcess(state)
    odd = "import os, signal, sys\n"
    odd += "for n in (1, 2, 13, 15, 17): signal.signal(n, signal.SIG_IGN)\n"
    odd += "signal.pthread_sigmask(signal.SIG_BLOCK, {1, 10, 15, 17})\n"
    odd += "os.execv(sys.argv[1], sys.argv[1:])"
    supervisor.run_as = [sys.executable, "-S", "-c", odd]
    with supervisor:
        supervisor.run("j", programs.SLEEP)
        pid = supervisor.record("j").pid
        assert [status_field(pid, name) for name in ("SigIgn", "SigBlk", "SigCgt")] == [0, 0, 0]
        supervisor.client.ask("stop", id="j")
        assert supervisor.wait_finished("j").signal == signal.SIGTERM


def test_the_working_directory(supervisor: SupervisorProcess, tmp_path: Path) -> None:
    supervisor.finish("j", programs.PRINT_CWD, cwd=str(tmp_path))
    assert supervisor.output("j") == f"{tmp_path}\n".encode()


def test_a_bare_command_is_looked_up_in_the_jobs_path(supervisor: SupervisorProcess, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    make_script(tmp_path / "bin" / "my-command", "#!/bin/sh\necho mine\n")
    supervisor.finish("absolute", ["my-command"], env={"PATH": f"/nowhere:{tmp_path}/bin"})
    supervisor.finish("relative", ["my-command"], env={"PATH": "bin:/bin"}, cwd=str(tmp_path))
    supervisor.finish("slash", ["bin/my-command"], cwd=str(tmp_path))
    for job_id in ("absolute", "relative", "slash"):
        assert supervisor.output(job_id) == b"mine\n"


def make_script(path: Path, text: str, mode: int = 0o755) -> str:
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_the_command_comes_to_the_process_as_it_was_asked_for(supervisor: SupervisorProcess) -> None:
    supervisor.run("j", ["sleep", "999"])
    assert Path(f"/proc/{supervisor.record('j').pid}/cmdline").read_bytes() == b"sleep\x00999\x00"
    supervisor.finish("k", ["printf", "[%s]", "", " ", "é", "a\nb", "*", "$HOME"])
    assert supervisor.output("k").decode() == "[][ ][é][a\nb][*][$HOME]"
    spec = {"command": "sh", "path": "-c", "args": ["echo $0", "zero"], "cwd": "/"}
    supervisor.client.ask("start", id="path", fp="", spec=spec)
    supervisor.wait_finished("path")
    assert supervisor.output("path") == b"zero\n"


# Output


def test_standard_error_in_the_output(supervisor: SupervisorProcess, state: Path) -> None:
    record = supervisor.finish("j", programs.BOTH_OUTPUTS)
    assert supervisor.output("j") == b"to stdout\nto stderr\n"
    assert (record.output_size_bytes, record.stderr_size_bytes) == (20, None)
    assert not (state / "output" / "j.err").exists()
    assert stat.S_IMODE((state / "output" / "j.out").stat().st_mode) == 0o600


def test_standard_error_apart(supervisor: SupervisorProcess, state: Path) -> None:
    record = supervisor.finish("j", programs.BOTH_OUTPUTS, separate_stderr=True)
    assert supervisor.output("j") == b"to stdout\n"
    assert (state / "output" / "j.err").read_bytes() == b"to stderr\n"
    assert (record.output_size_bytes, record.stderr_size_bytes) == (10, 10)


def test_a_job_is_done_when_its_process_is(supervisor: SupervisorProcess) -> None:
    record = supervisor.finish("j", programs.LEAVES_CHILD)
    assert (record.outcome, record.exit_code) == (Outcome.FAILED, 3)
    eventually_sync(lambda: not group_of(record.pid), PATIENCE_S, "its child was left")


# What cannot be started


@pytest.mark.parametrize(
    "case, expected",
    [
        ("not found", "command: 'no-such-command' was not found in the job's PATH: give its whole path"),
        ("not found, absolute", "command: {tmp}/missing: no such file or directory"),
        ("not executable", "command: {tmp}/plain is not executable"),
        ("not executable, bare", "command: {tmp}/plain is not executable"),
        ("directory", "command: {tmp}/folder is a directory, not a program"),
        ("below a file", "command: {tmp}/plain/x: not a directory"),
        ("missing interpreter", "command: {tmp}/odd: its interpreter '/no/such/interpreter' cannot be run"),
        ("no shebang", "command: {tmp}/bare is not a program for this machine"),
        ("empty file", "command: {tmp}/empty is not a program for this machine"),
        ("cwd missing", "cwd: {tmp}/missing: no such file or directory"),
        ("cwd a file", "cwd: {tmp}/plain is not a directory"),
        ("path too long", "command: {long}…: file name too long"),
    ],
)
def test_what_cannot_be_started(supervisor: SupervisorProcess, tmp_path: Path, case: str, expected: str) -> None:
    (tmp_path / "folder").mkdir()
    make_script(tmp_path / "plain", "#!/bin/sh\n", 0o644)
    make_script(tmp_path / "odd", "#!/no/such/interpreter -x\n")
    make_script(tmp_path / "bare", "echo no shebang\n")
    make_script(tmp_path / "empty", "")
    long = f"/{'x' * 300}"
    argv, spec = {
        "not found": (["no-such-command"], {}),
        "not found, absolute": ([f"{tmp_path}/missing"], {}),
        "not executable": ([f"{tmp_path}/plain"], {}),
        "not executable, bare": (["plain"], {"env": {"PATH": str(tmp_path)}}),
        "directory": ([f"{tmp_path}/folder"], {}),
        "below a file": ([f"{tmp_path}/plain/x"], {}),
        "missing interpreter": ([f"{tmp_path}/odd"], {}),
        "no shebang": ([f"{tmp_path}/bare"], {}),
        "empty file": ([f"{tmp_path}/empty"], {}),
        "cwd missing": (["true"], {"cwd": f"{tmp_path}/missing"}),
        "cwd a file": (["true"], {"cwd": f"{tmp_path}/plain"}),
        "path too long": ([long], {}),
    }[case]
    with pytest.raises(Refused) as caught:
        supervisor.run("j", argv, stdin=b"input", separate_stderr=True, **spec)  # type: ignore[arg-type]
    assert caught.value.code == "precondition"
    assert caught.value.text.startswith(expected.format(tmp=tmp_path, long=long[:256]))
    record = supervisor.record("j")
    assert (record.state, record.outcome, record.pid) == (JobState.FINISHED, Outcome.START_FAILED, 0)
    assert record.reason == caught.value.text
    assert [event.to_state.name for event in supervisor.events()] == ["STARTING", "FINISHED"]
    assert not list((supervisor.path / "output").iterdir())  # undone as a whole
    assert supervisor.client.ask("status")["running"] == 0


def test_too_long_for_this_machine(supervisor: SupervisorProcess) -> None:
    limits = {"rlimits": {"stack": [8 * 1024 * 1024, None]}}  # of which a quarter is for arguments
    with pytest.raises(Refused, match=r"precondition: args: .* too long"):
        supervisor.run("j", ["true", *["x" * 131_000] * 23], process_limits=limits)


@pytest.mark.skipif(not IS_ROOT, reason="needs root to become another user")
def test_a_job_that_became_another_user(state: Path, tmp_path: Path) -> None:
    """Like `sudo` under an ordinary user: it may not be signalled, and its end must not bring the supervisor down."""
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("setpriv (util-linux) is not there")
    folder = _reachable_by_all(tmp_path)
    for path in (state, folder):
        path.mkdir(mode=0o700)
        os.chown(path, 65534, 65534)
    as_root = folder / "as-root"
    shutil.copy(setpriv, as_root)
    as_root.chmod(0o4755)
    probe = subprocess.run(
        [setpriv, "--reuid", "65534", "--clear-groups", str(as_root), "--reuid", "0", "id", "-ru"],
        capture_output=True, check=False, cwd="/",
    )  # fmt: skip
    if probe.stdout != b"0\n":
        pytest.skip(f"set-user-ID programs do not work in {folder}: {probe.stderr.decode()}")
    code = "import worker_svc.supervisor.loop"
    importable = subprocess.run(
        [setpriv, "--reuid", "65534", "--clear-groups", sys.executable, "-S", "-c", code],
        env={"PYTHONPATH": str(Path(__file__).parent.parent.parent)}, capture_output=True, check=False,
    )  # fmt: skip
    if importable.returncode:
        pytest.skip(f"another user cannot run this Python: {importable.stderr.decode()[-200:]}")
    supervisor = SupervisorProcess(state)
    supervisor.run_as = [setpriv, "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    with supervisor:
        supervisor.run("j", [str(as_root), "--reuid", "0", "sleep", "999"], identity={"no_new_privs": False})
        pid = supervisor.record("j").pid

        def is_root() -> bool:
            if supervisor.record("j").state is JobState.FINISHED:
                pytest.skip(f"jobs cannot become another user here: {supervisor.output('j').decode().strip()}")
            with suppress(FileNotFoundError):  # it has ended meanwhile
                return status_field(pid, "Uid", 10) == 0
            return False

        eventually_sync(is_root, PATIENCE_S)
        with pytest.raises(Refused, match="precondition: the supervisor may not signal"):
            supervisor.client.ask("signal", id="j", signal=int(signal.SIGTERM))
        supervisor.client.ask("stop", id="j", grace_s=0.0)
        os.kill(pid, signal.SIGKILL)
        record = supervisor.wait_finished("j")
        assert (record.outcome, record.signal) == (Outcome.STOPPED, signal.SIGKILL)
        assert supervisor.client.ask("status")["running"] == 0


def _reachable_by_all(tmp_path: Path) -> Path:
    for folder in (tmp_path, *tmp_path.parents):
        if "/pytest-of-" in str(folder):
            folder.chmod(folder.stat().st_mode | 0o055)
    return tmp_path / "bin"


# A full disk


def fill(disk: Path) -> Path:
    """Leaves not a byte free; returns the file to remove to have space again."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert os.statvfs(disk).f_bavail == 0
    return filler


def test_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    with SupervisorProcess(small_disk / "state") as supervisor:
        supervisor.run("exits", programs.until_exists(tmp_path / "go", 3))
        supervisor.run("stopped", programs.SLEEP)
        stopped_pid = supervisor.record("stopped").pid
        exits_pid = supervisor.record("exits").pid
        filler = fill(small_disk)

        with pytest.raises(Refused) as caught:
            supervisor.run("refused", programs.TRUE)
        assert caught.value.code == "exhausted"
        assert "full" in caught.value.text

        # What ends meanwhile is not lost, what is to be stopped stops.
        (tmp_path / "go").touch()
        eventually_sync(lambda: not programs.state_of(exits_pid), PATIENCE_S, "it was not reaped")
        stop = supervisor.client.send("stop", id="stopped")
        eventually_sync(lambda: not programs.state_of(stopped_pid), PATIENCE_S, "it was not stopped")
        assert supervisor.record("exits").state is JobState.RUNNING  # on record
        with pytest.raises(Refused, match="exhausted"):
            supervisor.run("refused", programs.TRUE)
        assert supervisor.client.ask("status")["running"] == 0

        filler.unlink()
        supervisor.client.answer(stop)
        assert supervisor.wait_finished("exits").exit_code == 3
        assert supervisor.wait_finished("stopped").outcome is Outcome.STOPPED
        assert supervisor.finish("refused", programs.TRUE).outcome is Outcome.SUCCEEDED
        assert [event.sequence for event in supervisor.events()] == list(range(1, len(supervisor.events()) + 1))


@pytest.mark.parametrize("slots", [1, 0], ids=["in a slot", "in the queue"])
def test_a_start_that_cannot_be_recorded_and_is_stopped_in_the_same_turn(small_disk: Path, slots: int) -> None:
    with SupervisorProcess(small_disk / "state", slots=slots) as supervisor:
        client = supervisor.client
        filler = fill(small_disk)
        start, first = client.frame("start", **start_fields("j", programs.SLEEP))
        stop, second = client.frame("stop", id="j")
        client.send_bytes(first + second)
        with pytest.raises(Refused, match="exhausted"):
            client.answer(start)
        status = client.ask("status")
        assert (status["running"], status["queued"]) == (0, 0)
        filler.unlink()
        client.answer(stop)
        status = client.ask("status")
        assert (status["running"], status["queued"]) == (0, 0)
        client.hello(slots=1)
        assert supervisor.finish("j", programs.exits(3)).exit_code == 3


def test_a_supervisor_starts_on_a_full_disk(small_disk: Path) -> None:
    """Or jobs that run could neither be seen nor stopped, until somebody has made space."""
    with SupervisorProcess(small_disk / "state") as supervisor:
        supervisor.run("j", programs.SLEEP)
        pid = supervisor.record("j").pid
        filler = fill(small_disk)
        supervisor.kill()
        supervisor.start()
        supervisor.client.send("stop", id="j")
        eventually_sync(lambda: not programs.state_of(pid), PATIENCE_S, "it was not stopped")
        filler.unlink()
        assert supervisor.wait_finished("j").outcome is Outcome.STOPPED


# Deleting


def test_delete(supervisor: SupervisorProcess, state: Path) -> None:
    supervisor.run("j", programs.SLEEP)
    with pytest.raises(Refused, match="precondition: the job is RUNNING"):
        supervisor.client.ask("delete", id="j")
    supervisor.client.ask("stop", id="j")
    supervisor.wait_finished("j")
    supervisor.client.ask("delete", id="j")
    with supervisor.reader() as reader:
        assert reader.get("j") is None
    eventually_sync(lambda: not list((state / "output").iterdir()), PATIENCE_S, "its output was left")
    with pytest.raises(Refused, match="not_found: job not found"):
        supervisor.client.ask("delete", id="j")
    assert len(supervisor.events()) == 4  # history has no gaps


def test_an_id_that_is_used_again_keeps_its_new_output(supervisor: SupervisorProcess) -> None:
    """The old output may be removed late, but never in place of the new one."""
    client = supervisor.client
    for turn in range(100):
        numbers = [client.send("delete", id="j")] if turn else []
        numbers.append(client.send("start", **start_fields("j", programs.echo(str(turn)), fp=str(turn))))
        for number in numbers:
            with suppress(Refused):  # both in one turn: then the start finds the job that is being deleted
                client.answer(number)
        record = _record_or_none(supervisor, "j")
        if record is None or record.fingerprint != str(turn):
            client.ask("start", **start_fields("j", programs.echo(str(turn)), fp=str(turn)))
        supervisor.wait_finished("j")
        assert supervisor.output("j") == str(turn).encode()


def _record_or_none(supervisor: SupervisorProcess, job_id: str) -> JobRecord | None:
    with supervisor.reader() as reader:
        return reader.get(job_id)


# The socket


def test_the_first_request_must_be_hello(supervisor: SupervisorProcess) -> None:
    client = SocketClient(supervisor.path)
    with pytest.raises(Refused, match="invalid: op: the first request must be hello"):
        client.ask("status")
    client.hello()
    client.ask("status")
    client.close()


def test_another_protocol_is_refused(supervisor: SupervisorProcess) -> None:
    client = SocketClient(supervisor.path)
    with pytest.raises(Refused) as caught:
        client.ask("hello", protocol=frames.PROTOCOL_VERSION + 1, version="99", settings={})
    assert caught.value.code == "version"
    assert f"speaks protocol {frames.PROTOCOL_VERSION}" in caught.value.text
    with pytest.raises(Refused, match="must be hello"):
        client.ask("start", **start_fields("j", programs.TRUE))
    client.close()


GARBAGE = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"\xff" * 64,
    b"\0\0\0\2\0\0\0\0[]",
    b"\0\0\0\1\0\0\0\0{",
    b"\0\0\0\2\xff\xff\xff\xff{}",
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=lambda garbage: garbage[:12].hex())
def test_who_talks_nonsense_is_hung_up_on(supervisor: SupervisorProcess, garbage: bytes) -> None:
    supervisor.run("j", programs.SLEEP)
    client = supervisor.connect()
    client.send_bytes(garbage)
    client.wait_hung_up()
    client.close()
    assert supervisor.client.ask("status")["running"] == 1


MALFORMED: list[dict[str, Any]] = [
    {},
    {"op": None},
    {"op": 1},
    {"op": ["start"]},
    {"op": "no such request"},
    {"op": "x" * 3_000_000},
    {"op": "hello"},
    {"op": "hello", "protocol": frames.PROTOCOL_VERSION},
    {"op": "hello", "protocol": frames.PROTOCOL_VERSION, "settings": 1},
    {"op": "start"},
    {"op": "start", "id": "j"},
    {"op": "start", "id": "j", "fp": ""},
    {"op": "start", "id": "j", "fp": "", "spec_bytes": 3},
    {"op": "start", "id": "j", "fp": "", "spec_bytes": "many"},
    {"op": "start", "id": "j", "fp": "", "spec_bytes": -1},
    {"op": "start", "id": "j", "fp": "", "spec_bytes": SPEC_MAX_BYTES + 1},
    {"op": "start", "id": "j", "fp": "", "spec": 1},
    {"op": "start", "id": "j", "fp": "", "spec": {}},
    {"op": "start", "id": "j", "fp": "", "spec": {"command": "true", "from_the_future": 1}},
    {"op": "start", "id": "../j", "fp": "", "spec": {"command": "true"}},
    {"op": "start", "id": "", "fp": "", "spec": {"command": "true"}},
    {"op": "stop"},
    {"op": "stop", "id": {}},
    {"op": "stop", "id": []},
    {"op": "stop", "id": None},
    {"op": "stop", "id": 1.5},
    {"op": "stop", "id": 2**70},
    {"op": "stop", "id": "running", "signal": 99},
    {"op": "stop", "id": "running", "signal": "TERM"},
    {"op": "stop", "id": "running", "grace_s": "soon"},
    {"op": "signal", "id": "running"},
    {"op": "signal", "id": "running", "signal": 99},
    {"op": "signal", "id": "running", "signal": -1},
    {"op": "signal", "id": "running", "signal": "x"},
    {"op": "delete"},
    {"op": "delete", "id": 2**70},
    {"op": "delete", "id": []},
]


@pytest.mark.parametrize("header", MALFORMED, ids=str)
def test_a_malformed_request_is_answered(supervisor: SupervisorProcess, header: dict[str, Any]) -> None:
    supervisor.run("running", programs.SLEEP)
    client = supervisor.connect()
    client.send_bytes(frames.encode(*with_spec({"r": 77, **header})))
    with pytest.raises(Refused):
        client.answer(77)
    client.ask("status")
    client.close()
    assert supervisor.client.ask("status")["running"] == 1


@pytest.mark.parametrize("number", ['"\\ud800"', "[]", "{}", "null", "1e999", "9" * 400], ids=lambda text: text[:8])
def test_a_request_number_that_is_none(supervisor: SupervisorProcess, number: str) -> None:
    supervisor.run("running", programs.SLEEP)
    client = supervisor.connect()
    for op in ('"status"', '"none"', '"stop"'):
        text = f'{{"op":{op},"r":{number}}}'.encode()
        client.send_bytes(len(text).to_bytes(4, "big") + bytes(4) + text)
    client.close()
    assert supervisor.client.ask("status")["running"] == 1


def test_a_client_that_reads_no_answers(supervisor: SupervisorProcess) -> None:
    """It costs the others nothing, and the supervisor no memory beyond a few buffers."""
    deaf = SocketClient(supervisor.path, timeout_s=1.0)
    deaf.hello()
    before = rss_bytes(supervisor.pid)
    _, frame = deaf.frame("status")
    batch = frame * 10_000
    sent = 0
    with suppress(TimeoutError):
        for _ in range(100):
            deaf.send_bytes(batch)
            sent += len(batch)
    assert sent < 50_000_000
    assert rss_bytes(supervisor.pid) - before < 16 << 20
    for number in range(20):
        supervisor.finish(f"j{number}", programs.TRUE)
    assert rss_bytes(supervisor.pid) - before < 16 << 20
    eventually_sync(lambda: sleeps_for(supervisor.pid, 0.2), message="it spins over what it cannot send")
    deaf.close()
    eventually_sync(lambda: supervisor.client.ask("status"))


def test_a_frame_that_comes_byte_by_byte(supervisor: SupervisorProcess) -> None:
    number, frame = supervisor.client.frame("start", b"in", **start_fields("j", programs.CAT_STDIN, stdin=b"in"))
    for at in range(len(frame)):
        supervisor.client.send_bytes(frame[at : at + 1])
    supervisor.client.answer(number)
    supervisor.wait_finished("j")
    assert supervisor.output("j") == b"in"


def test_many_requests_in_one_write(supervisor: SupervisorProcess) -> None:
    numbers, batch = [], b""
    for n in range(50):
        number, frame = supervisor.client.frame("start", **start_fields(f"j{n}", programs.exits(n)))
        numbers.append(number)
        batch += frame
    supervisor.client.send_bytes(batch)
    for number in numbers:
        assert supervisor.client.answer(number)["existed"] is False
    for n in range(50):
        assert supervisor.wait_finished(f"j{n}").exit_code == n


# The life of the supervisor


def test_it_leaves_when_idle(state: Path) -> None:
    with SupervisorProcess(state, idle_exit_s=0.2) as supervisor:
        supervisor.finish("j", programs.TRUE)
        supervisor.hang_up()
        assert supervisor.wait_exit() == 0
        assert not (state / frames.SOCKET_NAME).exists()
        assert '"supervisor.left"' in supervisor.log()


def test_it_stays_while_there_is_a_worker_or_a_job(state: Path, tmp_path: Path) -> None:
    with SupervisorProcess(state, idle_exit_s=0.1) as supervisor:
        supervisor.client.ask("status")
        started = time.monotonic()
        eventually_sync(lambda: time.monotonic() - started > 0.3)
        supervisor.run("j", programs.until_exists(tmp_path / "go", 3))
        supervisor.hang_up()
        started = time.monotonic()
        eventually_sync(lambda: time.monotonic() - started > 0.3)
        assert is_alive(supervisor.pid)
        (tmp_path / "go").touch()
        assert supervisor.wait_exit() == 0
        assert supervisor.record("j").exit_code == 3


def test_sigterm_without_jobs(supervisor: SupervisorProcess) -> None:
    client = supervisor.client
    os.kill(supervisor.pid, signal.SIGTERM)
    assert supervisor.wait_exit() == 0
    client.wait_hung_up()


def test_sigterm_with_jobs(supervisor: SupervisorProcess, tmp_path: Path) -> None:
    """It leaves with the last, and takes new ones until then: it may have been a job that signalled its parent."""
    supervisor.run("j", programs.until_exists(tmp_path / "go", 3))
    assert supervisor.finish("k", ["sh", "-c", "kill -TERM $PPID"]).outcome is Outcome.SUCCEEDED
    eventually_sync(lambda: "supervisor.asked_to_leave" in supervisor.log())
    assert supervisor.finish("l", programs.exits(5)).exit_code == 5
    status = supervisor.client.ask("status")
    assert (status["running"], status["is_shutting_down"]) == (1, False)
    (tmp_path / "go").touch()
    assert supervisor.wait_exit() == 0
    assert supervisor.record("j").exit_code == 3


def test_signals_meant_for_others(supervisor: SupervisorProcess) -> None:
    """None that can be caught ends it or makes it stand still, and jobs get none of its handlers."""
    supervisor.run("j", programs.SLEEP)
    faults = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
    for number in signal.valid_signals() - faults - {signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM}:
        os.kill(supervisor.pid, number)
        assert supervisor.client.ask("status")["running"] == 1, signal.Signals(number)
    assert is_alive(supervisor.record("j").pid)
    assert supervisor.finish("k", ["sh", "-c", "kill -USR1 $$"]).signal == signal.SIGUSR1


def test_shutting_down_is_told(supervisor: SupervisorProcess) -> None:
    """To whoever asks for a job, for the status, or connects."""
    supervisor.run("j", programs.SLEEP)
    supervisor.client.ask("shutdown")
    with pytest.raises(Refused, match=r"was told to shut down .* takes no new job") as caught:
        supervisor.run("k", programs.TRUE)
    assert caught.value.code == "unavailable"
    assert supervisor.client.ask("status")["is_shutting_down"]
    other = SocketClient(supervisor.path)
    assert other.hello()["is_shutting_down"]
    other.close()


def test_shutdown(supervisor: SupervisorProcess) -> None:
    assert supervisor.client.ask("shutdown") == {"jobs": 0}
    assert supervisor.wait_exit() == 0


def test_one_supervisor_a_directory(supervisor: SupervisorProcess) -> None:
    second, said = supervisor.spawn()
    assert said == f"failed: {supervisor.path} has a supervisor already (pid {supervisor.pid})"
    assert second.wait(PATIENCE_S) == frames.EXIT_LOCKED == 3
    supervisor.client.ask("status")


def test_a_socket_left_by_one_that_was_killed(supervisor: SupervisorProcess, state: Path) -> None:
    supervisor.client.ask("status")
    supervisor.kill()
    assert (state / frames.SOCKET_NAME).exists()
    supervisor.start()
    assert supervisor.finish("j", programs.exits(3)).exit_code == 3


def test_what_is_in_the_place_of_the_socket_is_replaced(state: Path) -> None:
    state.mkdir()
    (state / frames.SOCKET_NAME).symlink_to("/nowhere")
    with SupervisorProcess(state) as supervisor:
        supervisor.client.ask("status")


def test_a_state_directory_with_a_long_path(tmp_path: Path) -> None:
    folder = tmp_path
    while len(str(folder)) < 250:
        folder /= "a-rather-long-name"
    folder.mkdir(parents=True)
    with SupervisorProcess(folder / "state") as supervisor:
        assert supervisor.finish("j", programs.exits(3)).exit_code == 3


def test_a_store_it_cannot_use(state: Path) -> None:
    state.mkdir()
    (state / "jobs.sqlite3").write_bytes(b"no database" * 1000)
    process, said = SupervisorProcess(state).spawn()
    assert process.wait(PATIENCE_S) == 1
    assert said.startswith(f"failed: {state}/jobs.sqlite3: ")


def test_its_files_are_its_own(supervisor: SupervisorProcess, state: Path) -> None:
    supervisor.finish("j", programs.TRUE, env={"PASSWORD": "secret"}, stdin=b"secret")
    for path in [state, *state.rglob("*")]:
        assert not stat.S_IMODE(path.lstat().st_mode) & 0o077, path
    assert "secret" not in supervisor.log()


def test_other_users_are_not_let_in(supervisor: SupervisorProcess) -> None:
    if not IS_ROOT:
        pytest.skip("needs root to become another user")
    code = f"""
import os, socket, sys
s = socket.socket(socket.AF_UNIX)
folder = os.open({str(supervisor.path)!r}, os.O_RDONLY)
fd = os.open(f"/proc/self/fd/{{folder}}/{frames.SOCKET_NAME}", os.O_PATH)
os.chmod({str(supervisor.path)!r}, 0o755); os.chmod({str(supervisor.path / frames.SOCKET_NAME)!r}, 0o666)
os.setuid(65534)
s.connect(f"/proc/self/fd/{{folder}}/{frames.SOCKET_NAME}")
s.settimeout(20)
sys.exit(0 if s.recv(1) == b"" else 1)
"""
    (supervisor.path).chmod(0o755)
    done = subprocess.run([sys.executable, "-S", "-c", code], check=False, capture_output=True)
    if b"PermissionError" in done.stderr:
        pytest.skip("another user cannot reach the directory at all")
    assert done.returncode == 0, done.stderr
    eventually_sync(lambda: "the peer is another user" in supervisor.log())


def test_three_hundred_jobs_leave_nothing_behind(supervisor: SupervisorProcess) -> None:
    client = supervisor.client
    supervisor.finish("warm-up", programs.TRUE, stdin=b"x", separate_stderr=True)
    before = open_fds(supervisor.pid)
    argvs = [programs.TRUE, programs.exits(3), programs.kills_self(9), ["no-such-command"], programs.LEAVES_CHILD]
    numbers = [
        client.send(
            "start",
            b"x" * (n % 2),
            **start_fields(f"j{n}", argvs[n % 5], stdin=b"x" * (n % 2), separate_stderr=n % 3 == 0),
        )
        for n in range(300)
    ]
    for number in numbers:
        with suppress(Refused):
            client.answer(number)
    ends = [supervisor.wait_finished(f"j{n}") for n in range(300)]
    expected = [Outcome.SUCCEEDED, Outcome.FAILED, Outcome.SIGNALED, Outcome.START_FAILED, Outcome.FAILED]
    assert [record.outcome for record in ends] == expected * 60
    assert [record.exit_code for record in ends] == [0, 3, None, None, 3] * 60
    assert client.ask("status")["running"] == 0
    assert children_of(supervisor.pid) == []
    assert open_fds(supervisor.pid) == before
    events = supervisor.events()
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert is_alive(supervisor.pid)


def test_idle_it_costs_next_to_nothing(supervisor: SupervisorProcess) -> None:
    for number in range(20):
        supervisor.finish(f"j{number}", programs.TRUE)
    supervisor.client.ask("status")
    eventually_sync(lambda: sleeps_for(supervisor.pid, 2.0), message="it does something all the time")
    assert rss_bytes(supervisor.pid) < 20_000_000


def test_clients_that_come_and_go(supervisor: SupervisorProcess) -> None:
    supervisor.client.ask("status")
    before = open_fds(supervisor.pid)
    for number in range(50):
        client = SocketClient(supervisor.path)
        if number % 2:
            client.hello()
        client.close()
    eventually_sync(lambda: open_fds(supervisor.pid) == before, PATIENCE_S, "fds were left open")


def test_a_doorbell_is_not_rung_for_those_who_said_nothing(supervisor: SupervisorProcess) -> None:
    silent = socket.socket(socket.AF_UNIX)
    folder = os.open(supervisor.path, os.O_RDONLY)
    silent.connect(f"/proc/self/fd/{folder}/{frames.SOCKET_NAME}")
    os.close(folder)
    supervisor.finish("j", programs.TRUE)
    supervisor.client.ask("status")
    assert select.select([silent], [], [], 0.0)[0] == []
    silent.close()


@contextmanager
def closing_process(supervisor: SupervisorProcess) -> Iterator[None]:
    """Of one that was started already."""
    try:
        yield
    finally:
        supervisor.__exit__(None, None, None)


@pytest.mark.parametrize("spawner", ["native", "python"])
def test_limits_of_the_supervisors_own_do_not_reach_a_job(state: Path, spawner: str) -> None:
    """It takes all open files it may have, and protection from the OOM killer; its files are private by their mode."""
    if spawner == NATIVE != IMPLEMENTATION:
        pytest.skip("the C extension is not built")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 777), hard))
    mask = os.umask(0o027)
    try:
        supervisor = SupervisorProcess(state)
        supervisor.options = ("--spawner", spawner, "--containment", "subreaper")
        supervisor.start()
    finally:
        os.umask(mask)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with closing_process(supervisor):
        supervisor.run("j", programs.SLEEP)
        pid = supervisor.record("j").pid
        adjusted = Path("/proc/self/oom_score_adj").read_text()
        eventually_sync(lambda: resource.prlimit(pid, resource.RLIMIT_NOFILE) == (min(soft, 777), hard))
        eventually_sync(lambda: Path(f"/proc/{pid}/oom_score_adj").read_text() == adjusted)
        assert status_field(pid, "Umask", 8) == 0o027
        for name in ("jobs.sqlite3", "jobs.sqlite3-wal", "supervisor.log", "supervisor.sock", "output/j.out"):
            assert (supervisor.path / name).stat().st_mode & 0o077 == 0, name
