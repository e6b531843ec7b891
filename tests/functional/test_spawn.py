"""Both spawners keep the same promises: what a job gets, what it does not, and what is said if it cannot be started."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.programs import children_of, open_fds, python, rss_bytes
from tests.support.spawning import PATH, STATUS, Launchpad, run_apart, status_of_job
from worker_svc.supervisor.spawn import NATIVE, SpawnFailed, spawn, start_ticks_of

ROOT = Path(__file__).parents[2]


# Makes either spawner take its long way (the pure-Python one: its launcher).
WITH_LIMITS: dict[str, Any] = {"limits": {"umask": 0o22, "rlimits": {"core": (0, 0)}}}
both_ways = pytest.mark.parametrize("more", [{}, WITH_LIMITS], ids=["plain", "limits"])


def test_runs_a_program(pad: Launchpad) -> None:
    assert pad.run("sh", "-c", "echo hello; exit 3")[:2] == (3, "hello\n")


@both_ways
def test_what_is_told_of_the_process(pad: Launchpad, more: dict[str, Any]) -> None:
    spawned = spawn(pad.plan("sleep", "999", **more), pad.implementation)
    try:
        assert spawned.start_ticks == start_ticks_of(spawned.pid) != 0
        assert not os.get_inheritable(spawned.pidfd)
    finally:
        signal.pidfd_send_signal(spawned.pidfd, signal.SIGKILL)
        os.close(spawned.pidfd)
    assert os.waitpid(spawned.pid, 0)[1] == signal.SIGKILL


@both_ways
def test_output_is_appended_and_stderr_apart(pad: Launchpad, more: dict[str, Any]) -> None:
    err = pad.directory / "err"
    plan = pad.plan("sh", "-c", "echo out; echo err >&2", stderr_path=str(err), **more)
    assert pad.run_plan(plan).output == "out\n"
    assert err.read_text() == "err\n"
    assert Path(plan.stdout_path).stat().st_mode & 0o777 == 0o600
    flags = pad.run("grep", "flags", "/proc/self/fdinfo/1", **more).output.split()[1]
    assert int(flags, 8) & os.O_APPEND


@both_ways
def test_stdin(pad: Launchpad, more: dict[str, Any]) -> None:
    text = "x" * 100_000 + "\n"
    assert pad.run("cat", stdin=text.encode(), **more).output == text
    assert pad.run("readlink", "/proc/self/fd/0", **more).output == "/dev/null\n"


@both_ways
def test_arguments_and_environment_arrive_as_they_are(pad: Launchpad, more: dict[str, Any]) -> None:
    code = "import os, sys; print(ascii((sys.argv[1:], {k: v for k, v in os.environ.items() if k != 'LC_CTYPE'})))"
    args = ["", "a b", "ü\udcff"]
    env = {"PATH": PATH, "EMPTY": "", "ODD": "a=b \n ü \udcff"}
    assert pad.run(*python(code, *args), env=env, **more).output == f"{(args, env)!a}\n"
    assert pad.run("/usr/bin/env", env={}, **more).output == ""


@both_ways
def test_no_fd_of_ours_reaches_a_job(pad: Launchpad, more: dict[str, Any]) -> None:
    inheritable = [os.open("/dev/null", os.O_RDONLY) for _ in range(3)]
    high = os.dup2(inheritable[0], 1000)
    os.set_inheritable(inheritable[0], True)
    try:
        # ls itself opens the directory, as 3
        assert pad.run("ls", "/proc/self/fd", **more).output.split() == ["0", "1", "2", "3"]
    finally:
        for fd in (*inheritable, high):
            os.close(fd)


@both_ways
def test_no_signal_state_of_ours_reaches_a_job(pad: Launchpad, more: dict[str, Any]) -> None:
    assert signal.getsignal(signal.SIGPIPE) is signal.SIG_IGN  # Python's own doing
    ignored = (signal.SIGHUP, signal.SIGUSR1, signal.SIGTTOU, signal.SIGRTMIN + 3)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ignored}
    mask = signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    try:
        status = status_of_job(pad.run(*STATUS, **more))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
    nothing = "0" * 16
    assert (status["SigBlk"], status["SigIgn"], status["SigCgt"]) == (nothing, nothing, nothing)


@both_ways
def test_our_own_signal_mask_is_as_before(pad: Launchpad, more: dict[str, Any]) -> None:
    mask = {signal.SIGUSR2, signal.SIGALRM}
    former = signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        pad.run("true", **more)
        with pytest.raises(SpawnFailed):
            pad.run("/nonexistent", **more)
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


@both_ways
def test_a_job_leads_its_session_and_has_no_terminal(pad: Launchpad, more: dict[str, Any]) -> None:
    # In a process that has a controlling terminal, and must have it still afterwards.
    limits = "{'umask': 0o22}" if more else "{}"
    code = f"""
        import fcntl, os, pty, sys, termios
        os.setsid()
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        from worker_svc.supervisor.spawn import LaunchPlan, spawn
        script = "cut -d' ' -f1,5,6,7 /proc/$$/stat; (: </dev/tty) 2>/dev/null && echo has a terminal"
        plan = LaunchPlan(["sh", "-c", script], {{"PATH": {PATH!r}}}, "/", b"", sys.argv[1], "", {limits})
        spawned = spawn(plan, {pad.implementation!r})
        os.waitpid(spawned.pid, 0)
        os.close(os.open("/dev/tty", os.O_RDWR))
        print(spawned.pid, end="")
    """
    out = pad.directory / "out"
    pid = run_apart(code, str(out))
    assert out.read_text() == f"{pid} {pid} {pid} 0\n"


@both_ways
def test_working_directory(pad: Launchpad, more: dict[str, Any], tmp_path: Path) -> None:
    assert pad.run("pwd", "-P", cwd=str(tmp_path.resolve()), **more).output == f"{tmp_path.resolve()}\n"
    (tmp_path / "file").touch()
    for cwd, problem in ((tmp_path / "none", "no such file or directory"), (tmp_path / "file", "is not a directory")):
        with pytest.raises(SpawnFailed, match=f"^cwd: {cwd}:? {problem}"):
            pad.run("true", cwd=str(cwd), **more)


@both_ways
def test_the_command_is_looked_for_as_execvp_does(pad: Launchpad, more: dict[str, Any], tmp_path: Path) -> None:
    for name, mode in (("first", 0o644), ("second", 0o755), ("third", 0o755)):
        (tmp_path / name).mkdir()
        program = tmp_path / name / "tool"
        program.write_text(f"#!/bin/sh\necho {name} $0\n")
        program.chmod(mode)
    (tmp_path / "zeroth" / "tool").mkdir(parents=True)
    path = ":".join(str(tmp_path / name) for name in ("none", "zeroth", "first", "second", "third"))
    assert pad.run("tool", env={"PATH": path}, **more).output == f"second {tmp_path}/second/tool\n"
    # relative entries, and the empty one, are the job's
    for entry in ("second", ""):
        cwd = tmp_path if entry else tmp_path / "second"
        assert pad.run("tool", env={"PATH": f"/none:{entry}"}, cwd=str(cwd), **more).output.startswith("second ")
    with pytest.raises(SpawnFailed, match=r"^command: .*/first/tool is not executable: chmod \+x it"):
        pad.run("tool", env={"PATH": f"{tmp_path}/zeroth:{tmp_path}/first"}, **more)


@both_ways
def test_what_is_said_of_a_program_that_cannot_run(pad: Launchpad, more: dict[str, Any], tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter -x\n")
    data = tmp_path / "data"
    data.write_text("text\n")
    plain = tmp_path / "plain"
    plain.write_text("#!/bin/sh\n")
    for path in (script, data):
        path.chmod(0o755)
    for command, problem in (
        ("no-such-command", r"'no-such-command' was not found in the job's PATH: give its whole path"),
        ("/no/such/program", "/no/such/program: no such file or directory"),
        (str(tmp_path), ".* is a directory, not a program"),
        (str(plain), r".* is not executable: chmod \+x it"),
        (str(script), ".*: its interpreter '/no/such/interpreter' cannot be run"),
        (str(data), ".* is not a program for this machine; a script must begin with #!"),
    ):
        with pytest.raises(SpawnFailed, match=f"^command: {problem}"):
            pad.run(command, **more)
    with pytest.raises(SpawnFailed, match=r"^args: "):
        pad.run("true", *["x" * 100_000] * 40, **more)


@both_ways
def test_nothing_is_left_of_a_failed_start(pad: Launchpad, more: dict[str, Any], tmp_path: Path) -> None:
    # The children are those that other tests of this run have started, and keep.
    before, children = open_fds(os.getpid()), children_of(os.getpid())
    for command in ("/no/such", "no-such"):
        with pytest.raises(SpawnFailed):
            pad.run(command, stdin=b"x", stderr_path=str(tmp_path / "err"), **more)
    with pytest.raises(SpawnFailed, match=r"could not prepare the job.*/none/none"):
        pad.run("true", stderr_path=str(tmp_path / "none/none/err"), **more)
    assert open_fds(os.getpid()) == before
    assert list(tmp_path.iterdir()) == []
    assert children_of(os.getpid()) == children


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.long)])
def test_many_starts_leak_nothing(pad: Launchpad, count: int) -> None:
    def start(count: int) -> None:
        for _ in range(count):
            assert pad.run("true", **(WITH_LIMITS if pad.implementation == NATIVE else {})).exit_code == 0
            with pytest.raises(SpawnFailed):
                pad.run("/no/such")

    start(50)
    fds, threads, rss = open_fds(os.getpid()), threading.active_count(), rss_bytes(os.getpid())
    start(count)
    assert {*open_fds(os.getpid())} <= {*fds}  # an earlier test's may be closed meanwhile
    assert threading.active_count() <= threads
    assert rss_bytes(os.getpid()) - rss < 1024 * 1024


@contextmanager
def alarms_every(seconds: float) -> Iterator[list[int]]:
    seen: list[int] = []
    former = signal.signal(signal.SIGALRM, lambda number, frame: seen.append(number))
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield seen
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def test_from_eight_threads_while_signals_arrive(pad: Launchpad) -> None:
    per_thread = 100 if pad.implementation == NATIVE else 20
    wrong: list[object] = []

    def work(number: int) -> None:
        directory = pad.directory / str(number)
        directory.mkdir()
        mine = Launchpad(pad.implementation, directory)
        try:
            for turn in range(per_thread):
                ended = mine.run("sh", "-c", f"echo {turn}", **(WITH_LIMITS if turn % 2 else {}))
                if ended[:2] != (0, f"{turn}\n"):
                    wrong.append(ended)
        except BaseException as error:
            wrong.append(error)

    with alarms_every(0.0005) as seen:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert len(seen) > 10


def test_starting_holds_up_no_other_thread(pad: Launchpad) -> None:
    """The GIL is released: this thread goes on while others start processes."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            pad.run("true")

    thread = threading.Thread(target=work)
    thread.start()
    turns, end_s = 0, time.monotonic() + 0.3
    while time.monotonic() < end_s:
        turns += 1
    stop.set()
    thread.join()
    assert turns > 1000


