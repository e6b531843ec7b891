"""Jobs with limits, by the real client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.contained import why_unavailable
from tests.support.spawning import skip_unless_built
from tests.support.workers import PATIENCE_S, Worker
from worker_svc import (
    Job,
    Outcome,
    PreconditionFailed,
    WorkerClient,
)


def keys_of(level: str = "auto", spawner: str = "auto") -> dict[str, Any]:
    skip_unless_built(spawner)
    reason = why_unavailable(level) if level != "auto" else ""
    if reason:
        pytest.skip(f"containment {level}: {reason}")
    return {"SUPERVISOR_CONTAINMENT": level, "SUPERVISOR_SPAWNER": spawner, "JOBS_CWD": "/"}


def a_worker(tmp_path: Path, level: str = "auto", **keys: Any) -> Worker:
    return Worker(tmp_path, **keys_of(level), **keys)


async def run(client: WorkerClient, *argv: str, **fields: Any) -> tuple[Job, str]:
    """Runs a job to its end; with what it wrote."""
    started = await client.start(argv[0], args=argv[1:], **fields)
    job = await client.wait(started.job_id, PATIENCE_S)
    output = b"".join([chunk.data async for chunk in client.output(job.job_id)])
    return job, output.decode()


async def output_of(client: WorkerClient, *argv: str, **fields: Any) -> str:
    job, output = await run(client, *argv, **fields)
    assert job.outcome == Outcome.SUCCEEDED, (job.error_text, output)
    return output.strip()


async def refusal(client: WorkerClient, **fields: Any) -> str:
    with pytest.raises(PreconditionFailed) as caught:
        await client.start("true", **fields)
    return caught.value.message
