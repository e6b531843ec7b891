"""A supervisor that runs out of something: a job gets a clear error or waits, and the supervisor goes on."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support import programs
from tests.support.contained import skip_unless
from tests.support.programs import open_fds, status_field
from tests.support.waiting import eventually_sync
from tests.support.workers import PATIENCE_S, ROOT, Refused, SupervisorProcess, start_fields
from worker_svc.job import JobState, Outcome
from worker_svc.supervisor.containment import CGROUP, SUBREAPER

_MANY = 40


def limit_files(supervisor: SupervisorProcess) -> None:
    """To those that it has open: the limit is on numbers, and the lowest free one is taken."""
    taken = set(open_fds(supervisor.pid))
    lowest = min(set(range(len(taken) + 1)) - taken)
    _, hard = resource.prlimit(supervisor.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(supervisor.pid, resource.RLIMIT_NOFILE, (lowest, hard))


def allow_files(supervisor: SupervisorProcess) -> None:
    _, hard = resource.prlimit(supervisor.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(supervisor.pid, resource.RLIMIT_NOFILE, (hard, hard))


def test_no_file_is_left_to_start_with(supervisor: SupervisorProcess) -> None:
    supervisor.finish("before", programs.exits(1))
    limit_files(supervisor)
    with pytest.raises(Refused) as refused:
        supervisor.run("without", programs.TRUE)
    assert "too many open files" in refused.value.text.lower()
    assert supervisor.record("without").outcome is Outcome.START_FAILED
    allow_files(supervisor)
    assert supervisor.finish("after", programs.exits(2)).exit_code == 2


def test_no_file_is_left_when_jobs_end(supervisor: SupervisorProcess, tmp_path: Path) -> None:
    """Their statuses are kept until there is one."""
    for number in range(_MANY):
        supervisor.run(f"j{number}", programs.until_exists(tmp_path / "go", number))
    limit_files(supervisor)
    (tmp_path / "go").touch()
    pids = [supervisor.record(f"j{number}").pid for number in range(_MANY)]
    eventually_sync(lambda: not any(map(programs.is_alive, pids)), PATIENCE_S)
    assert supervisor.client.ask("status")["pid"] == supervisor.pid
    allow_files(supervisor)
    for number in range(_MANY):
        record = supervisor.wait_finished(f"j{number}")
        assert (record.exit_code, record.outcome is Outcome.LOST) == (number, False)
    assert supervisor.process is not None
    assert supervisor.process.poll() is None


@pytest.mark.parametrize("level", [CGROUP, SUBREAPER])
def test_no_file_is_left_to_pause_or_resume_with(tmp_path: Path, level: str) -> None:
    """What is recorded is how it is: the job that could not be paused goes on, and nobody was told that it stands."""
    skip_unless(level)
    supervisor = SupervisorProcess(tmp_path / "state")
    supervisor.options = ("--containment", level)
    with supervisor:
        count = "while :; do echo; sleep 0.01; done"
        supervisor.run("j", ["sh", "-c", f"setsid sh -c '{count}' & {count}"])
        supervisor.finish("before", programs.TRUE)
        limit_files(supervisor)
        with pytest.raises(Refused, match="unavailable"):
            supervisor.client.ask("pause", job_id="j")
        allow_files(supervisor)
        assert not supervisor.record("j").paused
        written = len(supervisor.output("j"))
        eventually_sync(lambda: len(supervisor.output("j")) > written + 10, PATIENCE_S)
        assert [moved.reason for moved in supervisor.events() if moved.job_id == "j"] == ["", ""]

        supervisor.client.ask("pause", job_id="j")
        limit_files(supervisor)
        with pytest.raises(Refused, match="unavailable"):
            supervisor.client.ask("resume", job_id="j")
        allow_files(supervisor)
        assert supervisor.record("j").paused
        supervisor.client.ask("resume", job_id="j")
        assert not supervisor.record("j").paused
        written = len(supervisor.output("j"))
        eventually_sync(lambda: len(supervisor.output("j")) > written + 10, PATIENCE_S)


@pytest.mark.parametrize("level", [CGROUP, SUBREAPER])
def test_no_file_is_left_to_stop_a_paused_job_with(tmp_path: Path, level: str) -> None:
    skip_unless(level)
    supervisor = SupervisorProcess(tmp_path / "state")
    supervisor.options = ("--containment", level)
    with supervisor:
        supervisor.run("j", programs.EXIT_ON_TERM, stop_grace_s=1000)
        supervisor.wait_output("j", b"ready\n")
        supervisor.client.ask("pause", job_id="j")
        limit_files(supervisor)
        supervisor.client.ask("stop", job_id="j", signal=None, grace_s=None)
        allow_files(supervisor)
        assert supervisor.wait_finished("j").exit_code == 5


def test_no_file_is_left_for_another_connection(supervisor: SupervisorProcess) -> None:
    supervisor.finish("before", programs.TRUE)
    limit_files(supervisor)
    code = (
        "import sys; from tests.support.workers import *; c = SocketClient(Path(sys.argv[1])); c.hello(); "
        "print(c.ask('status')['pid'])"
    )
    command = [sys.executable, "-c", code, str(supervisor.path)]
    waiting = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    eventually_sync(lambda: "connection.not_accepted" in supervisor.log(), PATIENCE_S)
    allow_files(supervisor)
    said, _ = waiting.communicate(timeout=PATIENCE_S)
    assert int(said) == supervisor.pid


def test_no_process_may_be_made(open_dir: Path) -> None:
    """RLIMIT_NPROC counts per user and does not bind root: an unprivileged user has it."""
    setpriv = shutil.which("setpriv")
    if os.geteuid() != 0 or not setpriv:
        pytest.skip("it takes root and setpriv to run as another user")
    uid = 45_678  # of nobody: it has no other process
    run_as = [setpriv, "--reuid", str(uid), "--regid", str(uid), "--clear-groups"]
    importable = subprocess.run([*run_as, sys.executable, "-c", "import ssl"], capture_output=True)
    if importable.returncode:
        pytest.skip(f"another user cannot run this Python: {importable.stderr.decode()[-200:]}")
    state = open_dir / "state"
    state.mkdir(mode=0o700)
    os.chown(state, uid, uid)
    supervisor = SupervisorProcess(state)
    supervisor.run_as = run_as
    with supervisor:
        assert supervisor.finish("before", programs.exits(3)).exit_code == 3
        threads = status_field(supervisor.pid, "Threads", 10)

        def limit_processes(most: int) -> None:  # as that user, who may do it to his own
            limit = f"--nproc={most}:"
            subprocess.run([*run_as, "prlimit", "--pid", str(supervisor.pid), limit], check=True)

        limit_processes(threads)
        with pytest.raises(Refused) as refused:
            supervisor.run("without", programs.TRUE)
        assert "a limit on their number is reached" in refused.value.text
        limit_processes(threads + 100)
        assert supervisor.finish("after", programs.exits(4)).exit_code == 4


def test_memory_for_a_process_cannot_be_had(supervisor: SupervisorProcess) -> None:
    """A limit on the address space: whatever fails in it, the supervisor goes on."""
    supervisor.finish("before", programs.TRUE)
    size = status_field(supervisor.pid, "VmSize", 10) * 1024
    resource.prlimit(supervisor.pid, resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
    number = supervisor.client.send("start", **start_fields("within", programs.TRUE))
    eventually_sync(lambda: "supervisor.exhausted" in supervisor.log(), PATIENCE_S)
    resource.prlimit(supervisor.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    with suppress(Refused):  # who is refused asks again later
        supervisor.client.answer(number)
    assert supervisor.finish("after", programs.exits(4)).exit_code == 4


@pytest.mark.parametrize("number", [signal.SIGPIPE, signal.SIGHUP, signal.SIGINT, signal.SIGCHLD, signal.SIGCONT])
def test_signals_that_it_survives(supervisor: SupervisorProcess, number: signal.Signals) -> None:
    supervisor.run("j", programs.SLEEP)
    os.kill(supervisor.pid, number)
    assert supervisor.finish("after", programs.exits(4)).exit_code == 4
    assert supervisor.record("j").state is JobState.RUNNING


def test_without_standard_files(tmp_path: Path) -> None:
    """Started with 0, 1 and 2 closed: no file of its own may come to be one of them."""
    supervisor = SupervisorProcess(tmp_path / "state")
    supervisor.run_as = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    with supervisor:
        record = supervisor.finish("j", ["sh", "-c", "echo out; echo err >&2; exit 6"])
        assert record.exit_code == 6
        assert supervisor.output("j") == b"out\nerr\n"
        links = [str(Path(f"/proc/{supervisor.pid}/fd/{fd}").readlink()) for fd in (0, 1, 2)]
        assert links == ["/dev/null", "/dev/null", str(supervisor.path / "supervisor.log")]
