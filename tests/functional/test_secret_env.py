"""Secret variables: delivered to the job, on no disk, in no answer, in no log; and what a death does to them."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from tests.support import programs
from tests.support.waiting import eventually
from tests.support.workers import PATIENCE_S, Worker
from worker_svc import InvalidArgument, JobExists, JobState, Outcome, PermissionDenied, PreconditionFailed, WorkerClient
from worker_svc.cli import main

SECRET = "hunter2-öffentlich\nnicht"
NAMES = {"DB_LOGIN": SECRET, "EMPTY": ""}
# What it prints is told nobody: only whether it has them.
TELL = ["sh", "-c", 'printf %s "$DB_LOGIN" | sha256sum; echo "${EMPTY-unset}"']
HAS_THEM = f"{sha256(SECRET.encode()).hexdigest()}  -\n\n".encode()


@pytest.fixture
def worker_keys() -> dict[str, Any]:
    return {"JOBS_SLOTS": "1"}


async def start(client: WorkerClient, job_id: str, secret_env: dict[str, str] | None = None) -> str:
    given = NAMES if secret_env is None else secret_env
    started = await client.start(TELL[0], args=TELL[1:], stdin=b"input", job_id=job_id, secret_env=given)
    return started.job_id


async def hold_slot(client: WorkerClient) -> str:
    """A job that keeps all others in the queue until it is stopped."""
    argv = programs.sleeps(999)
    return (await client.start(argv[0], args=argv[1:])).job_id


def files_with(folder: Path, secret: bytes) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and secret in path.read_bytes()]


async def test_the_job_has_them_and_nobody_else(worker: Worker, client: WorkerClient, tmp_path: Path) -> None:
    first = await hold_slot(client)
    job_id = await start(client, "mine")
    # While it waits, too, they are on no disk.
    assert files_with(tmp_path, b"hunter2") == []
    job = (await client.query(job_id)).job
    assert (job.state, list(job.spec.secret_env)) == (JobState.QUEUED, ["DB_LOGIN", "EMPTY"])
    assert "hunter2" not in repr(job)
    await client.stop(first)
    await client.wait(job_id, PATIENCE_S)
    assert worker.output(job_id) == HAS_THEM
    seen = [moved async for moved in _until(client, job.last_sequence)]
    assert "hunter2" not in repr(seen)
    assert files_with(tmp_path, b"hunter2") == []


async def _until(client: WorkerClient, sequence: int) -> AsyncIterator[object]:
    async for moved in client.watch(1):
        yield moved
        if moved.sequence >= sequence:
            return


async def test_the_same_start_may_bring_other_values(worker: Worker, client: WorkerClient) -> None:
    """A token may have been renewed between two attempts; and no disk may hold what tells two values apart."""
    first = await hold_slot(client)
    await start(client, "again")
    again = await client.start(
        TELL[0], args=TELL[1:], stdin=b"input", job_id="again", secret_env={"DB_LOGIN": "other", "EMPTY": "other"}
    )
    assert again.existed
    with pytest.raises(JobExists, match="job_id"):
        await start(client, "again", {"DB_LOGIN": SECRET})
    await client.stop(first)
    await client.wait("again", PATIENCE_S)
    assert worker.output("again") == HAS_THEM


async def test_a_queued_job_keeps_them_when_the_worker_dies(worker: Worker, client: WorkerClient) -> None:
    first = await hold_slot(client)
    await start(client, "queued")
    worker.restart()
    async with worker.client() as again:
        await again.stop(first)
        assert (await again.wait("queued", PATIENCE_S)).outcome == Outcome.SUCCEEDED
    assert worker.output("queued") == HAS_THEM


async def test_they_are_lost_with_the_supervisor_unless_the_start_is_made_again(
    worker: Worker, client: WorkerClient
) -> None:
    first = await hold_slot(client)
    await start(client, "lost")
    await start(client, "brought-again")
    os.kill(worker.supervisor_pid(), signal.SIGKILL)
    worker.wait_log("supervisor.connected", 2)
    await start(client, "brought-again")
    await client.stop(first)
    lost = await client.wait("lost", PATIENCE_S)
    assert lost.outcome == Outcome.START_FAILED
    assert lost.error_text == "secret_env: its values were lost with the supervisor that held them: start another job"
    with pytest.raises(PreconditionFailed, match="secret_env: its values were lost"):
        await start(client, "lost")
    assert (await client.wait("brought-again", PATIENCE_S)).outcome == Outcome.SUCCEEDED
    assert worker.output("brought-again") == HAS_THEM


async def test_what_is_wrong_with_them_is_said_without_them(worker: Worker, client: WorkerClient) -> None:
    with pytest.raises(InvalidArgument, match="secret_env: the value of 'A' must not contain NUL") as caught:
        await start(client, "", {"A": "hunter2\0"})
    assert "hunter2" not in str(caught.value)
    with pytest.raises(InvalidArgument, match="secret_env") as caught:
        await start(client, "", {"A": "hunter2\udcff"})
    assert "hunter2" not in str(caught.value)
    assert files_with(worker.tmp_path, b"hunter2") == []


async def test_the_policy_for_variables_holds_for_them(tmp_path: Path) -> None:
    rules = '{ deny_env = ["LD_*"], max = { env = 1 } }'
    with Worker(tmp_path, POLICY_ALL=rules) as worker:
        async with worker.client() as client:
            with pytest.raises(PermissionDenied, match="env: 'LD_PRELOAD' may not be set"):
                await start(client, "", {"LD_PRELOAD": "x"})
            with pytest.raises(PermissionDenied, match="env: must be at most 1, not 2"):
                await start(client, "", NAMES)


async def test_the_command_line_takes_them_from_its_environment(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in NAMES.items():
        monkeypatch.setenv(name, value)
    options = ["--addr", worker.address, "--secret-env", "DB_LOGIN", "--secret-env=EMPTY"]
    assert await asyncio.to_thread(main, ["start", *options, "--id", "by-cli", *TELL]) == 0
    await eventually(lambda: worker.output("by-cli") == HAS_THEM, PATIENCE_S)
    assert await asyncio.to_thread(main, ["query", "--addr", worker.address, "by-cli"]) == 0
    shown = capsys.readouterr().out
    assert "DB_LOGIN" in shown
    for wrong, problem in (("NOT_SET", "there is no variable 'NOT_SET'"), ("A=hunter2", "must be a name alone")):
        with pytest.raises(SystemExit):
            await asyncio.to_thread(main, ["start", "--secret-env", wrong, "true"])
        said = capsys.readouterr().err
        assert problem in said
        assert "hunter2" not in said + shown


async def test_no_core_of_ours_has_them_and_jobs_can_have_cores(worker: Worker, client: WorkerClient) -> None:
    def soft_limit(pid: int | str) -> str:
        limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
        return next(line.split()[4] for line in limits if line.startswith("Max core file size"))

    assert [soft_limit(pid) for pid in (worker.pid, worker.supervisor_pid())] == ["0", "0"]
    job = await client.start("sh", args=["-c", "ulimit -c"])
    await client.wait(job.job_id, PATIENCE_S)
    ours = soft_limit("self")
    told = worker.output(job.job_id).decode().strip()
    assert told == ours or int(told) * 512 == int(ours)
