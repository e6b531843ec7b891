"""How long finished jobs and their output are kept."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support import programs
from tests.support.capped import MIB
from tests.support.waiting import eventually_sync
from tests.support.workers import PATIENCE_S, ROOT, SupervisorProcess, Worker, start_fields
from worker_svc.job import (
    JobState,
    Outcome,
)
from worker_svc.record import paths

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("holes")]


# Retention


def files(state: Path) -> set[str]:
    return {path.name for path in (state / "output").iterdir()}


def finished(supervisor: SupervisorProcess) -> list[str]:
    with supervisor.reader() as reader:
        return [row.job_id for row in reader.oldest_finished(100_000, None)]


def run_some(supervisor: SupervisorProcess, count: int, argv: list[str] = programs.TRUE) -> list[str]:
    """One after the other, so that it is clear which is older; with one that runs before them, and one among them."""
    supervisor.run("running-first", programs.SLEEP)
    job_ids = []
    for number in range(count):
        if number == count // 2:
            supervisor.run("running", programs.SLEEP)
        job_ids.append(f"j{number}")
        supervisor.finish(job_ids[-1], argv)
    return job_ids


def assert_kept(supervisor: SupervisorProcess, state: Path, expected: list[str]) -> None:
    eventually_sync(lambda: finished(supervisor) == expected, PATIENCE_S, f"not {expected} are kept")
    names = {f"{job_id}.out" for job_id in [*expected, "running", "running-first"]}
    eventually_sync(lambda: files(state) == names, PATIENCE_S, "files do not match records")
    assert supervisor.record("running").state is JobState.RUNNING


def test_by_count(supervisor: SupervisorProcess, state: Path) -> None:
    job_ids = run_some(supervisor, 6)
    supervisor.client.hello(keep_jobs=2)
    assert_kept(supervisor, state, job_ids[4:])
    supervisor.client.hello(keep_jobs=1)
    assert_kept(supervisor, state, job_ids[5:])
    assert [event.sequence for event in supervisor.events()] == list(range(1, len(supervisor.events()) + 1))


def test_by_bytes(supervisor: SupervisorProcess, state: Path) -> None:
    job_ids = run_some(supervisor, 5, programs.flood(MIB))
    supervisor.client.hello(keep_bytes=3 * MIB + 4096)
    assert_kept(supervisor, state, job_ids[2:])


def test_by_age(supervisor: SupervisorProcess, state: Path) -> None:
    job_ids = run_some(supervisor, 3)
    first, second, third = (supervisor.record(job_id) for job_id in job_ids)
    assert first.finished_ns is not None
    assert second.finished_ns is not None
    assert third.finished_ns is not None
    supervisor.client.hello(keep_age_s=3600.0)
    assert_kept(supervisor, state, job_ids)
    # So that the first two are too old, and the third will not be for a while.
    eventually_sync(lambda: time.time_ns() - third.finished_ns > 20_000_000, PATIENCE_S)  # type: ignore[operator]
    supervisor.client.hello(keep_age_s=0.001)
    assert_kept(supervisor, state, [])


def test_many_go_in_small_steps(supervisor: SupervisorProcess, state: Path) -> None:
    """Meanwhile the supervisor answers as ever, and jobs run."""
    client = supervisor.client
    count = 400
    numbers = [client.send("start", **_start(f"j{number}")) for number in range(count)]
    for number in numbers:
        client.answer(number)
    eventually_sync(lambda: len(finished(supervisor)) == count, 60)
    other = supervisor.connect()
    client.hello(keep_jobs=1)
    rounds = 0
    while len(finished(supervisor)) > 1:
        other.ask("status")
        rounds += 1
    assert rounds > 3
    other.close()
    eventually_sync(lambda: len(files(state)) == 1, PATIENCE_S)


def _start(job_id: str) -> dict[str, Any]:
    return start_fields(job_id, programs.TRUE)


def test_it_goes_on_while_jobs_come_without_pause(supervisor: SupervisorProcess) -> None:
    client = supervisor.client
    client.hello(keep_jobs=10)
    outstanding: list[int] = []
    for number in range(1500):
        outstanding.append(client.send("start", **_start(f"j{number}")))
        if len(outstanding) > 30:
            client.answer(outstanding.pop(0))
        if number % 100 == 99:
            client.hello(keep_jobs=10 + number // 100 % 2)  # a look now, not in half a minute
    for number in outstanding:
        client.answer(number)
    assert len(finished(supervisor)) < 1200
    client.hello(keep_jobs=5)
    eventually_sync(lambda: len(finished(supervisor)) == 5, PATIENCE_S)


def test_events_are_dropped_only_when_logged(state: Path) -> None:
    with SupervisorProcess(state) as supervisor:
        for number in range(10):
            supervisor.finish(f"j{number}", programs.TRUE)
        latest = supervisor.events()[-1].sequence
        assert latest == 30
        supervisor.client.hello(keep_events=5)
        supervisor.client.ask("status")
        assert len(supervisor.events()) == 30  # no worker has logged any
        (state / paths.CURSOR_NAME).write_bytes((12).to_bytes(8, "little"))
        supervisor.client.hello(keep_events=6)
        eventually_sync(lambda: supervisor.events()[0].sequence == 13, PATIENCE_S, "those that are logged stay")
        (state / paths.CURSOR_NAME).write_bytes((30).to_bytes(8, "little"))
        supervisor.client.hello(keep_events=5)
        eventually_sync(lambda: supervisor.events()[0].sequence == 26, PATIENCE_S)
        supervisor.finish("more", programs.TRUE)
        sequences = [event.sequence for event in supervisor.events()]
        assert sequences == list(range(sequences[0], 34))
        assert 26 <= sequences[0] <= 29
        assert len(finished(supervisor)) == 11


def test_watching_from_before_the_record_begins(tmp_path: Path) -> None:
    """Skipped is what is gone: the first one received shows where the record begins, and from there no gap."""

    async def check(worker: Worker) -> None:
        async with worker.client() as client:
            received = []
            async for moved in client.watch(from_sequence=1):
                received.append(moved.sequence)
                if moved.sequence == 33:
                    break
            assert received == list(range(26, 34))

    state = tmp_path / "state"
    with SupervisorProcess(state) as supervisor:
        for number in range(11):
            supervisor.finish(f"j{number}", programs.TRUE)
        (state / paths.CURSOR_NAME).write_bytes((30).to_bytes(8, "little"))
        supervisor.client.hello(keep_events=8)
        eventually_sync(lambda: supervisor.events()[0].sequence == 26, PATIENCE_S)
        supervisor.hang_up()
        with Worker(tmp_path, state_dir=state) as worker:
            asyncio.run(check(worker))


def test_prune_by_hand(tmp_path: Path) -> None:
    async def run(worker: Worker) -> list[str]:
        async with worker.client() as client:
            job_ids = []
            for _ in range(4):
                job_ids.append((await client.start("head", args=["-c", "100000", "/dev/zero"])).job_id)
                await client.wait(job_ids[-1], PATIENCE_S)
            job_ids.append((await client.start("sleep", args=["999"])).job_id)
            return job_ids

    def prune(*arguments: str) -> list[str]:
        done: subprocess.CompletedProcess[str] = subprocess.run(
            [sys.executable, "-m", "worker_svc", "prune", "--addr", worker.address, *arguments],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.splitlines()

    with Worker(tmp_path) as worker:
        *job_ids, running = asyncio.run(run(worker))
        names = {f"{job_id}.out" for job_id in [*job_ids, running]}
        *listed, said = prune("--keep", "1", "--dry-run")
        assert listed == job_ids[:3]
        assert said.startswith("3 finished jobs would be removed, ")
        assert files(worker.path) == names
        *listed, said = prune("--keep", "1")
        assert listed == job_ids[:3]
        assert said.startswith("3 finished jobs removed, ")
        kept = {f"{job_id}.out" for job_id in (job_ids[3], running)}
        eventually_sync(lambda: files(worker.path) == kept, PATIENCE_S)
        assert prune("--older-than", "3600")[-1].startswith("0 finished jobs removed")
        assert prune("--max-bytes", "0")[:-1] == job_ids[3:]
        assert prune("--older-than", "0", "--keep", "0")[-1].startswith("0 finished jobs removed")
        assert worker.record(running).state is JobState.RUNNING


def test_files_left_by_a_supervisor_that_died_are_removed(state: Path) -> None:
    """Between the commit of a deletion and the unlinking. Never the files of a job, whatever its state."""
    with SupervisorProcess(state, slots=1) as supervisor:
        supervisor.finish("done", programs.BOTH_OUTPUTS, separate_stderr=True)
        supervisor.run("running", programs.SLEEP)
        supervisor.run("queued", programs.TRUE)
        supervisor.kill()
        keep = files(state) | {"notes.txt", ".hidden", "queued.out"}
        for name in ("notes.txt", ".hidden", "queued.out"):
            (state / "output" / name).write_text("x")
        for number in range(1000):
            (state / "output" / f"orphan-{number}.out").write_text("x")
        for name in ("orphan.err", "done.out.123-4.gone", "x.out.1.gone"):
            (state / "output" / name).write_text("x")
        supervisor.start()
        eventually_sync(lambda: files(state) == keep, PATIENCE_S, "orphans are left, or more is gone")
        supervisor.client.ask("status")
        supervisor.client.ask("stop", job_id="running", grace_s=0.0)
        assert supervisor.wait_finished("queued").outcome is Outcome.SUCCEEDED


def test_files_are_not_removed_for_want_of_the_store(state: Path) -> None:
    """Who loses the store shall not lose the output with it."""
    (state / "output").mkdir(parents=True)
    (state / "output" / "precious.out").write_text("x")
    process, said = SupervisorProcess(state).spawn()
    assert process.wait(PATIENCE_S) == 1
    assert "is missing, though there were jobs here (output/)" in said
    assert files(state) == {"precious.out"}
