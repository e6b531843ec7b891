"""Floors for new jobs, and a disk that is full of output."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support import programs
from tests.support.capped import MIB, capped, writes
from tests.support.filesystems import mounted
from tests.support.waiting import eventually_sync
from tests.support.workers import PATIENCE_S, SupervisorProcess, Worker
from worker_svc.job import (
    JobState,
    Outcome,
    ResourceExhausted,
)
from worker_svc.record.paths import output_path

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("holes")]


# Floors


def test_floors(tmp_path: Path) -> None:
    """Below them no new job is taken, and the answer says which, where, and what to do."""

    async def check(worker: Worker, folder: Path) -> None:
        async with worker.client() as client:
            before = await client.start("sleep", args=["999"])
            filler = folder / "filler"
            filler.write_bytes(bytes(6 * MIB))
            with pytest.raises(ResourceExhausted) as caught:
                await client.start("true")
            text = caught.value.message
            assert str(4 * MIB) in text
            assert "state.min_free_bytes" in text
            assert str(worker.path) in text
            assert (await client.job(before.job_id)).state == JobState.RUNNING
            filler.unlink()
            await client.wait((await client.start("true")).job_id, PATIENCE_S)

            many = [folder / f"f{number}" for number in range(os.statvfs(folder).f_favail - 20)]
            for path in many:
                path.touch()
            with pytest.raises(ResourceExhausted) as caught:
                await client.start("true")
            text = caught.value.message
            assert "inodes" in text
            assert " 50 " in text
            assert "state.min_free_inodes" in text
            assert str(worker.path) in text
            for path in many:
                path.unlink()
            await client.wait((await client.start("true")).job_id, PATIENCE_S)

    floors: dict[str, Any] = {"STATE_MIN_FREE_BYTES": str(4 * MIB), "STATE_MIN_FREE_INODES": "50"}
    with (
        mounted(tmp_path / "small", "tmpfs", "size=8m,nr_inodes=300,mode=700") as folder,
        Worker(tmp_path, state_dir=folder / "state", **floors) as worker,
    ):
        asyncio.run(check(worker, folder))


# A disk that is full


def fill(folder: Path) -> Path:
    """Leaves not a byte free; returns the file to remove to have space again."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert os.statvfs(folder).f_bavail == 0
    return filler


def test_a_full_disk(tmp_path: Path) -> None:
    """Filled by jobs, with the worker's log on it too: nothing recorded is lost, and neither process dies."""

    async def check(worker: Worker, folder: Path) -> None:
        supervisor = worker.supervisor_pid()
        async with worker.client() as client:
            go = tmp_path / "go"
            argv = programs.until_exists(go, 3)
            exits = (await client.start(argv[0], args=argv[1:])).job_id
            sleeps = (await client.start("sleep", args=["999"])).job_id
            before = worker.events()
            # A job fills the disk: its writes fail, which is its own affair.
            # Once it is on record as running: before, the answer to its start would wait for space too.
            fill_now = tmp_path / "fill"
            script = 'until [ -e "$1" ]; do sleep 0.02; done; cat /dev/zero; exec sleep 999'
            hog = (await client.start("sh", args=["-c", script, "sh", str(fill_now)])).job_id
            fill_now.touch()
            eventually_sync(lambda: os.statvfs(folder).f_bavail <= os.statvfs(folder).f_blocks // 10, PATIENCE_S)
            filler = fill(folder)

            with pytest.raises(ResourceExhausted) as caught:
                await client.start("true", job_id="refused")
            assert "full" in caught.value.message or "free" in caught.value.message
            go.touch()
            pid = worker.record(exits).pid
            eventually_sync(lambda: not programs.state_of(pid), PATIENCE_S, "it was not reaped")
            pid = worker.record(sleeps).pid
            stopping = asyncio.create_task(client.stop(sleeps, grace_s=0.0))
            await asyncio.to_thread(eventually_sync, lambda: not programs.state_of(pid), PATIENCE_S, "not stopped")
            assert (await client.job(sleeps)).state in (JobState.RUNNING, JobState.STOPPING)
            with pytest.raises(ResourceExhausted):
                await client.start("true", job_id="refused")
            # The supervisor has nothing to do but to try again, a few times a second.
            await asyncio.to_thread(eventually_sync, lambda: programs.sleeps_for(supervisor, 0.05), message="it spins")

            hog_pid = worker.record(hog).pid
            os.kill(hog_pid, 9)
            filler.unlink()
            os.truncate(output_path(str(worker.path), hog), 0)
            await asyncio.wait_for(stopping, PATIENCE_S)
            assert (await client.wait(exits, PATIENCE_S)).exit_code == 3
            assert (await client.wait(sleeps, PATIENCE_S)).outcome == Outcome.STOPPED
            assert (await client.wait(hog, PATIENCE_S)).outcome == Outcome.SIGNALED
            started = await client.start("true", job_id="refused")
            assert not started.existed
            assert (await client.wait("refused", PATIENCE_S)).outcome == Outcome.SUCCEEDED
        events = worker.events()
        assert events[: len(before)] == before
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        assert worker.supervisor_pid() == supervisor
        assert worker.process is not None
        assert worker.process.poll() is None

    with (
        mounted(tmp_path / "small", "tmpfs", "size=3m,mode=700") as folder,
        Worker(tmp_path, state_dir=folder / "state", STATE_MIN_FREE_BYTES="0", STATE_MIN_FREE_INODES="0") as worker,
    ):
        asyncio.run(check(worker, folder))


def test_a_supervisor_that_starts_on_a_full_disk_still_drops_heads(tmp_path: Path) -> None:
    """What it cannot find out by writing it does not hold against jobs, which it would have to stop."""
    with (
        mounted(tmp_path / "small", "tmpfs", "size=16m,mode=700") as folder,
        SupervisorProcess(folder / "state") as supervisor,
    ):
        supervisor.run("j", writes(5 * MIB, 1, tmp_path / "begun", tmp_path / "go"), **capped(MIB))
        eventually_sync((tmp_path / "begun").exists, PATIENCE_S)
        filler = fill(folder)
        supervisor.kill()
        supervisor.start()
        assert supervisor.client.ask("status")["can_drop_head"]
        filler.unlink()
        (tmp_path / "go").touch()
        assert supervisor.wait_finished("j").outcome in (Outcome.SUCCEEDED, Outcome.LOST, Outcome.FAILED)
