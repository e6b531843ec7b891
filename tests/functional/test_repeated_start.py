"""A start that is made again, with the job id of the first: it is answered with the one job, whatever has changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import programs
from tests.support.workers import PATIENCE_S, Worker, until
from worker_svc import InvalidArgument, JobExists, JobNotFound, JobState, PermissionDenied, PreconditionFailed

POLICY = '{{ allow_commands = ["/bin/{command}"], script_roots = ["{root}"], max.timeout_s = {timeout_s} }}'


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    folder = tmp_path / "scripts"
    folder.mkdir(mode=0o755)
    return folder


@pytest.fixture
def worker_keys(scripts: Path) -> dict[str, Any]:
    rules = POLICY.format(command="sh", root=scripts, timeout_s=1000)
    return {"ACCESS_ANONYMOUS": "submitter", "POLICY_SUBMITTER": rules}


async def test_policy_files_and_limits_may_be_others_by_then(worker: Worker, scripts: Path) -> None:
    script = scripts / "once.sh"
    script.write_text("sleep 999\n")
    request: dict[str, Any] = {"command": "/bin/sh", "path": str(script), "job_id": "one", "output_max_bytes": 1 << 30}
    async with worker.client() as client:
        assert not (await client.start(**request)).existed
        script.unlink()
        assert (await client.start(**request)).existed
        with pytest.raises(PreconditionFailed):  # of a new job it is looked at
            await client.start(**{**request, "job_id": "two"})
    worker.kill()
    worker.keys["POLICY_SUBMITTER"] = POLICY.format(command="dash", root=scripts, timeout_s=1)
    worker.keys |= {"OUTPUT_MAX_BYTES": "1000", "OUTPUT_MAX_BYTES_LIMIT": "1000", "JOBS_TIMEOUT_S": "0.5"}
    worker.start()
    async with worker.client() as client:
        again = await client.start(**request)
        assert (again.existed, again.state) == (True, JobState.RUNNING)
        assert worker.log_events("audit")[-1]["rule"] == "repeated request"
        with pytest.raises((PermissionDenied, InvalidArgument)):
            await client.start(**{**request, "job_id": "two"})
        with pytest.raises((JobExists, PermissionDenied, InvalidArgument)):
            await client.start(**{**request, "args": ["other"]})
        await client.stop("one", wait=True)
        assert (await client.start(**request)).state == JobState.FINISHED


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Worker]:
    with Worker(tmp_path, RETENTION_MAX_JOBS="9", RETENTION_MAX_IDS="2") as worker:
        yield worker


async def test_after_retention_took_the_job_it_does_not_run_again(plain: Worker, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    run: dict[str, Any] = {"command": "sh", "args": ["-c", f"echo ran >> {marks}"], "job_id": "one"}
    fails: dict[str, Any] = {"command": "no-such-program", "job_id": "fails"}
    async with plain.client() as client:
        await client.start(**run)
        await client.wait("one", PATIENCE_S)
        with pytest.raises(PreconditionFailed, match="not found") as first:
            await client.start(**fails)
        await client.wait((await client.start("true")).job_id, PATIENCE_S)
    plain.keys["RETENTION_MAX_JOBS"] = "1"
    plain.restart()
    async with plain.client() as client:

        async def is_gone() -> bool:
            return "one" not in [job.job_id async for job in client.list()]

        await until(is_gone)
        again = await client.start(**run)
        assert (again.existed, again.state) == (True, JobState.FINISHED)
        with pytest.raises(JobExists):
            await client.start(**{**run, "args": ["-c", "true"]})
        with pytest.raises(JobNotFound):
            await client.job("one")
        with pytest.raises(PreconditionFailed) as second:
            await client.start(**fails)
        assert second.value.message == first.value.message
    assert marks.read_text() == "ran\n"


async def test_pruned_is_remembered_and_deleted_is_not(plain: Worker) -> None:
    async with plain.client() as client:
        for job_id in "abc":
            await client.start("true", job_id=job_id)
            await client.wait(job_id, PATIENCE_S)
        await client.prune(max_count=0)
        # The latest two ids are kept.
        existed = {job_id: (await client.start("true", job_id=job_id)).existed for job_id in "bca"}
        assert existed == {"a": False, "b": True, "c": True}
        await client.wait("a", PATIENCE_S)
        await client.delete("a")
        assert not (await client.start("true", job_id="a")).existed


async def test_an_id_of_somebody_else_is_not_answered_from_the_record(tmp_path: Path) -> None:
    """By the unix socket the caller is another identity."""
    with Worker(tmp_path, ACCESS_ANONYMOUS="submitter") as worker:
        async with worker.client() as client:
            await client.start(programs.SLEEP[0], args=programs.SLEEP[1:], job_id="mine")
        worker.kill()
        address = f"unix:{tmp_path}/socket"
        worker.keys["GRPC_SERVER_ADDR"] = address
        worker.start()
        async with worker.client() as client:
            with pytest.raises(JobExists):
                await client.start(programs.SLEEP[0], args=programs.SLEEP[1:], job_id="mine")
