"""Limits, identity and sandbox of jobs, end to end."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.limited import a_worker, keys_of, output_of, refusal, run
from tests.support.programs import python, state_of
from tests.support.spawning import needs_root
from tests.support.workers import PATIENCE_S, Worker, environment_of
from worker_svc import (
    Groups,
    Identity,
    LeaderExit,
    Limits,
    Outcome,
    OutputVia,
    PreconditionFailed,
    Rlimit,
    Sandbox,
    WorkerClient,
)
from worker_svc.supervisor.containment import CGROUP, SUBREAPER
from worker_svc.supervisor.spawn import NATIVE, PYTHON

# Each level and each spawner twice.
MODES = [(CGROUP, NATIVE), (CGROUP, PYTHON), (SUBREAPER, NATIVE), (SUBREAPER, PYTHON)]


@pytest.fixture(scope="module", params=MODES, ids="-".join)
def shared_keys(request: pytest.FixtureRequest) -> dict[str, Any]:
    level, spawner = request.param
    return keys_of(level, spawner)


# For each process


async def test_process_limits_are_what_the_job_sees(shared_client: WorkerClient) -> None:
    cpu = max(os.sched_getaffinity(0))
    limits = Limits(
        rlimits=[Rlimit(name="nofile", soft=100, hard=200), Rlimit(name="RLIMIT_CORE", hard=0)],
        nice=7,
        cpu_affinity=[cpu],
        umask=0o027,
        oom_score_adj=321,
    )
    script = "ulimit -Sn; ulimit -Hn; ulimit -c; nice; taskset -cp $$ | sed 's/.*: //'; umask; "
    script += "cat /proc/self/oom_score_adj"
    output = await output_of(shared_client, "bash", "-c", script, limits=limits)
    assert output.split() == ["100", "200", "0", "7", str(cpu), "0027", "321"]


async def test_a_limit_ends_who_exceeds_it(shared_client: WorkerClient) -> None:
    """The file of its output is one that it writes, where it has that itself."""
    limits = Limits(rlimits=[Rlimit(name="fsize", soft=4096), Rlimit(name="core", soft=0)])
    job, _ = await run(shared_client, "head", "-c", "10000", "/dev/zero", limits=limits, output_via=OutputVia.FILE)
    assert (job.outcome, job.signal) == (Outcome.SIGNALED, "SIGXFSZ")


async def test_what_was_asked_for_is_told(shared_client: WorkerClient) -> None:
    limits = Limits(rlimits=[Rlimit(name="core", soft=0, hard=0)], nice=3)
    sandbox = Sandbox(read_only_paths=["/"], private_tmp=False, no_network=False)
    started = await shared_client.start("true", limits=limits, sandbox=sandbox, leader_exit=LeaderExit.WAIT)
    spec = (await shared_client.wait(started.job_id, PATIENCE_S)).spec
    assert (spec.limits, spec.identity, spec.sandbox) == (limits, None, sandbox)
    assert spec.leader_exit == LeaderExit.WAIT


async def test_cpus_that_are_not_there(shared_client: WorkerClient) -> None:
    assert (await refusal(shared_client, limits=Limits(cpu_affinity=[8000]))).startswith(
        "limits.cpu_affinity: not all of"
    )


# As whom


def another_user() -> pwd.struct_passwd:
    """With supplementary groups if there is any such."""
    users = [entry for entry in pwd.getpwall() if entry.pw_uid]
    return max(users, key=lambda entry: len(os.getgrouplist(entry.pw_name, entry.pw_gid)))


@needs_root
async def test_another_user(shared_client: WorkerClient) -> None:
    user = another_user()
    groups = sorted(set(os.getgrouplist(user.pw_name, user.pw_gid)))
    script = 'id -u; id -g; id -G | tr " " , ; echo "$HOME $USER $LOGNAME $SHELL"'
    uid, gid, all_groups, variables = (
        await output_of(shared_client, "sh", "-c", script, identity=Identity(user=user.pw_name))
    ).splitlines()
    assert (int(uid), int(gid)) == (user.pw_uid, user.pw_gid)
    assert sorted(map(int, all_groups.split(","))) == groups
    assert variables == f"{user.pw_dir} {user.pw_name} {user.pw_name} {user.pw_shell}"


@needs_root
async def test_another_user_by_number_with_groups_of_choice(shared_client: WorkerClient) -> None:
    identity = Identity(user="65534", group="4", groups=Groups(names=["5"]))
    env = {"HOME": "/elsewhere"}
    script = 'id -u; id -g; id -G; echo "$HOME"'
    output = await output_of(shared_client, "sh", "-c", script, identity=identity, env=env)
    uid, gid, groups, home = output.splitlines()
    assert (uid, gid, sorted(groups.split()), home) == ("65534", "4", ["4", "5"], "/elsewhere")


@needs_root
async def test_no_supplementary_groups(shared_client: WorkerClient) -> None:
    assert await output_of(shared_client, "id", "-G", identity=Identity(user="65534", groups=Groups())) == str(
        pwd.getpwuid(65534).pw_gid
    )


async def test_who_is_not_there(shared_client: WorkerClient) -> None:
    said = await refusal(shared_client, identity=Identity(user="no-such-user"))
    assert said == "identity.user: there is no user 'no-such-user' on this machine"


@needs_root
async def test_who_works_for_whom_by_configuration(tmp_path: Path) -> None:
    with a_worker(tmp_path, JOBS_USER="65534", JOBS_NO_NEW_PRIVS="false") as worker:
        async with worker.client() as client:
            script = "id -u; grep NoNewPrivs /proc/self/status | cut -f2"
            assert (await output_of(client, "sh", "-c", script)).split() == ["65534", "0"]
            other = Identity(user="0", no_new_privs=True)
            assert (await output_of(client, "sh", "-c", script, identity=other)).split() == ["0", "1"]


@needs_root
async def test_only_root_can_be_somebody_else(tmp_path: Path) -> None:
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("setpriv (util-linux) is not there")
    worker = a_worker(tmp_path)
    worker.run_as = [setpriv, "--bounding-set", "-setuid,-setgid"]
    with worker:
        async with worker.client() as client:
            said = await refusal(client, identity=Identity(user="65534", group="4"))
            assert said == "identity.user: running as another user or group needs root (CAP_SETUID and CAP_SETGID)"
            said = await refusal(client, identity=Identity(groups=Groups(names=["4"])))
            assert said.startswith("identity.groups: running as another user or group needs root")


async def test_no_new_privs(shared_client: WorkerClient) -> None:
    argv = ["grep", "NoNewPrivs", "/proc/self/status"]
    assert (await output_of(shared_client, *argv)).split()[1] == "1"
    assert (await output_of(shared_client, *argv, identity=Identity(no_new_privs=False))).split()[1] == "0"


# What it gets to see


@pytest.fixture
def folder() -> Iterator[Path]:
    """Outside /tmp, which a private one would hide."""
    path = Path(tempfile.mkdtemp(prefix="worker-svc-", dir="/var/tmp"))
    (path / "kept").write_text("as it was\n")
    yield path
    shutil.rmtree(path)


def skip_unless_landlock(said: str) -> None:
    if "which this kernel does not offer" in said:
        pytest.skip(said)


async def test_paths(shared_client: WorkerClient, folder: Path) -> None:
    script = f"cat {folder}/kept; echo new > {folder}/new && echo written; echo x > /dev/null && echo null"
    sandbox = Sandbox(read_only_paths=["/usr", "/bin", "/lib", "/lib64", "/etc", str(folder)])
    try:
        job, output = await run(shared_client, "sh", "-c", script, sandbox=sandbox)
    except PreconditionFailed as error:
        skip_unless_landlock(error.message)
        raise
    assert "as it was" in output
    assert "written" not in output
    assert output.endswith("null\n")
    assert not (folder / "new").exists()
    sandbox = Sandbox(read_only_paths=["/"], read_write_paths=[str(folder)])
    job, output = await run(shared_client, "sh", "-c", script, sandbox=sandbox)
    assert (job.exit_code, output.splitlines()[-2:]) == (0, ["written", "null"])
    assert (folder / "new").read_text() == "new\n"
    sandbox = Sandbox(read_only_paths=["/usr", "/bin", "/lib", "/lib64", "/etc"])
    job, output = await run(shared_client, "cat", f"{folder}/kept", sandbox=sandbox)
    assert job.outcome == Outcome.FAILED
    assert "Permission denied" in output


async def test_a_path_that_is_not_there(shared_client: WorkerClient) -> None:
    said = await refusal(shared_client, sandbox=Sandbox(read_only_paths=["/", "/not/there"]))
    skip_unless_landlock(said)
    assert said.startswith("sandbox.read_only_paths: entry 1: no such file")


async def test_private_tmp(shared_client: WorkerClient) -> None:
    script = "ls -A /tmp; echo x > /tmp/mine && cat /tmp/mine"
    sandbox = Sandbox(private_tmp=True)
    with tempfile.NamedTemporaryFile(dir="/tmp") as ours:
        assert Path(ours.name).exists()
        assert await output_of(shared_client, "sh", "-c", script, sandbox=sandbox) == "x"
        assert not Path("/tmp/mine").exists()
        assert (
            await output_of(shared_client, "sh", "-c", script, sandbox=sandbox) == "x"
        )  # nor did it stay for the next


async def test_no_network(shared_client: WorkerClient) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        connect = python(f"import socket; socket.create_connection(('127.0.0.1', {port}), 5); print('connected')")
        assert await output_of(shared_client, *connect) == "connected"
        job, output = await run(shared_client, *connect, sandbox=Sandbox(no_network=True))
        assert (job.outcome, "ConnectionRefusedError" in output) == (Outcome.FAILED, True)
    devices = await output_of(shared_client, "cat", "/proc/net/dev", sandbox=Sandbox(no_network=True))
    assert [line.split(":")[0].strip() for line in devices.splitlines() if ":" in line] == ["lo"]


async def test_a_sandbox_by_configuration(tmp_path: Path) -> None:
    keys = {"SANDBOX_PRIVATE_TMP": "true", "SANDBOX_NO_NETWORK": "true"}
    keys["SANDBOX_READ_ONLY_PATHS"] = "/usr,/bin,/lib,/lib64,/proc"
    with a_worker(tmp_path, **keys) as worker:
        async with worker.client() as client:
            script = "grep -c : /proc/net/dev; ls -A /tmp; cat /etc/passwd"
            try:
                _, output = await run(client, "sh", "-c", script)
            except PreconditionFailed as error:
                skip_unless_landlock(error.message)
                raise
            assert output.splitlines()[0] == "1"
            assert "/etc/passwd: Permission denied" in output
            assert tmp_path.parts[2] not in output
            # A default: a request may ask for another.
            free = Sandbox(read_only_paths=["/"], private_tmp=False, no_network=False)
            _, output = await run(client, "sh", "-c", script, sandbox=free)
            assert "root:x:0:0:" in output
            assert tmp_path.parts[2] in output


# The environment


async def test_what_a_job_finds_in_its_environment(shared: Worker, shared_client: WorkerClient) -> None:
    started = await shared_client.start("sleep", "999", env={"MINE": "1", "PATH": "/bin"})
    pid = (await shared_client.job(started.job_id)).pid
    environment = dict(environment_of(pid))
    assert environment.pop("WORKER_JOB_MARK").endswith(f"-{started.job_id}")
    assert environment == {
        "PATH": "/bin",
        "MINE": "1",
        "WORKER_JOB_ID": started.job_id,
        "WORKER_STATE_ID": (await shared_client.worker()).worker_id,
    }
    assert state_of(pid) == "S"


@pytest.mark.parametrize("keys, seen", [({}, "0031"), ({"LIMITS_UMASK": "0077"}, "0077")])
async def test_the_umask_of_a_job_that_asks_for_none(tmp_path: Path, keys: dict[str, str], seen: str) -> None:
    """The worker's own; or its configuration's."""
    worker = a_worker(tmp_path, **keys)
    worker.run_as = ["sh", "-c", 'umask 0031; exec "$@"', "sh"]
    with worker:
        async with worker.client() as client:
            for limits, expected in ((None, seen), (Limits(umask=0o7), "0007")):
                job = await client.wait((await client.start("sh", args=["-c", "umask"], limits=limits)).job_id)
                output = Path(job.output_file).read_text()
                assert output.strip() == expected
