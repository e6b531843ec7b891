"""Limits for a job's whole tree, what outlives its leader, pause and resume, end to end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import programs
from tests.support.limited import a_worker, output_of, refusal, run
from tests.support.programs import is_alive, python
from tests.support.waiting import eventually_sync, stays
from tests.support.workers import PATIENCE_S, Worker
from worker_svc import (
    InvalidArgument,
    JobState,
    LeaderExit,
    Limits,
    Outcome,
    Rlimit,
    WorkerClient,
)
from worker_svc.job.limits import OF_TREE
from worker_svc.supervisor.containment import CGROUP, SUBREAPER


@pytest.fixture(params=[CGROUP, SUBREAPER])
def leveled(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Worker]:
    """Where the spawner makes no difference."""
    with a_worker(tmp_path, request.param) as running:
        yield running


# For the tree as a whole


ASKED: dict[str, Limits] = {
    "memory_max_bytes": Limits(memory_max_bytes=64 * 2**20),
    "swap_max_bytes": Limits(swap_max_bytes=0),
    "cpu_max_cores": Limits(cpu_max_cores=0.5),
    "cpu_weight": Limits(cpu_weight=50),
    "pids_max": Limits(pids_max=20),
    "io_weight": Limits(io_weight=50),
    "memory_high_bytes": Limits(memory_high_bytes=64 * 2**20),
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
        await asyncio.to_thread(eventually_sync, lambda: not is_alive(int(output.split()[0])))  # it is dying


async def test_what_is_left_is_waited_for(leveled: Worker, tmp_path: Path) -> None:
    async with leveled.client() as client:
        started = await client.start(
            "sh", args=["-c", LEAVES_ONE, "sh", str(tmp_path / "end")], leader_exit=LeaderExit.WAIT
        )
        leader = (await client.job(started.job_id)).pid
        child = await pid_of_child(client, started.job_id)
        await asyncio.to_thread(eventually_sync, lambda: not is_alive(leader), PATIENCE_S)
        assert await asyncio.to_thread(stays, lambda: is_alive(child))
        assert (await client.job(started.job_id)).state == JobState.RUNNING
        (tmp_path / "end").touch()
        job = await client.wait(started.job_id, PATIENCE_S)
        assert (job.outcome, job.exit_code) == (Outcome.FAILED, 3)
        assert b"last" in leveled.output(started.job_id)
        await asyncio.to_thread(eventually_sync, lambda: not is_alive(child))  # it is dying


async def test_the_worker_can_wait_by_configuration(tmp_path: Path) -> None:
    with a_worker(tmp_path, JOBS_LEADER_EXIT="wait") as worker:
        async with worker.client() as client:
            started = await client.start("sh", args=["-c", LEAVES_ONE, "sh", str(tmp_path / "end")])
            await pid_of_child(client, started.job_id)
            assert await asyncio.to_thread(stays, lambda: worker.record(started.job_id).state == JobState.RUNNING)
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
        await asyncio.to_thread(eventually_sync, lambda: not is_alive(child))  # it is dying


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
        await asyncio.to_thread(eventually_sync, lambda: not is_alive(child))  # it is dying
        if job.outcome == Outcome.LOST:
            pytest.skip(f"this kernel: {job.error_text}")
        assert (job.outcome, job.exit_code) == (Outcome.FAILED, 3)


# Pause and resume


def stands(worker: Worker, job_id: str) -> bool:
    written = worker.output(job_id)
    return stays(lambda: worker.output(job_id) == written)


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
        assert await asyncio.to_thread(stays, lambda: is_alive(child))
        await client.resume(started.job_id)
        assert (await client.wait(started.job_id, PATIENCE_S)).exit_code == 3
