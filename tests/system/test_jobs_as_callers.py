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
def unstarted(tmp_path: Path) -> Worker:
    worker = Worker(tmp_path, GRPC_SERVER_ADDR=f"unix:{tmp_path}/worker.sock")
    worker.environment["PATH"] = os.environ["PATH"]
    return worker


@pytest.mark.parametrize("script", ['"$@"; :', 'env -i PYTHONPATH=$PYTHONPATH "$@"; :'])
async def test_a_job_of_an_admins_user_is_no_admin(unstarted: Worker, script: str) -> None:
    with unstarted:
        said = await said_by_a_job(unstarted, script)
        assert f"job:{os.geteuid()} has no role on this worker" in said
        denied = [line for line in unstarted.log_events("audit") if line["decision"] == "denied"]
        assert [(line["identity"], line["role"]) for line in denied] == [(f"job:{os.geteuid()}", "none")]


async def test_jobs_can_be_given_a_role(unstarted: Worker) -> None:
    """With jobs of their own: what an admin of the same user has started is not theirs."""
    unstarted.keys["ACCESS_SUBMITTERS"] = "job:*"
    with unstarted:
        assert await said_by_a_job(unstarted) == ""


async def test_nor_is_one_after_the_supervisor_was_lost(unstarted: Worker, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with unstarted:
        async with unstarted.client() as client:
            script = f'until [ -e {gate} ]; do sleep 0.02; done; "$@"; :'
            args = ["-c", script, "sh", *CALL, unstarted.address]
            started = await client.start("sh", args=args, env={"PYTHONPATH": str(ROOT)})
            os.kill(unstarted.supervisor_pid(), 9)
            unstarted.wait_log("supervisor.connected", 2)
            gate.touch()
            await client.wait(started.job_id)
        assert f"job:{os.geteuid()} has no role" in unstarted.output(started.job_id).decode()
