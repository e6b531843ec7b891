"""Worker and supervisor are killed at every edge: no job is lost, none runs twice, no outcome is wrong."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.support.crash.chaos import SUPERVISOR_POINTS, WORKER_POINTS, Chaos
from tests.support.crash.driver import Driver, shut_down
from tests.support.crash.jobs import make_jobs
from tests.support.crash.judge import judge
from tests.support.kernel import tells_exit_of_strangers
from tests.support.served import assert_logged_exactly_once
from tests.support.waiting import eventually, eventually_sync
from tests.support.workers import PATIENCE_S, ROOT, Worker, until
from worker_svc import Unavailable, WorkerClient
from worker_svc.job import JobSpec, JobState, Outcome, Transition
from worker_svc.linux import failpoints
from worker_svc.record.writer import JobStore

_LEVELS = ("cgroup", "subreaper")


@pytest.mark.long
@pytest.mark.timeout(110)
def test_a_short_round_of_the_harness() -> None:
    """scripts/soak goes on for longer; the seed is printed, and says what was done to what (but not when)."""
    command = [sys.executable, "-m", "tests.system.crash_harness", "--jobs", "200"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


class Scene:
    """A worker that is started again whenever it ends, and jobs of known outcome."""

    def __init__(self, tmp_path: Path, level: str) -> None:
        self.address = f"unix:{tmp_path}/w.sock"
        self.worker = Worker(
            tmp_path, GRPC_SERVER_ADDR=self.address, STATE_MIN_FREE_BYTES="0", SUPERVISOR_CONTAINMENT=level
        )
        self.chaos = Chaos(self.worker, self.address, random.Random(1))
        self._marks = tmp_path / "marks"

    async def play(
        self,
        deed: Callable[[], Awaitable[None]],
        before: Callable[[], Awaitable[None]] | None = None,
        jobs: int = 24,
    ) -> None:
        """Runs jobs while `deed` is done, then shuts down and judges. `before`: when both run, and no job does yet."""
        keeper = asyncio.create_task(self.chaos.keep_running())
        try:
            await self.chaos.wait_healthy()
            if before is not None:
                await before()
            driver = Driver(self.address, random.Random(2))
            todo = list(make_jobs(random.Random(3), jobs, self._marks, longest_s=1.0))
            driving = asyncio.create_task(driver.run(todo, 8))
            await deed()
            await driving
            await self.chaos.calm()
        finally:
            self.chaos.is_over()
            await keeper
        problems = await shut_down(self.worker, self.address)
        verdict = judge(todo, self.worker, driver.told, driver.stop_asked_ns, self._marks)
        assert [*problems, *driver.problems, *verdict.problems] == []

    async def until_tripped(self) -> None:
        await eventually(self.chaos.points_reached, PATIENCE_S, "nobody comes to the point")


@pytest.fixture(params=_LEVELS)
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path, request.param)
    with made.worker:
        yield made


@pytest.mark.parametrize("scene", ["cgroup"], indirect=True)
@pytest.mark.parametrize("point", SUPERVISOR_POINTS)
async def test_the_supervisor_dies_at(point: str, scene: Scene) -> None:
    async def trip() -> None:
        scene.chaos.arm(failpoints.FILE_NAME, {point: 1 if point == "in-recovery" else 3})
        await scene.chaos.kill_supervisor()

    await scene.play(scene.until_tripped, trip)
    assert scene.chaos.points_reached() == [point]


@pytest.mark.parametrize("scene", ["subreaper"], indirect=True)
@pytest.mark.parametrize("point", WORKER_POINTS)
async def test_the_worker_dies_at(point: str, scene: Scene) -> None:
    async def trip() -> None:
        scene.chaos.arm(failpoints.WORKER_FILE_NAME, {point: 1 if point == "supervisor-started" else 3})
        await scene.chaos.kill_worker()

    async def end_supervisors() -> None:
        """Until one that was started by the worker that dies then."""
        while not scene.chaos.points_reached():
            await scene.chaos.kill_supervisor()
            await asyncio.sleep(0.2)

    await scene.play(end_supervisors if point == "supervisor-started" else scene.until_tripped, trip)
    assert scene.chaos.points_reached() == [point]


async def test_both_are_killed_at_once(scene: Scene) -> None:
    await scene.play(scene.chaos.kill_both)


# Many jobs at once


class Gate:
    """Jobs that all wait in open(2) of a pipe, and end with their own status when the test opens it."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "gate"
        os.mkfifo(self._path)

    def argv(self, status: int) -> list[str]:
        return ["sh", "-c", f': <"$1"; exit {status}', "sh", str(self._path)]

    def open(self) -> None:
        # For good: a job that runs by now may not have come to its open(2) yet.
        weakref.finalize(self, os.close, os.open(self._path, os.O_WRONLY))


