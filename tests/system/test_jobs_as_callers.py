"""A job that calls the worker that runs it, on its unix socket: known for one, and what [access] says of jobs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.support.workers import ROOT, Worker

CALL = [sys.executable, "-m", "worker_svc", "list", "--json", "--addr"]


async def said_by_a_job(worker: Worker, script: str = '"$@"; :') -> str:
    async with worker.client() as client:
        args = ["-c", script, "sh", *CALL, worker.address]
        started = await client.start("sh", args=args, env={"PYTHONPATH": str(ROOT)})
        await client.wait(started.job_id)
    return worker.output(started.job_id).decode()


@pytest.fixture
def unstarted_worker(tmp_path: Path) -> Worker:
    worker = Worker(tmp_path, GRPC_SERVER_ADDR=f"unix:{tmp_path}/worker.sock")
    worker.environment["PATH"] = os.environ["PATH"]
    return worker


@pytest.mark.parametrize("script", ['"$@"; :', 'env -i PYTHONPATH=$PYTHONPATH "$@"; :'])
async def test_a_job_of_an_admins_user_is_no_admin(unstarted_worker: Worker, script: str) -> None:
    with unstarted_worker:
        said = await said_by_a_job(unstarted_worker, script)
        assert f"job:{os.geteuid()} has no role on this worker" in said
        denied = [line for line in unstarted_worker.log_events("audit") if line["decision"] == "denied"]
        assert [(line["identity"], line["role"]) for line in denied] == [(f"job:{os.geteuid()}", "none")]


async def test_jobs_can_be_given_a_role(unstarted_worker: Worker) -> None:
    """With jobs of their own: what an admin of the same user has started is not theirs."""
    unstarted_worker.keys["ACCESS_SUBMITTERS"] = "job:*"
    with unstarted_worker:
        assert await said_by_a_job(unstarted_worker) == ""


async def test_nor_is_one_after_the_supervisor_was_lost(unstarted_worker: Worker, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with unstarted_worker:
        async with unstarted_worker.client() as client:
            script = f'until [ -e {gate} ]; do sleep 0.02; done; "$@"; :'
            args = ["-c", script, "sh", *CALL, unstarted_worker.address]
            started = await client.start("sh", args=args, env={"PYTHONPATH": str(ROOT)})
            os.kill(unstarted_worker.supervisor_pid(), 9)
            unstarted_worker.wait_log("supervisor.connected", 2)
            gate.touch()
            await client.wait(started.job_id)
        assert f"job:{os.geteuid()} has no role" in unstarted_worker.output(started.job_id).decode()
