"""The sandbox of a spawned process, and where it is born."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.programs import python
from tests.support.spawn_limits import NOBODY, has_landlock, landlock, outcome_without_privileges
from tests.support.spawning import PATH, Launchpad, needs_root, run_apart
from worker_svc.job import Identity, Sandbox
from worker_svc.supervisor.spawn import SpawnFailed

# --- sandbox ------------------------------------------------------------------------------------------------------


@landlock
def test_read_only_and_read_write_paths(pad: Launchpad, open_dir: Path) -> None:
    (open_dir / "rw").mkdir()
    (open_dir / "rw").chmod(0o777)
    (open_dir / "file").write_text("content\n")
    script = f"""
        cat {open_dir}/file; echo new >{open_dir}/rw/new && cat {open_dir}/rw/new; rm {open_dir}/rw/new
        echo x >{open_dir}/file; echo x >{open_dir}/other; rm {open_dir}/file; : >/dev/null; head -c0 /dev/urandom
    """
    sandbox = Sandbox(read_only_paths=("/",), read_write_paths=(str(open_dir / "rw"),))
    ended = pad.run("sh", "-c", script, sandbox=sandbox)
    lines = ended.output.splitlines()
    assert lines[:2] == ["content", "new"]
    assert len(lines) == 5
    assert all("ermission denied" in line for line in lines[2:])
    assert (open_dir / "file").read_text() == "content\n"


@landlock
def test_what_is_not_listed_is_not_there(pad: Launchpad, open_dir: Path) -> None:
    (open_dir / "file").write_text("content\n")
    system = tuple(path for path in ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache") if Path(path).exists())
    one_file = Sandbox((*system, str(open_dir / "file")))
    assert pad.run("cat", str(open_dir / "file"), sandbox=one_file).output == "content\n"
    assert "ermission denied" in pad.run("ls", str(open_dir), sandbox=one_file).output
    with pytest.raises(SpawnFailed, match=rf"sandbox.read_only_paths: entry {len(system)}: no such file"):
        pad.run("true", sandbox=Sandbox((*system, "/no/such")))
    with pytest.raises(SpawnFailed, match=r"^command: .*the sandbox's paths must include the program"):
        pad.run("/usr/bin/env", sandbox=Sandbox((str(open_dir),)))


@landlock
@needs_root
def test_landlock_for_another_user(pad: Launchpad, open_dir: Path) -> None:
    (open_dir / "closed").mkdir(0o700)
    sandbox = Sandbox(("/",), (str(open_dir / "closed"),))  # which that user cannot enter anyway
    assert pad.run("id", "-u", sandbox=sandbox, identity=NOBODY).output == "65534\n"


def test_without_landlock_the_start_fails(pad: Launchpad) -> None:
    said = outcome_without_privileges(
        pad,
        "sandbox=Sandbox(('/',))",
        "from tests.support.spawning import refuse_system_calls; refuse_system_calls(444)",
    )
    assert said.startswith("sandbox.read_only_paths: needs Landlock with ABI 3 (Linux 6.2)")


namespaces = pytest.mark.skipif(
    os.geteuid() != 0 and not Path("/proc/self/ns/user").exists(), reason="needs root or user namespaces"
)


@namespaces
@pytest.mark.parametrize("with_landlock", [False, pytest.param(True, marks=landlock)])
def test_private_tmp(pad: Launchpad, with_landlock: bool) -> None:
    ours = Path(tempfile.mkdtemp(dir="/tmp"))
    sandbox = Sandbox(("/",) if with_landlock else (), private_tmp=True)
    script = "ls -A /tmp; echo mine >/tmp/file && cat /tmp/file; stat -c %a /tmp"
    assert pad.run("sh", "-c", script, sandbox=sandbox).output == "mine\n1777\n"
    assert not Path("/tmp/file").exists()
    with pytest.raises(SpawnFailed, match=rf"^cwd: {ours}: no such file or directory \(with sandbox.private_tmp"):
        pad.run("true", cwd=str(ours), sandbox=sandbox)
    ours.rmdir()


@namespaces
def test_no_network(pad: Launchpad) -> None:
    script = "ip -o addr 2>/dev/null | grep -v ': lo '; cat /proc/net/dev | grep -c :"
    assert pad.run("sh", "-c", script, sandbox=Sandbox(no_network=True)).output == "1\n"
    listens = python(
        "import socket; s = socket.create_server(('127.0.0.1', 0)); socket.create_connection(s.getsockname())"
    )
    assert pad.run(*listens, sandbox=Sandbox(no_network=True)).output == ""  # the loopback is up


def test_namespaces_without_privilege(pad: Launchpad) -> None:
    """By a user namespace; where the machine forbids those, the start fails."""
    said = outcome_without_privileges(pad, "sandbox=Sandbox((), (), True, True)")
    if "needs CAP_SYS_ADMIN" in said:
        assert said.startswith("sandbox.no_network: needs CAP_SYS_ADMIN, or user namespaces")
        pytest.skip(f"unprivileged user namespaces are not allowed here: {said}")
    assert said.split() == ["1", str(os.getuid())]


@needs_root
def test_everything_at_once(pad: Launchpad) -> None:
    plan: dict[str, Any] = {
        "limits": {
            "rlimits": {"nofile": (16, 16), "nproc": (500, 500)},
            "nice": 3,
            "cpu_affinity": (min(os.sched_getaffinity(0)),),
            "umask": 0o77,
            "oom_score_adj": 10,
        },
        "identity": Identity("nobody"),
        "sandbox": Sandbox(("/",) if has_landlock() else (), (), True, True),
        "user_env": ("USER",),
    }
    script = "id -un; nice; umask; ulimit -n; echo $USER; ls -A /tmp; ls /proc/self/fd | wc -l"
    assert pad.run("sh", "-c", script, **plan).output.split() == ["nobody", "3", "0077", "16", "nobody", "4"]


# --- where it is born ---------------------------------------------------------------------------------------------


@pytest.fixture
def cgroup(tmp_path: Path) -> Iterator[Path]:
    from tests.support.spawning import cgroup2_root

    root = cgroup2_root()
    if root is None:
        pytest.skip("no cgroup v2 hierarchy is mounted that can be written to")
    path = root / f"spawn-test-{os.getpid()}"  # not worker-svc-*: supervisors clear those away
    path.mkdir()
    yield path
    path.rmdir()


IN_CGROUP = """
    import os, sys
    from tests.support.spawning import refuse_system_calls
    refuse_system_calls(*map(int, sys.argv[3:]))
    from worker_svc.supervisor.spawn import LaunchPlan, SpawnFailed, spawn
    fd = os.open(sys.argv[2], os.O_RDONLY | os.O_DIRECTORY)
    plan = LaunchPlan(["cat", "/proc/self/cgroup"], {{"PATH": {path!r}}}, "/", b"", sys.argv[1], "", cgroup_fd=fd)
    os.set_inheritable(1, True)
    os.waitpid(spawn(plan, {implementation!r}).pid, 0)
    print(open(sys.argv[1]).read())
