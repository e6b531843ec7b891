"""A state directory has one supervisor, ever; one that cannot be used says why; a clean end leaves nothing."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures.make_store import JOBS
from tests.fixtures.make_store import PATH as FIRST_STORE
from tests.support import programs
from tests.support.crash.driver import shut_down
from tests.support.crash.judge import left_behind
from tests.support.programs import is_alive
from tests.support.served import failure_of
from tests.support.waiting import eventually_sync
from tests.support.workers import PATIENCE_S, ROOT, SupervisorProcess, Worker
from worker_svc.ipc import messages
from worker_svc.job import JobState, Outcome
from worker_svc.record import paths
from worker_svc.record.paths import STORE_NAME
from worker_svc.record.schema import SCHEMA_VERSION

# One at a time


def test_two_workers_started_at_once(tmp_path: Path) -> None:
    with Worker(tmp_path) as first:
        first.terminate()
        os.kill(first.supervisor_pid(), signal.SIGKILL)
        second = Worker(tmp_path, log="second.log")
        processes = [first.spawn(), second.spawn()]
        eventually_sync(lambda: any(process.poll() is not None for process in processes), PATIENCE_S)
        loser = first if processes[0].poll() is not None else second
        winner = second if loser is first else first
        assert loser.process is not None
        assert loser.process.wait() == 1
        assert "is in use by another worker" in loser.wait_log("worker.failed")["reason"]
        winner.wait_log("worker.serving", len(winner.log_events("worker.serving")) or 1)
        winner.terminate()


def test_many_supervisors_started_at_once(tmp_path: Path) -> None:
    with SupervisorProcess(tmp_path / "state") as supervisor:
        supervisor.kill()
        script = "import os, sys; from worker_svc.supervisor.__main__ import main; sys.exit(main(sys.argv[1:]))"
        processes = [
            subprocess.Popen(
                [sys.executable, "-S", "-c", script, "--state-dir", str(supervisor.path), "--ready-fd", "1"],
                cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )
            for _ in range(6)
        ]  # fmt: skip
        said = [process.stdout.readline() for process in processes if process.stdout is not None]
        ready = [line for line in said if line.startswith("ready ")]
        assert len(ready) == 1, said
        refused = [process.wait(PATIENCE_S) for process, line in zip(processes, said, strict=True) if line not in ready]
        assert refused == [messages.EXIT_LOCKED] * 5
        client = supervisor.connect()
        assert client.ask("status")["pid"] == int(ready[0].split()[1])
        client.ask("shutdown", stop_jobs=True)
        client.close()
        for process in processes:
            process.wait(PATIENCE_S)
            assert process.stdout is not None
            process.stdout.close()


def test_what_was_left_by_a_machine_that_died(tmp_path: Path, bystander: subprocess.Popen[bytes]) -> None:
    """Lock files with the number of somebody else, and a socket nobody listens on."""
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    for name in ("supervisor.lock", "worker.lock"):
        (state / name).write_text(f"{bystander.pid}\n")
    (state / paths.SOCKET_NAME).touch()
    with Worker(tmp_path) as worker:
        assert worker.supervisor_pid() not in (0, bystander.pid)


# Copies


async def test_a_copy_leaves_the_originals_jobs_alone(tmp_path: Path) -> None:
    """Made while jobs run and wait: the copy knows the finished ones, and of the others that they are not its own."""
    marks, copied = tmp_path / "marks", tmp_path / "copied"
    copied.mkdir()
    with Worker(tmp_path, JOBS_SLOTS="1") as worker:
        async with worker.client() as client:
            done = await client.start("sh", args=["-c", "exit 3"])
            await client.wait(done.job_id, PATIENCE_S)
            argv = programs.until_exists(tmp_path / "go", 4)
            running = await client.start(argv[0], args=argv[1:])
            pid = (await client.job(running.job_id)).pid
            queued = await client.start("sh", args=["-c", f"echo ran >>{marks}"])
            os.kill(worker.supervisor_pid(), signal.SIGSTOP)  # a copy of one moment
            try:
                shutil.copytree(worker.path, copied / "state", ignore=shutil.ignore_patterns("*.sock", "*-shm"))
            finally:
                os.kill(worker.supervisor_pid(), signal.SIGCONT)
            other = Worker(copied, state_dir=copied / "state")
            with other:
                async with other.client() as another:
                    assert (await another.job(done.job_id)).exit_code == 3
                    for job_id in (running.job_id, queued.job_id):
                        job = await another.job(job_id)
                        assert job.outcome == Outcome.LOST
                        assert "copied or moved here" in job.error_text
                    fresh = await another.start("sh", args=["-c", "exit 5"])
                    assert (await another.wait(fresh.job_id, PATIENCE_S)).exit_code == 5
            assert is_alive(pid)
            (tmp_path / "go").touch()
            assert (await client.wait(running.job_id, PATIENCE_S)).exit_code == 4
            assert (await client.wait(queued.job_id, PATIENCE_S)).outcome == Outcome.SUCCEEDED
    assert marks.read_text() == "ran\n"


# Such as cannot be used


def test_on_a_read_only_disk(small_disk: Path, tmp_path: Path) -> None:
    with SupervisorProcess(small_disk / "state") as supervisor:
        supervisor.finish("j", programs.exits(3))
        supervisor.client.ask("shutdown", stop_jobs=True)
        supervisor.wait_exit()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    reason = failure_of(Worker(tmp_path, state_dir=small_disk / "state"))
    assert reason.startswith(f"state.dir: {small_disk}/state")
    assert "read-only" in reason.lower()


def test_without_permission(tmp_path: Path) -> None:
    setpriv = shutil.which("setpriv")
    if os.geteuid() != 0 or not setpriv:
        pytest.skip("it takes root and setpriv to be somebody whom permissions bind")
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    for folder in (tmp_path, *tmp_path.parents):
        if str(folder).startswith("/tmp/pytest-of"):
            folder.chmod(folder.stat().st_mode | 0o055)
    run_as = [setpriv, "--reuid", "45678", "--regid", "45678", "--clear-groups"]
    done = subprocess.run(
        [*run_as, sys.executable, "-m", "worker_svc", "serve"],
        env={
            "PYTHONPATH": str(ROOT), "HOME": "/", "WORKER_SVC_STATE_DIR": str(state), "WORKER_SVC_SCHEDULER_ADDR": "",
            "WORKER_SVC_GRPC_SERVER_ADDR": "127.0.0.1:0", "WORKER_SVC_LOG_FORMAT": "json",
        },
        capture_output=True, text=True, check=False, timeout=PATIENCE_S,
    )  # fmt: skip
    if "ModuleNotFoundError" in done.stderr:
        pytest.skip("another user cannot run this Python")
    assert done.returncode == 1
    assert str(state) in done.stderr
    assert "Traceback" not in done.stderr


def test_on_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    """Nothing can be made there: said so at the start. What was there is served, and new jobs are refused."""
    full = small_disk / "full"
    with open(full, "wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                continue
        except OSError:
            file.flush()
    reason = failure_of(Worker(tmp_path, state_dir=small_disk / "state", log="first.log"))
    assert "no space left" in reason.lower() or "full" in reason.lower()
    full.unlink()
    worker = Worker(tmp_path, state_dir=small_disk / "state", log="second.log")
    with worker:
        assert worker.address


def test_of_a_newer_version(tmp_path: Path) -> None:
    with Worker(tmp_path) as worker:
        worker.terminate()
        os.kill(worker.supervisor_pid(), signal.SIGKILL)
        eventually_sync(lambda: not is_alive(worker.supervisor_pid()), PATIENCE_S)
        with sqlite3.connect(worker.path / STORE_NAME) as db:
            db.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
        db.close()
        reason = failure_of(Worker(tmp_path))
        assert f"{worker.path}/{STORE_NAME}: was written by a newer version" in reason
        assert "run that version, or use another state directory" in reason
        with sqlite3.connect(worker.path / STORE_NAME) as db:
            db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        db.close()


def test_of_the_first_version(tmp_path: Path) -> None:
    """It opens, is brought to the schema of today, and tells of its jobs; those that ran then are lost to a reboot."""
    (tmp_path / "state").mkdir(mode=0o700)
    db = sqlite3.connect(tmp_path / "state" / STORE_NAME)
    db.executescript(FIRST_STORE.read_text())
    assert db.execute("PRAGMA user_version").fetchone() == (1,)
    db.close()
    with SupervisorProcess(tmp_path / "state") as supervisor:
        for job_id, (states, outcome, exit_code, number, reason) in JOBS.items():
            record = supervisor.wait_finished(job_id)
            if job_id == "queued":
                assert (record.outcome, supervisor.output(job_id)) == (Outcome.SUCCEEDED, b"input")
            elif states[-1] is JobState.FINISHED:
                assert (record.outcome, record.exit_code, record.signal, record.reason) == (
                    outcome, exit_code, number, reason,
                )  # fmt: skip
            else:
                assert (record.outcome, record.reason.startswith("lost: machine rebooted")) == (Outcome.LOST, True)
        sequences = [event.sequence for event in supervisor.events()]
        assert sequences == list(range(1, len(sequences) + 1))


_OTHER_PROTOCOL = """
import sys
from worker_svc.ipc import messages
messages.PROTOCOL_VERSION += 1
from worker_svc.supervisor.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_supervisor_of_another_version(tmp_path: Path) -> None:
    """The worker refuses it, says why, and leaves it alone with its jobs."""
    (tmp_path / "state").mkdir(mode=0o700)
    command = ["-S", "-c", _OTHER_PROTOCOL, "--state-dir", str(tmp_path / "state"), "--ready-fd", "1"]
    with subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == f"ready {other.pid}\n"
        reason = failure_of(Worker(tmp_path))
        assert f"the supervisor (pid {other.pid}) speaks protocol {messages.PROTOCOL_VERSION + 1}" in reason
        assert f"the worker {messages.PROTOCOL_VERSION}" in reason
        assert other.poll() is None
        other.terminate()
    assert other.returncode == 0


# A clean end


@pytest.mark.parametrize("level", ["cgroup", "subreaper"])
@pytest.mark.parametrize("stop_jobs", [False, True])
async def test_shutdown_leaves_nothing_behind(tmp_path: Path, level: str, stop_jobs: bool) -> None:
    address = f"unix:{tmp_path}/w.sock"
    with Worker(tmp_path, GRPC_SERVER_ADDR=address, SUPERVISOR_CONTAINMENT=level, JOBS_SLOTS="4") as worker:
        async with worker.client() as client:
            jobs = [
                await client.start("sh", args=["-c", f"(setsid sleep 999 &) ; sleep {999 if stop_jobs else 0.5}"])
                for _ in range(6)
            ]
        options = ["--stop-jobs"] if stop_jobs else []
        assert await shut_down(worker, address, *options) == []
        assert await asyncio.to_thread(lambda: worker.process and worker.process.wait(PATIENCE_S)) == 0
        assert [*left_behind(worker.path)] == []
        assert not (tmp_path / "w.sock").exists()
        expected = Outcome.STOPPED if stop_jobs else Outcome.SUCCEEDED
        assert {worker.record(job.job_id).outcome for job in jobs} == {expected}