def test_what_is_there_at_the_start_of_a_large_supervisor(pad: Launchpad) -> None:
    """With many fds, as a supervisor of a thousand jobs has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2000:
        pytest.skip(f"the hard limit on open files is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(1500)]
    try:
        # fewer than the supervisor has open
        ended = pad.run("sh", "-c", "ulimit -n; ls /proc/self/fd", limits={"rlimits": {"nofile": (32, 64)}})
    finally:
        for fd in fds:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert ended.output.split() == ["32", "0", "1", "2", "3"]


def test_with_0_1_and_2_closed_in_the_supervisor(pad: Launchpad, tmp_path: Path) -> None:
    code = f"""
        import os, sys
        from worker_svc.supervisor.spawn import LaunchPlan, spawn
        report = os.dup(1)
        for fd in (0, 1, 2):
            os.close(fd)
        plan = LaunchPlan(
            ["sh", "-c", "cat; echo err >&2"], {{"PATH": {PATH!r}}}, "/", b"in\\n", sys.argv[1], sys.argv[2]
        )
        os.waitpid(spawn(plan, {pad.implementation!r}).pid, 0)
    """
    out, err = tmp_path / "out", tmp_path / "err"
    run_apart(code, str(out), str(err))
    assert (out.read_text(), err.read_text()) == ("in\n", "err\n")
