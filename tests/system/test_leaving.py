"""The real worker when it is asked to leave, and when it cannot start."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.support import programs, stalled_fs
from tests.support.fake_scheduler import FakeScheduler
from tests.support.programs import is_alive
from tests.support.served import failure_of
from tests.support.waiting import eventually
from tests.support.workers import PATIENCE_S, Worker, until
from worker_svc import JobState, Outcome, Unavailable, WorkerClient
from worker_svc.job import JobState as State

# Leaving


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
async def test_it_leaves_and_jobs_run_on(worker: Worker, number: signal.Signals, tmp_path: Path) -> None:
    async with worker.client() as client:
        argv = programs.until_exists(tmp_path / "go", 3)
        started = await client.start(argv[0], args=argv[1:])
        pid = (await client.job(started.job_id)).pid
        assert [job.job_id async for job in client.list()] == [started.job_id]
    assert worker.process is not None
    worker.process.send_signal(number)
    assert worker.process.wait(PATIENCE_S) == 0, worker.tail()
    assert [line["event"] for line in worker.log_events()][-3:] == [
        "worker.asked_to_leave",
        "worker.draining",
        "worker.left",
    ]
    assert (worker.tmp_path / "worker.out").read_text() == ""
    assert is_alive(pid)
    assert is_alive(worker.supervisor_pid())
    (tmp_path / "go").touch()
    assert worker.wait_finished(started.job_id).exit_code == 3


async def test_calls_that_wait_are_told_to_come_back(tmp_path: Path) -> None:
    """At once: the grace, which would be longer than anybody here waits, is for calls that end by themselves."""
    with Worker(tmp_path, GRPC_SERVER_DRAIN_GRACE_S="600") as worker:
        async with worker.client() as client:
            started = await client.start("sh", args=["-c", "echo ready; exec sleep 999"])
            job_id = started.job_id
            got: set[str] = set()

            async def follow(name: str, stream: Any) -> None:
                async for _ in stream:
                    got.add(name)

            calls = [
                asyncio.create_task(follow("watch", client.watch(1))),
                asyncio.create_task(follow("output", client.output(job_id, follow=True))),
                asyncio.create_task(client.wait(job_id)),
                asyncio.create_task(client.wait(job_id, 600.0)),
                asyncio.create_task(client.stop(job_id, signal="CONT", grace_s=600, wait=True)),
            ]
            await eventually(lambda: got == {"watch", "output"}, PATIENCE_S)
            await eventually(lambda: worker.record(job_id).state is State.STOPPING, PATIENCE_S)
            status = await asyncio.to_thread(worker.terminate)
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert [type(result) for result in results] == [Unavailable] * 5, results
            assert all("shutting down" in str(result) for result in results), results
            assert status == 0
            with pytest.raises(Unavailable):
                await client.job(job_id)
        assert is_alive(worker.record(job_id).pid)


async def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    """Here it would otherwise wait for a scheduler that does not answer."""
    async with FakeScheduler() as scheduler:
        worker = Worker(tmp_path, SCHEDULER_ADDR=scheduler.address)
        try:
            await asyncio.to_thread(worker.start)
            await scheduler.wait_for(lambda: scheduler.registered, PATIENCE_S)
            scheduler.hang_next()
            assert worker.process is not None
            worker.process.terminate()
            await scheduler.wait_for(lambda: scheduler.hanging, PATIENCE_S)
            worker.process.terminate()
            status = await asyncio.to_thread(worker.process.wait, PATIENCE_S)
            assert status == 128 + signal.SIGTERM
            assert worker.log_events()[-1]["event"] == "worker.ended_at_once"
        finally:
            scheduler.release()
            await asyncio.to_thread(worker.__exit__, None, None, None)


def test_a_signal_as_soon_as_it_serves(tmp_path: Path) -> None:
    """Whoever reads that it serves can ask it to leave, and it leaves in order."""
    with Worker(tmp_path) as worker:
        for _ in range(3):
            assert worker.terminate() == 0, worker.tail()
            worker.start()


async def test_the_scheduler_sees_it_come_and_go(tmp_path: Path) -> None:
    async with FakeScheduler() as scheduler:
        worker = Worker(tmp_path, SCHEDULER_ADDR=scheduler.address, SCHEDULER_BACKOFF_INITIAL_S="0.05")
        try:
            await asyncio.to_thread(worker.start)
            await scheduler.wait_for(lambda: len(scheduler.registered) == 1, PATIENCE_S)
            assert scheduler.registered[0].address == worker.address
            async with worker.client() as client:
                told = await client.worker()
                assert told.scheduler_worker_id == scheduler.registered[0].worker_id
                await scheduler.restart()
                await scheduler.wait_for(lambda: len(scheduler.registered) == 2, PATIENCE_S)
                await until(lambda: _is_registered(client, scheduler.registered[1].worker_id))
            assert await asyncio.to_thread(worker.terminate) == 0
            (left,) = scheduler.deregister_calls
            assert left.worker_id == scheduler.registered[1].worker_id
            assert [line["event"] for line in worker.log_events() if line["event"].startswith("scheduler.")] == [
                "scheduler.registered", "scheduler.lost", "scheduler.registered", "scheduler.deregistered",
            ] or worker.log_events("scheduler.unreachable")  # fmt: skip
        finally:
            await asyncio.to_thread(worker.__exit__, None, None, None)


async def _is_registered(client: WorkerClient, worker_id: str) -> bool:
    return (await client.worker()).scheduler_worker_id == worker_id


async def test_without_its_scheduler_it_serves_all_the_same(tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound, not listening: refused
        taken.bind(("127.0.0.1", 0))
        with Worker(tmp_path, SCHEDULER_ADDR=f"127.0.0.1:{taken.getsockname()[1]}") as worker:
            async with worker.client() as client:
                assert (await client.start("true")).state == JobState.RUNNING
            worker.wait_log("scheduler.unreachable")
            assert worker.terminate() == 0


# When it cannot start


async def test_a_start_that_hangs_is_answered(worker: Worker, tmp_path: Path) -> None:
    with stalled_fs.mounted_or_skip(tmp_path) as mount_point:
        async with worker.client() as client:
            started = await client.start(str(mount_point / "program"), job_id="hangs")
            assert started.state is JobState.STARTING
            await client.stop("hangs")
            assert (await client.wait("hangs")).outcome is Outcome.STOPPED


async def test_a_supervisor_that_stands_still_is_told_of(worker: Worker) -> None:
    async with worker.client() as client:
        await client.start("true")
        supervisor = worker.supervisor_pid()
        os.kill(supervisor, signal.SIGSTOP)
        try:
            answers = await asyncio.gather(
                client.start("true", job_id="job-1"), client.worker(), return_exceptions=True
            )
        finally:
            os.kill(supervisor, signal.SIGCONT)
        told = f"the supervisor (pid {supervisor}) does not answer: a signal made it stand still"
        for answer in answers:
            assert isinstance(answer, Unavailable)
            assert told in str(answer)
        assert "ask again, for the job id job-1, and it starts once" in str(answers[0])
        assert told in worker.wait_log("supervisor.silent")["reason"]
        await client.start("true", job_id="job-1")
        assert (await client.wait("job-1")).outcome is Outcome.SUCCEEDED
    assert [event.to_state for event in worker.events() if event.job_id == "job-1"].count(State.STARTING) == 1


def test_one_worker_a_directory(worker: Worker, tmp_path: Path) -> None:
    reason = failure_of(Worker(tmp_path, log="second.log"))
    assert reason.startswith(f"state.dir: {worker.path} ")
    assert str(worker.pid) in reason
    assert is_alive(worker.pid)


def test_a_port_in_use(worker: Worker, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Worker(tmp_path / "other", GRPC_SERVER_ADDR=worker.address)
    try:
        reason = failure_of(other)
    finally:
        other.__exit__(None, None, None)
    assert reason.startswith("grpc_server.addr: ")
    assert worker.address.rpartition(":")[2] in reason
    assert "in use" in reason


def test_a_state_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    reason = failure_of(Worker(tmp_path, state_dir=tmp_path / "file" / "state"))
    assert reason.startswith(f"state.dir: {tmp_path}/file/state")


def test_a_store_it_cannot_use(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "jobs.sqlite3").write_bytes(b"no database" * 1000)
    reason = failure_of(Worker(tmp_path))
    assert f"{tmp_path}/state/jobs.sqlite3" in reason