"""


@pytest.mark.parametrize("refused", [(), (435, 436)], ids=["clone3", "without-clone3-and-close_range"])
def test_starts_in_a_cgroup(pad: Launchpad, cgroup: Path, refused: tuple[int, ...]) -> None:
    code = IN_CGROUP.format(path=PATH, implementation=pad.implementation)
    said = run_apart(code, str(pad.directory / "out"), str(cgroup), *map(str, refused))
    assert f"0::/{cgroup.name}" in said


def test_a_cgroup_that_cannot_be_joined(pad: Launchpad, cgroup: Path) -> None:
    gone = cgroup / "gone"
    gone.mkdir()
    fd = os.open(gone, os.O_RDONLY | os.O_DIRECTORY)
    gone.rmdir()
    with pytest.raises(SpawnFailed, match="the job's cgroup could not be joined: No such"):
        pad.run("true", cgroup_fd=fd)
    os.close(fd)
    fd = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    with pytest.raises(SpawnFailed, match="the job's cgroup could not be joined"):
        pad.run("true", cgroup_fd=fd)
    os.close(fd)


def test_without_clone3_and_close_range(pad: Launchpad) -> None:
    """As in containers whose seccomp profile does not know them."""
    code = f"""
        import os, sys
        from tests.support.spawning import refuse_system_calls
        refuse_system_calls(435, 436)
        from worker_svc.supervisor.spawn import LaunchPlan, SpawnFailed, spawn
        fds = [os.open("/", os.O_RDONLY) for _ in range(300)]
        for fd in fds:
            os.set_inheritable(fd, True)
        plan = LaunchPlan(["ls", "/proc/self/fd"], {{"PATH": {PATH!r}}}, "/", b"", sys.argv[1], "",
                          {{"rlimits": {{"nofile": (16, 16)}}}})
        spawned = spawn(plan, {pad.implementation!r})
        assert spawned.pidfd > 2 and spawned.start_ticks
        os.waitpid(spawned.pid, 0)
        print(open(sys.argv[1]).read())
        try:
            spawn(plan._replace(argv=["/no/such"]), {pad.implementation!r})
        except SpawnFailed as failure:
            print(failure)
    """
    said = run_apart(code, str(pad.directory / "out"))
    assert said.split("\n\n") == ["0\n1\n2\n3", "command: /no/such: no such file or directory\n"]


def test_orphans_fall_to_a_subreaper(pad: Launchpad) -> None:
    code = f"""
        import os, sys, time
        from worker_svc.supervisor.containment.subreaper import set_child_subreaper
        from worker_svc.supervisor.spawn import LaunchPlan, spawn
        set_child_subreaper()
        script = "(sleep 0.05; exit 7) & exit 0"
        plan = LaunchPlan(["sh", "-c", script], {{"PATH": {PATH!r}}}, "/", b"", sys.argv[1], "")
        spawned = spawn(plan, {pad.implementation!r})
        os.waitpid(spawned.pid, 0)
        print(os.waitstatus_to_exitcode(os.waitpid(-1, 0)[1]))
    """
    assert run_apart(code, str(pad.directory / "out")) == "7\n"
