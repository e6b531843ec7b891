"""Workers that die: jobs run on, nothing is lost, and the log has each transition exactly once, in order."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support import programs
from tests.support.programs import is_alive
from tests.support.served import MIX, assert_logged_exactly_once
from tests.support.waiting import eventually
from tests.support.workers import PATIENCE_S, Worker, until
from worker_svc import JobState, Outcome, Unavailable, WorkerClient
from worker_svc.pb import jobscheduler as pb


@pytest.fixture
def worker_keys() -> dict[str, Any]:
    return {"JOBS_SLOTS": "8"}


async def test_nothing_is_lost_when_the_worker_is_killed(worker: Worker, tmp_path: Path) -> None:
    """Some jobs end before, some while no worker is there, some after, and some wait in the queue meanwhile."""
    expected: dict[str, tuple[int, int | None, str]] = {}
    async with worker.client() as client:
        for number, (argv, outcome, exit_code, name) in enumerate(MIX):
            started = await client.start(argv[0], args=argv[1:])
            expected[started.job_id] = (outcome, exit_code, name)
            if number % 2:
                await client.wait(started.job_id, PATIENCE_S)
        while_dead, after = [], []
        for number in range(4):
            argv = programs.until_exists(tmp_path / "while-dead", number)
            while_dead.append((await client.start(argv[0], args=argv[1:])).job_id)
        for number in range(8):  # more than there are slots
            argv = programs.until_exists(tmp_path / "after", number)
            after.append((await client.start(argv[0], args=argv[1:])).job_id)
    supervisor = worker.supervisor_pid()
    worker.kill()
    (tmp_path / "while-dead").touch()
    for number, job_id in enumerate(while_dead):
        assert worker.wait_finished(job_id).exit_code == number
        expected[job_id] = (Outcome.FAILED if number else Outcome.SUCCEEDED, number, "")
    await asyncio.to_thread(worker.start)
    assert worker.supervisor_pid() == supervisor
    async with worker.client() as client:
        (tmp_path / "after").touch()
        for number, job_id in enumerate(after):
            await client.wait(job_id, PATIENCE_S)
            expected[job_id] = (Outcome.FAILED if number else Outcome.SUCCEEDED, number, "")
        for job_id, ends in expected.items():
            job = await client.wait(job_id, PATIENCE_S)
            assert (job.outcome, job.exit_code, job.signal) == ends
        assert {job.job_id async for job in client.list()} == set(expected)
    assert_logged_exactly_once(worker)


async def test_killed_again_and_again_under_load(worker: Worker) -> None:
    """The log is exact whatever the moment of the kill."""
    started: list[str] = []
    for turn in range(4):
        async with worker.client() as client:

            async def start_many(client: WorkerClient = client, turn: int = turn) -> None:
                for number in range(1000):
                    job_id = f"j{turn}-{number}"
                    await client.start("sh", args=["-c", f"exit {number % 5}"], job_id=job_id)
                    started.append(job_id)

            load = asyncio.create_task(start_many())
            lines = len(worker.log_events("job.transition"))
            await eventually(lambda lines=lines: len(worker.log_events("job.transition")) > lines + 15, PATIENCE_S)  # type: ignore[misc]
            worker.kill()
            with pytest.raises(Unavailable):
                await load
        await asyncio.to_thread(worker.start)
    assert started
    for job_id in started:  # what was answered is on record, and ends
        assert worker.wait_finished(job_id).exit_code == int(job_id.rpartition("-")[2]) % 5
    await eventually(lambda: _running(worker) == 0, PATIENCE_S)
    assert_logged_exactly_once(worker)


def _running(worker: Worker) -> int:
    return sum((event.from_state == 0) - (event.to_state == 5) for event in worker.events())


async def test_a_watcher_goes_on_where_it_was(worker: Worker) -> None:
    seen: list[pb.JobTransition] = []

    async def watch(client: WorkerClient, until: int) -> None:
        async with contextlib.aclosing(client.watch(len(seen) + 1)) as moves:
            async for moved in moves:
                seen.append(moved)
                if len(seen) >= until:
                    return

    for turn in range(3):
        async with worker.client() as client:
            watching = asyncio.create_task(watch(client, 10_000))
            for number in range(5):
                started = await client.start("sh", args=["-c", f"exit {number}"], job_id=f"j{turn}-{number}")
                if number < 3:
                    await client.wait(started.job_id, PATIENCE_S)
            worker.kill()
            with pytest.raises(Unavailable):
                await watching
        await asyncio.to_thread(worker.start)
    for turn in range(3):
        for number in range(5):
            worker.wait_finished(f"j{turn}-{number}")
    events = worker.events()
    async with worker.client() as client, asyncio.timeout(PATIENCE_S):
        if len(seen) < len(events):
            await watch(client, len(events))
    assert [moved.sequence for moved in seen] == list(range(1, len(events) + 1))
    assert [(moved.job_id, int(moved.to_state)) for moved in seen] == [
        (event.job_id, int(event.to_state)) for event in events
    ]


async def test_a_wait_is_made_again_and_ends(worker: Worker, tmp_path: Path) -> None:
    async with worker.client() as client:
        argv = programs.until_exists(tmp_path / "go", 3)
        job_id = (await client.start(argv[0], args=argv[1:])).job_id
        waiting = asyncio.create_task(client.wait(job_id))
        await client.worker()
        worker.kill()
        with pytest.raises(Unavailable):
            await waiting
    await asyncio.to_thread(worker.start)
    async with worker.client() as client:
        waiting = asyncio.create_task(client.wait(job_id, PATIENCE_S))
        (tmp_path / "go").touch()
        assert (await waiting).exit_code == 3


async def test_a_stop_outlives_the_worker(worker: Worker) -> None:
    """The grace is kept and the kill comes while no worker is there."""
    async with worker.client() as client:
        started = await client.start(programs.IGNORE_TERM[0], args=programs.IGNORE_TERM[1:])
        worker.wait_output(started.job_id, b"ready\n")
        await client.stop(started.job_id, grace_s=0.5)
        worker.kill()
    record = worker.wait_finished(started.job_id)
    assert (record.outcome, record.signal) == (Outcome.STOPPED, signal.SIGKILL)
    await asyncio.to_thread(worker.start)
    assert_logged_exactly_once(worker)


async def test_a_timeout_outlives_the_worker(worker: Worker) -> None:
    async with worker.client() as client:
        started = await client.start("sleep", args=["999"], timeout_s=0.5)
        worker.kill()
    assert worker.wait_finished(started.job_id).outcome == Outcome.TIMED_OUT


async def test_what_is_told_of_a_job_is_the_same_after(worker: Worker) -> None:
    async with worker.client() as client:
        done = await client.start("sh", args=["-c", "echo x; exit 3"], labels={"a": "b"}, env={"K": "v"}, stdin=b"in")
        before = await client.wait(done.job_id, PATIENCE_S)
        running = await client.start("sleep", args=["999"])
        pid = (await client.job(running.job_id)).pid
        identity = (await client.worker()).worker_id
    worker.restart()
    async with worker.client() as client:
        assert await client.job(done.job_id) == before
        job = await client.job(running.job_id)
        assert (job.state, job.pid) == (JobState.RUNNING, pid)
        assert (await client.worker()).worker_id == identity
        assert b"".join([chunk.data async for chunk in client.output(done.job_id)]) == b"x\n"
        await client.stop(running.job_id, wait=True)
        assert not is_alive(pid)


async def test_the_supervisor_is_killed(worker: Worker) -> None:
    """The worker lives on and starts another one, which takes new jobs and knows the old ones."""
    async with worker.client() as client:
        done = await client.start("sh", args=["-c", "exit 3"])
        await client.wait(done.job_id, PATIENCE_S)
        first = (await client.worker()).supervisor_pid
        running = await client.start("sleep", args=["999"])
        os.kill(first, signal.SIGKILL)
        await until(lambda: _has_another(client, first))
        started = await client.start("sh", args=["-c", "exit 4"])
        assert (await client.wait(started.job_id, PATIENCE_S)).exit_code == 4
        assert (await client.job(done.job_id)).exit_code == 3
        await client.stop(running.job_id, wait=True, deadline_s=PATIENCE_S)
        job = await client.job(running.job_id)
        assert job.outcome in (Outcome.STOPPED, Outcome.LOST)
    assert_logged_exactly_once(worker)


async def _has_another(client: WorkerClient, pid: int) -> bool:
    with contextlib.suppress(Unavailable):
        return (await client.worker()).supervisor_pid != pid
    return False
