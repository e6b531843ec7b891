"""Limits, identity and sandbox by the API, as the jobs of a real worker see them: docs/limits.md names these tests."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import programs
from tests.support.contained import why_unavailable
from tests.support.programs import is_alive, python, state_of
from tests.support.spawning import needs_root, skip_unless_built
from tests.support.waiting import eventually_sync
from tests.support.workers import PATIENCE_S, Worker, environment_of
from worker_svc import (
    Groups,
    Identity,
    InvalidArgument,
    Job,
    JobState,
    LeaderExit,
    Limits,
    Outcome,
    OutputVia,
    PreconditionFailed,
    Rlimit,
    Sandbox,
    WorkerClient,
)
from worker_svc.job.limits import OF_TREE
from worker_svc.supervisor.containment import CGROUP, SUBREAPER
from worker_svc.supervisor.spawn import NATIVE, PYTHON

# Each level and each spawner twice.
MODES = [(CGROUP, NATIVE), (CGROUP, PYTHON), (SUBREAPER, NATIVE), (SUBREAPER, PYTHON)]


@pytest.fixture(params=MODES, ids="-".join)
def worker_keys(request: pytest.FixtureRequest) -> dict[str, Any]:
    level, spawner = request.param
    return keys_of(level, spawner)


@pytest.fixture(params=[CGROUP, SUBREAPER])
def leveled(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Worker]:
    """Where the spawner makes no difference."""
    with a_worker(tmp_path, request.param) as running:
        yield running


def keys_of(level: str = "auto", spawner: str = "auto") -> dict[str, Any]:
    skip_unless_built(spawner)
    reason = why_unavailable(level) if level != "auto" else ""
    if reason:
        pytest.skip(f"containment {level}: {reason}")
    return {"SUPERVISOR_CONTAINMENT": level, "SUPERVISOR_SPAWNER": spawner, "JOBS_CWD": "/"}


def a_worker(tmp_path: Path, level: str = "auto", **keys: Any) -> Worker:
    return Worker(tmp_path, **keys_of(level), **keys)


async def run(client: WorkerClient, *argv: str, **fields: Any) -> tuple[Job, str]:
    """Runs a job to its end; with what it wrote."""
    started = await client.start(argv[0], args=argv[1:], **fields)
    job = await client.wait(started.job_id, PATIENCE_S)
    output = b"".join([chunk.data async for chunk in client.output(job.job_id)])
    return job, output.decode()


async def output_of(client: WorkerClient, *argv: str, **fields: Any) -> str:
    job, output = await run(client, *argv, **fields)
    assert job.outcome == Outcome.SUCCEEDED, (job.error_text, output)
    return output.strip()


async def refusal(client: WorkerClient, **fields: Any) -> str:
    with pytest.raises(PreconditionFailed) as caught:
        await client.start("true", **fields)
    return caught.value.message


# For each process


async def test_process_limits_are_what_the_job_sees(client: WorkerClient) -> None:
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
    output = await output_of(client, "bash", "-c", script, limits=limits)
    assert output.split() == ["100", "200", "0", "7", str(cpu), "0027", "321"]


async def test_a_limit_ends_who_exceeds_it(client: WorkerClient) -> None:
    """The file of its output is one that it writes, where it has that itself."""
    limits = Limits(rlimits=[Rlimit(name="fsize", soft=4096), Rlimit(name="core", soft=0)])
    job, _ = await run(client, "head", "-c", "10000", "/dev/zero", limits=limits, output_via=OutputVia.FILE)
    assert (job.outcome, job.signal) == (Outcome.SIGNALED, "SIGXFSZ")


async def test_what_was_asked_for_is_told(client: WorkerClient) -> None:
    limits = Limits(rlimits=[Rlimit(name="core", soft=0, hard=0)], nice=3)
    sandbox = Sandbox(read_only_paths=["/"], private_tmp=False, no_network=False)
    started = await client.start("true", limits=limits, sandbox=sandbox, leader_exit=LeaderExit.WAIT)
    spec = (await client.wait(started.job_id, PATIENCE_S)).spec
    assert (spec.limits, spec.identity, spec.sandbox) == (limits, None, sandbox)
    assert spec.leader_exit == LeaderExit.WAIT


async def test_cpus_that_are_not_there(client: WorkerClient) -> None:
    assert (await refusal(client, limits=Limits(cpu_affinity=[8000]))).startswith("limits.cpu_affinity: not all of")


# As whom


def another_user() -> pwd.struct_passwd:
    """With supplementary groups if there is any such."""
    users = [entry for entry in pwd.getpwall() if entry.pw_uid]
    return max(users, key=lambda entry: len(os.getgrouplist(entry.pw_name, entry.pw_gid)))


@needs_root
async def test_another_user(client: WorkerClient) -> None:
    user = another_user()
    groups = sorted(set(os.getgrouplist(user.pw_name, user.pw_gid)))
    script = 'id -u; id -g; id -G | tr " " , ; echo "$HOME $USER $LOGNAME $SHELL"'
    uid, gid, all_groups, variables = (
        await output_of(client, "sh", "-c", script, identity=Identity(user=user.pw_name))
    ).splitlines()
    assert (int(uid), int(gid)) == (user.pw_uid, user.pw_gid)
    assert sorted(map(int, all_groups.split(","))) == groups
    assert variables == f"{user.pw_dir} {user.pw_name} {user.pw_name} {user.pw_shell}"


@needs_root
async def test_another_user_by_number_with_groups_of_choice(client: WorkerClient) -> None:
    identity = Identity(user="65534", group="4", groups=Groups(names=["5"]))
    env = {"HOME": "/elsewhere"}
    script = 'id -u; id -g; id -G; echo "$HOME"'
    output = await output_of(client, "sh", "-c", script, identity=identity, env=env)
    uid, gid, groups, home = output.splitlines()
    assert (uid, gid, sorted(groups.split()), home) == ("65534", "4", ["4", "5"], "/elsewhere")


@needs_root
async def test_no_supplementary_groups(client: WorkerClient) -> None:
    assert await output_of(client, "id", "-G", identity=Identity(user="65534", groups=Groups())) == str(
        pwd.getpwuid(65534).pw_gid
    )


async def test_who_is_not_there(client: WorkerClient) -> None:
    said = await refusal(client, identity=Identity(user="no-such-user"))
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


async def test_no_new_privs(client: WorkerClient) -> None:
    argv = ["grep", "NoNewPrivs", "/proc/self/status"]
    assert (await output_of(client, *argv)).split()[1] == "1"
    assert (await output_of(client, *argv, identity=Identity(no_new_privs=False))).split()[1] == "0"


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


async def test_paths(client: WorkerClient, folder: Path) -> None:
    script = f"cat {folder}/kept; echo new > {folder}/new && echo written; echo x > /dev/null && echo null"
    sandbox = Sandbox(read_only_paths=["/usr", "/bin", "/lib", "/lib64", "/etc", str(folder)])
    try:
        job, output = await run(client, "sh", "-c", script, sandbox=sandbox)
    except PreconditionFailed as error:
        skip_unless_landlock(error.message)
        raise
    assert "as it was" in output
    assert "written" not in output
    assert output.endswith("null\n")
    assert not (folder / "new").exists()
    sandbox = Sandbox(read_only_paths=["/"], read_write_paths=[str(folder)])
    job, output = await run(client, "sh", "-c", script, sandbox=sandbox)
    assert (job.exit_code, output.splitlines()[-2:]) == (0, ["written", "null"])
    assert (folder / "new").read_text() == "new\n"
    sandbox = Sandbox(read_only_paths=["/usr", "/bin", "/lib", "/lib64", "/etc"])
    job, output = await run(client, "cat", f"{folder}/kept", sandbox=sandbox)
    assert job.outcome == Outcome.FAILED
    assert "Permission denied" in output


async def test_a_path_that_is_not_there(client: WorkerClient) -> None:
    said = await refusal(client, sandbox=Sandbox(read_only_paths=["/", "/not/there"]))
    skip_unless_landlock(said)
    assert said.startswith("sandbox.read_only_paths: entry 1: no such file")


async def test_private_tmp(client: WorkerClient) -> None:
    script = "ls -A /tmp; echo x > /tmp/mine && cat /tmp/mine"
    sandbox = Sandbox(private_tmp=True)
    with tempfile.NamedTemporaryFile(dir="/tmp") as ours:
        assert Path(ours.name).exists()
        assert await output_of(client, "sh", "-c", script, sandbox=sandbox) == "x"
        assert not Path("/tmp/mine").exists()
        assert await output_of(client, "sh", "-c", script, sandbox=sandbox) == "x"  # nor did it stay for the next


async def test_no_network(client: WorkerClient) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        connect = python(f"import socket; socket.create_connection(('127.0.0.1', {port}), 5); print('connected')")
        assert await output_of(client, *connect) == "connected"
        job, output = await run(client, *connect, sandbox=Sandbox(no_network=True))
        assert (job.outcome, "ConnectionRefusedError" in output) == (Outcome.FAILED, True)
    devices = await output_of(client, "cat", "/proc/net/dev", sandbox=Sandbox(no_network=True))
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


# For the tree as a whole


ASKED: dict[str, Limits] = {
    "memory_max_bytes": Limits(memory_max_bytes=64 * 2**20),
    "swap_max_bytes": Limits(swap_max_bytes=0),
    "cpu_max_cores": Limits(cpu_max_cores=0.5),
    "cpu_weight": Limits(cpu_weight=50),
    "pids_max": Limits(pids_max=20),
    "io_weight": Limits(io_weight=50),
}


def test_every_tree_limit_is_tried() -> None:
    assert set(ASKED) == {limit.name for limit in OF_TREE}


@pytest.mark.parametrize("field", ASKED)
async def test_tree_limits_hold_or_are_refused(leveled: Worker, field: str) -> None:
    async with leveled.client() as client:
        told = await client.worker()
        reason = told.unenforceable.get(f"limits.{field}")
        if reason is None:
            assert await output_of(client, "echo", "ran", limits=ASKED[field]) == "ran"
            return
        print(f"{field} at level {told.containment}: {reason}")
        said = await refusal(client, limits=ASKED[field])
        assert said == f"limits.{field}: cannot be enforced: {reason}"
        assert not leveled.events()  # nothing was recorded


async def test_a_queued_job_with_what_cannot_be(tmp_path: Path) -> None:
    with a_worker(tmp_path, SUBREAPER, JOBS_SLOTS="1") as worker:
        async with worker.client() as client:
            await client.start("sleep", "999")
            said = await refusal(client, limits=Limits(pids_max=20))
            assert said.startswith("limits.pids_max: cannot be enforced: it takes cgroup v2, and ")
            assert (await client.worker()).queued == 0


async def test_out_of_memory_is_told_apart(tmp_path: Path) -> None:
    with a_worker(tmp_path) as worker:
        async with worker.client() as client:
            reason = (await client.worker()).unenforceable.get("limits.memory_max_bytes")
            if reason:
                pytest.skip(f"no memory controller here: {reason}")
            eat = python("import time\nheld = []\nwhile True: held.append(bytearray(2**20))")
            limits = Limits(memory_max_bytes=64 * 2**20, swap_max_bytes=0)
            job, _ = await run(client, *eat, limits=limits)
            assert (job.outcome, job.signal) == (Outcome.OOM_KILLED, "SIGKILL")
            assert job.error_text.startswith("out of memory")
            job, _ = await run(client, *programs.kills_self(signal.SIGKILL), limits=limits)
            assert job.outcome == Outcome.SIGNALED


async def test_more_processes_than_allowed(tmp_path: Path) -> None:
    with a_worker(tmp_path) as worker:
        async with worker.client() as client:
            reason = (await client.worker()).unenforceable.get("limits.pids_max")
            if reason:
                pytest.skip(f"no pids controller here: {reason}")
            script = "for i in 1 2 3 4 5 6 7 8 9; do sleep 5 & done; wait"
            job, output = await run(client, "bash", "-c", script, limits=Limits(pids_max=5))
            assert "Resource temporarily unavailable" in output
            assert job.outcome == Outcome.FAILED


# Maxima


async def test_maxima(tmp_path: Path) -> None:
    keys = {"LIMITS_RLIMITS_LIMIT": "nofile=64", "LIMITS_NICE_MIN": "0", "LIMITS_NICE": "3"}
    with a_worker(tmp_path, **keys) as worker:
        async with worker.client() as client:
            script = "ulimit -Sn; ulimit -Hn; nice"
            assert (await output_of(client, "sh", "-c", script)).split() == ["64", "64", "3"]
            at_most = Limits(rlimits=[Rlimit(name="nofile", soft=64, hard=64)], nice=0)
            assert (await output_of(client, "sh", "-c", script, limits=at_most)).split() == ["64", "64", "0"]
            soft = Limits(rlimits=[Rlimit(name="nofile", soft=10)])
            assert (await output_of(client, "sh", "-c", script, limits=soft)).split() == ["10", "64", "3"]
            for beyond, said in (
                (Limits(rlimits=[Rlimit(name="nofile", soft=65)]), "limits.rlimits.nofile: must be at most 64, "),
                (Limits(nice=-1), "limits.nice: must be at least 0, "),
            ):
                with pytest.raises(InvalidArgument) as caught:
                    await client.start("true", limits=beyond)
                assert caught.value.message.startswith(said)


async def test_a_maximum_of_the_tree(tmp_path: Path) -> None:
    """It holds for who asks for nothing: here, where it cannot be enforced, that is told at the start and to each."""
    with a_worker(tmp_path, SUBREAPER, LIMITS_MEMORY_MAX_BYTES_LIMIT="64M") as worker:
        warned = worker.wait_log("limits.unenforceable")
        assert (warned["key"], warned["value"], warned["level"]) == ("limits.memory_max_bytes", 64 * 2**20, "warning")
        async with worker.client() as client:
            assert (await refusal(client)).startswith("limits.memory_max_bytes: cannot be enforced: ")
            with pytest.raises(InvalidArgument, match=r"^limits.memory_max_bytes: must be at most 67108864, which is"):
                await client.start("true", limits=Limits(memory_max_bytes=2**30))


# The leader's exit

# The leader exits with 3; what it leaves, in a session of its own, lives until the file is there.
LEAVES_ONE = 'setsid sh -c \'echo $$; until [ -e "$0" ]; do sleep 0.02; done; echo last\' "$1" & sleep 0.1; exit 3'


async def pid_of_child(client: WorkerClient, job_id: str) -> int:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            output = b"".join([chunk.data async for chunk in client.output(job_id)])
            if output.endswith(b"\n"):
                return int(output.split()[0])
            await asyncio.sleep(0.01)


async def test_what_is_left_is_ended(leveled: Worker, tmp_path: Path) -> None:
    async with leveled.client() as client:
        job, output = await run(client, "sh", "-c", LEAVES_ONE, "sh", str(tmp_path / "end"))
        assert (job.outcome, job.exit_code) == (Outcome.FAILED, 3)
        assert not is_alive(int(output))


async def test_what_is_left_is_waited_for(leveled: Worker, tmp_path: Path) -> None:
    async with leveled.client() as client:
        started = await client.start(
            "sh", args=["-c", LEAVES_ONE, "sh", str(tmp_path / "end")], leader_exit=LeaderExit.WAIT
        )
        leader = (await client.job(started.job_id)).pid
        child = await pid_of_child(client, started.job_id)
        await asyncio.to_thread(eventually_sync, lambda: not is_alive(leader), PATIENCE_S)
        await asyncio.sleep(0.2)
        assert is_alive(child)
        assert (await client.job(started.job_id)).state == JobState.RUNNING
        (tmp_path / "end").touch()
        job = await client.wait(started.job_id, PATIENCE_S)
        assert (job.outcome, job.exit_code) == (Outcome.FAILED, 3)
        assert b"last" in leveled.output(started.job_id)
        assert not is_alive(child)


async def test_the_worker_can_wait_by_configuration(tmp_path: Path) -> None:
    with a_worker(tmp_path, JOBS_LEADER_EXIT="wait") as worker:
        async with worker.client() as client:
            started = await client.start("sh", args=["-c", LEAVES_ONE, "sh", str(tmp_path / "end")])
            await pid_of_child(client, started.job_id)
            await asyncio.sleep(0.3)
            assert (await client.job(started.job_id)).state == JobState.RUNNING
            (tmp_path / "end").touch()
            assert (await client.wait(started.job_id, PATIENCE_S)).exit_code == 3


async def test_a_stop_ends_what_is_waited_for(leveled: Worker, tmp_path: Path) -> None:
    async with leveled.client() as client:
        argv = ["-c", LEAVES_ONE, "sh", str(tmp_path / "never")]
        started = await client.start("sh", args=argv, leader_exit=LeaderExit.WAIT)
        leader = (await client.job(started.job_id)).pid
        child = await pid_of_child(client, started.job_id)
        await asyncio.to_thread(eventually_sync, lambda: not is_alive(leader), PATIENCE_S)
        await client.stop(started.job_id, grace_s=0.2, wait=True, deadline_s=PATIENCE_S)
        job = await client.job(started.job_id)
        assert (job.outcome, job.exit_code) == (Outcome.STOPPED, 3)
        assert not is_alive(child)


# The child is in the leader's group, and takes its time to clean up.
TIDY = "sh -c 'trap \"sleep 0.4; echo tidy; exit\" TERM; echo $$; while :; do sleep 0.02; done' & sleep 0.1; exit 3"


async def test_what_is_waited_for_has_its_grace(leveled: Worker) -> None:
    async with leveled.client() as client:
        started = await client.start("sh", args=["-c", TIDY], leader_exit=LeaderExit.WAIT)
        leader = (await client.job(started.job_id)).pid
        await pid_of_child(client, started.job_id)
        await asyncio.to_thread(eventually_sync, lambda: not is_alive(leader), PATIENCE_S)
        await client.start("true")  # others come and go meanwhile
        await client.stop(started.job_id, grace_s=20.0)
        await run(client, "sh", "-c", "(sleep 0.1 &) ; sleep 0.05")
        job = await client.wait(started.job_id, PATIENCE_S)
        assert (job.outcome, job.exit_code) == (Outcome.STOPPED, 3)
        assert leveled.output(started.job_id).endswith(b"tidy\n")


async def test_a_new_supervisor_goes_on_waiting(leveled: Worker, tmp_path: Path) -> None:
    """At no cost: the end of the leader is no news for ever."""
    async with leveled.client() as client:
        argv = ["-c", LEAVES_ONE.replace("sleep 0.1", "sleep 1.5"), "sh", str(tmp_path / "end")]
        started = await client.start("sh", args=argv, leader_exit=LeaderExit.WAIT)
        leader = (await client.job(started.job_id)).pid
        child = await pid_of_child(client, started.job_id)
        first = leveled.supervisor_pid()
        os.kill(first, signal.SIGKILL)
        assert is_alive(leader)
        await asyncio.to_thread(eventually_sync, lambda: leveled.supervisor_pid() != first, PATIENCE_S)
        await asyncio.to_thread(eventually_sync, lambda: not is_alive(leader), PATIENCE_S)
        supervisor = leveled.supervisor_pid()
        await asyncio.to_thread(eventually_sync, lambda: programs.sleeps_for(supervisor, 0.05), PATIENCE_S)
        assert is_alive(child)
        assert (await client.job(started.job_id)).state == JobState.RUNNING
        (tmp_path / "end").touch()
        job = await client.wait(started.job_id, PATIENCE_S)
        assert not is_alive(child)
        if job.outcome == Outcome.LOST:
            pytest.skip(f"this kernel: {job.error_text}")
        assert (job.outcome, job.exit_code) == (Outcome.FAILED, 3)


# Pause and resume


def stands(worker: Worker, job_id: str) -> bool:
    written = worker.output(job_id)
    time.sleep(0.3)
    return worker.output(job_id) == written


async def test_pause_and_resume(leveled: Worker) -> None:
    async with leveled.client() as client:
        count = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done"
        started = await client.start("sh", args=["-c", f"setsid sh -c '{count}' & {count}"])
        await pid_of_child(client, started.job_id)
        await client.pause(started.job_id)
        assert (await client.job(started.job_id)).paused
        await asyncio.to_thread(eventually_sync, lambda: stands(leveled, started.job_id))
        stood = leveled.output(started.job_id)
        await client.resume(started.job_id)
        assert not (await client.job(started.job_id)).paused
        await asyncio.to_thread(
            eventually_sync, lambda: len(leveled.output(started.job_id)) > len(stood) + 8, PATIENCE_S
        )
        await client.stop(started.job_id, wait=True, deadline_s=PATIENCE_S)


async def test_a_stop_of_a_paused_job(leveled: Worker) -> None:
    """The signal reaches it: it ends by itself, not by the kill after the grace."""
    async with leveled.client() as client:
        started = await client.start(programs.EXIT_ON_TERM[0], args=programs.EXIT_ON_TERM[1:])
        await asyncio.to_thread(leveled.wait_output, started.job_id, b"ready\n")
        await client.pause(started.job_id)
        await client.stop(started.job_id, grace_s=20.0)
        job = await client.wait(started.job_id, 10.0)
        assert (job.outcome, job.exit_code, job.paused) == (Outcome.STOPPED, 5, False)


async def test_pausing_what_waits_for_its_tree(leveled: Worker, tmp_path: Path) -> None:
    async with leveled.client() as client:
        argv = ["-c", LEAVES_ONE, "sh", str(tmp_path / "end")]
        started = await client.start("sh", args=argv, leader_exit=LeaderExit.WAIT)
        leader = (await client.job(started.job_id)).pid
        child = await pid_of_child(client, started.job_id)
        await asyncio.to_thread(eventually_sync, lambda: not is_alive(leader), PATIENCE_S)
        await client.pause(started.job_id)
        (tmp_path / "end").touch()
        await asyncio.sleep(0.2)
        assert is_alive(child)
        await client.resume(started.job_id)
        assert (await client.wait(started.job_id, PATIENCE_S)).exit_code == 3


# The environment


async def test_what_a_job_finds_in_its_environment(worker: Worker, client: WorkerClient) -> None:
    started = await client.start("sleep", "999", env={"MINE": "1", "PATH": "/bin"})
    pid = (await client.job(started.job_id)).pid
    environment = dict(environment_of(pid))
    assert environment.pop("WORKER_JOB_MARK").endswith(f"-{started.job_id}")
    assert environment == {
        "PATH": "/bin",
        "MINE": "1",
        "WORKER_JOB_ID": started.job_id,
        "WORKER_STATE_ID": (await client.worker()).worker_id,
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
