"""The life of the supervisor, as a process of its own, with real children."""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support import programs
from tests.support.programs import children_of, is_alive, open_fds, rss_bytes, sleeps_for, status_field
from tests.support.supervised import IS_ROOT
from tests.support.waiting import eventually_sync
from tests.support.workers import (
    PATIENCE_S,
    Refused,
    SocketClient,
    SupervisorProcess,
    start_fields,
)
from worker_svc.ipc import messages
from worker_svc.job import Outcome
from worker_svc.record import paths
from worker_svc.supervisor.spawn import IMPLEMENTATION, NATIVE

# The life of the supervisor


def test_it_leaves_when_idle(state: Path) -> None:
    with SupervisorProcess(state, idle_exit_s=0.2) as supervisor:
        supervisor.finish("j", programs.TRUE)
        supervisor.hang_up()
        assert supervisor.wait_exit() == 0
        assert not (state / paths.SOCKET_NAME).exists()
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
    assert second.wait(PATIENCE_S) == messages.EXIT_LOCKED == 3
    supervisor.client.ask("status")


def test_a_socket_left_by_one_that_was_killed(supervisor: SupervisorProcess, state: Path) -> None:
    supervisor.client.ask("status")
    supervisor.kill()
    assert (state / paths.SOCKET_NAME).exists()
    supervisor.start()
    assert supervisor.finish("j", programs.exits(3)).exit_code == 3


def test_what_is_in_the_place_of_the_socket_is_replaced(state: Path) -> None:
    state.mkdir()
    (state / paths.SOCKET_NAME).symlink_to("/nowhere")
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
fd = os.open(f"/proc/self/fd/{{folder}}/{paths.SOCKET_NAME}", os.O_PATH)
os.chmod({str(supervisor.path)!r}, 0o755); os.chmod({str(supervisor.path / paths.SOCKET_NAME)!r}, 0o666)
os.setuid(65534)
s.connect(f"/proc/self/fd/{{folder}}/{paths.SOCKET_NAME}")
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
    silent.connect(f"/proc/self/fd/{folder}/{paths.SOCKET_NAME}")
    os.close(folder)
    supervisor.finish("j", programs.TRUE)
    supervisor.client.ask("status")
    assert select.select([silent], [], [], 0.0)[0] == []
    silent.close()


@contextmanager
def closing_process(supervisor: SupervisorProcess) -> Iterator[None]:
    """Closes a supervisor that was started already."""
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
