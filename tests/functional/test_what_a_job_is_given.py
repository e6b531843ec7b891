"""What a job's process finds: input, environment, files, program; and what cannot be started."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path

import pytest

from tests.support import programs
from tests.support.programs import group_of, open_fds, status_field
from tests.support.supervised import IS_ROOT, with_slots
from tests.support.waiting import eventually_sync
from tests.support.workers import (
    BASE_ENV,
    PATIENCE_S,
    Refused,
    SupervisorProcess,
    environment_of,
)
from worker_svc.job import JobState, Outcome
from worker_svc.supervisor.containment.marks import Marks

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
        supervisor.client.ask("stop", job_id="a")
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
        supervisor.client.ask("stop", job_id="j")
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
    supervisor.client.ask("start", job_id="path", fingerprint="", spec=spec)
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
            supervisor.client.ask("signal", job_id="j", signal=int(signal.SIGTERM))
        supervisor.client.ask("stop", job_id="j", grace_s=0.0)
        os.kill(pid, signal.SIGKILL)
        record = supervisor.wait_finished("j")
        assert (record.outcome, record.signal) == (Outcome.STOPPED, signal.SIGKILL)
        assert supervisor.client.ask("status")["running"] == 0


def _reachable_by_all(tmp_path: Path) -> Path:
    for folder in (tmp_path, *tmp_path.parents):
        if "/pytest-of-" in str(folder):
            folder.chmod(folder.stat().st_mode | 0o055)
    return tmp_path / "bin"