async def _start_many(client: WorkerClient, gate: Gate, count: int) -> None:
    numbers = iter(range(count))

    async def start() -> None:
        for number in numbers:
            argv = gate.argv(number % 256)
            await client.start(argv[0], args=argv[1:], job_id=f"j{number}")

    await asyncio.gather(*(start() for _ in range(32)))


def _assert_all_ended(worker: Worker, count: int) -> None:
    for number in range(count):
        record = worker.wait_finished(f"j{number}")
        assert (record.exit_code, record.outcome is Outcome.LOST) == (number % 256, False), record


@pytest.mark.parametrize("level", _LEVELS)
@pytest.mark.parametrize("with_worker", [False, True], ids=["supervisor", "both"])
async def test_two_hundred_exit_statuses_outlive_the_supervisor(tmp_path: Path, level: str, with_worker: bool) -> None:
    if not tells_exit_of_strangers():
        pytest.skip("this kernel does not tell the exit status of who is not one's child (PIDFD_GET_INFO, Linux 6.15)")
    gate = Gate(tmp_path)
    with Worker(tmp_path, JOBS_SLOTS="256", SUPERVISOR_CONTAINMENT=level) as worker:
        async with worker.client() as client:
            await _start_many(client, gate, 200)
            first = worker.supervisor_pid()
            if with_worker:
                worker.kill()
            os.kill(first, signal.SIGKILL)
            if with_worker:
                await asyncio.to_thread(worker.start)
        async with worker.client() as client:
            await _until_another(worker, client, first)
            gate.open()
            await asyncio.to_thread(_assert_all_ended, worker, 200)
        assert_logged_exactly_once(worker)


async def _until_another(worker: Worker, client: WorkerClient, first: int) -> None:
    while (await client.worker(deadline_s=PATIENCE_S)).supervisor_pid == first:  # noqa: ASYNC110 - another process
        await asyncio.sleep(0.01)
    assert worker.supervisor_pid() != first


async def test_two_hundred_jobs_end_while_the_worker_stands_still(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with Worker(tmp_path, JOBS_SLOTS="256") as worker:
        async with worker.client() as client:
            await _start_many(client, gate, 200)
            os.kill(worker.pid, signal.SIGSTOP)
            try:
                gate.open()
                await asyncio.to_thread(_assert_all_ended, worker, 200)
                assert len(worker.log_events("job.transition")) < len(worker.events())
            finally:
                os.kill(worker.pid, signal.SIGCONT)
            assert (await client.wait("j7", PATIENCE_S)).exit_code == 7
        assert_logged_exactly_once(worker)


def _make_finished(state_dir: Path, count: int) -> None:
    """Into the store of a state directory that nobody uses."""
    state_dir.mkdir(mode=0o700)
    store = JobStore(str(state_dir))
    store.begin()
    spec, now_ns = JobSpec("true"), time.time_ns()
    for number in range(count):
        ordinal = store.add_job(f"old-{number}", spec, "", now_ns, b"")
        states = [JobState.NEW, JobState.STARTING, JobState.RUNNING, JobState.FINISHED]
        for before, after in pairwise(states):
            ends = after is JobState.FINISHED
            outcome = Outcome.SUCCEEDED if ends else Outcome.NONE
            moved = Transition(0, f"old-{number}", now_ns, before, after, outcome=outcome)
            changes = {"outcome": int(outcome), "exit_code": 0, "finished_ns": now_ns} if ends else {}
            store.add_transition(ordinal, moved, changes)
    store.commit()
    store.close()


@pytest.mark.long
@pytest.mark.timeout(120)
@pytest.mark.parametrize("with_supervisor", [False, True], ids=["worker", "both"])
async def test_a_restart_with_many_jobs(tmp_path: Path, with_supervisor: bool) -> None:
    await asyncio.to_thread(_make_finished, tmp_path / "state", 10_000)
    gate = Gate(tmp_path)
    address = f"unix:{tmp_path}/w.sock"
    with Worker(tmp_path, GRPC_SERVER_ADDR=address, JOBS_SLOTS="600", STATE_MIN_FREE_BYTES="0") as worker:
        async with worker.client() as client:
            await _start_many(client, gate, 500)
        await asyncio.to_thread(
            eventually_sync, lambda: len(worker.log_events("job.transition")) == len(worker.events()), PATIENCE_S
        )
        if with_supervisor:
            os.kill(worker.supervisor_pid(), signal.SIGKILL)
        worker.kill()
        began_s = time.monotonic()
        worker.spawn()
        async with WorkerClient(address) as client:
            await until(lambda: _is_answered(client, "old-7"))
            took_s = time.monotonic() - began_s
            assert (await client.job("j3")).state == JobState.RUNNING
        print(f"\nfirst answer {took_s:.2f} s after the start, with 10,000 finished and 500 running jobs")  # aim: one
        gate.open()
        await asyncio.to_thread(_assert_all_ended, worker, 500)


async def _is_answered(client: WorkerClient, job_id: str) -> bool:
    try:
        return (await client.query(job_id)).done
    except Unavailable:
        return False
