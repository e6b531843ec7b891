"""A state directory as release 0.1.0 left it, with its worker and supervisor killed: opened, adopted, gone on with.

`tests/fixtures/release-0.1.0` is what that release wrote; only the directory's identity and the processes are of here.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.waiting import eventually
from tests.support.workers import Worker
from worker_svc import JobState, Outcome, WorkerClient
from worker_svc.supervisor.spawn import start_ticks_of

RELEASE = Path(__file__).parent.parent / "fixtures/release-0.1.0"
RUNNING = ("running", "other", "third")


@pytest.fixture
def processes() -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """What that release had started, each in a session of its own."""
    started = {job_id: subprocess.Popen(["sleep", "600"], start_new_session=True) for job_id in RUNNING}
    yield started
    for process in started.values():
        process.kill()
        process.wait()


@pytest.fixture
def old_worker(tmp_path: Path, processes: dict[str, subprocess.Popen[bytes]]) -> Iterator[Worker]:
    state = tmp_path / "state"
    (state / "output").mkdir(parents=True, mode=0o700)
    state.chmod(0o700)
    for name in ("succeeded.out", "failed.out"):
        (state / "output" / name).write_bytes((RELEASE / name).read_bytes())
    for job_id in ("stopped", *RUNNING):
        (state / "output" / f"{job_id}.out").touch()
    (state / "worker.cursor").write_bytes((RELEASE / "worker.cursor").read_bytes())
    machine = Path("/etc/machine-id").read_text().strip() if Path("/etc/machine-id").exists() else ""
    directory = f"{machine}:{os.statvfs(state).f_fsid}:{state.stat().st_ino}"
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with sqlite3.connect(state / "jobs.sqlite3") as db:
        db.executescript((RELEASE / "jobs.sql").read_text())
        db.execute("UPDATE meta SET value = ? WHERE key = 'directory'", (directory,))
        for job_id, process in processes.items():
            place = (process.pid, start_ticks_of(process.pid), boot_id, job_id)
            db.execute("UPDATE jobs SET pid = ?, start_ticks = ?, boot_id = ? WHERE job_id = ?", place)
    db.close()
    with Worker(tmp_path, STATE_DIR=str(state), JOBS_SLOTS="3") as worker:
        yield worker


async def test_what_the_last_release_left_is_opened_and_its_jobs_are_adopted(
    old_worker: Worker, processes: dict[str, subprocess.Popen[bytes]]
) -> None:
    async with WorkerClient(old_worker.address) as client:
        jobs = {job.job_id: job async for job in client.list()}
        assert {job_id: job.state for job_id, job in jobs.items()} == {
            **dict.fromkeys(("succeeded", "failed", "stopped"), JobState.FINISHED),
            **dict.fromkeys(RUNNING, JobState.RUNNING),
            "queued": JobState.QUEUED,
        }
        assert [jobs[job_id].outcome for job_id in ("succeeded", "failed", "stopped")] == [
            Outcome.SUCCEEDED, Outcome.FAILED, Outcome.STOPPED,
        ]  # fmt: skip
        assert {job_id: jobs[job_id].pid for job_id in RUNNING} == {job_id: p.pid for job_id, p in processes.items()}
        limits = jobs["failed"].spec.limits
        assert limits is not None
        assert (limits.nice, limits.umask, [(one.name, one.soft, one.hard) for one in limits.rlimits]) == (
            3, 0o27, [("nofile", 64, 128)],
        )  # fmt: skip
        assert b"".join([chunk.data async for chunk in client.output("succeeded")]) == b"hello\n"

        # One of them is stopped, and what waited for its slot runs.
        await client.stop("other", grace_s=5)
        processes["other"].wait()
        queued = await client.wait("queued")
        assert (queued.outcome, queued.exit_code) == (Outcome.SUCCEEDED, 0)
        assert b"".join([chunk.data async for chunk in client.output("queued")]) == b"queued says v\n"
        stopped = await client.wait("other")
        assert stopped.outcome in (Outcome.STOPPED, Outcome.LOST)  # before Linux 6.15 its status cannot be known
        # Transitions go on with the next number, and each is in the log.
        assert queued.last_sequence > 17
        await eventually(lambda: [line["sequence"] for line in old_worker.log_events("job.transition")][:1] == [18])
    os.kill(processes["third"].pid, signal.SIGKILL)
