"""Short ways to call a worker."""

from __future__ import annotations

from typing import Any

from tests.support.workers import PATIENCE_S
from worker_svc import (
    WorkerClient,
)
from worker_svc.pb import jobscheduler as pb


async def start(client: WorkerClient, argv: list[str], **options: Any) -> str:
    return (await client.start(argv[0], args=argv[1:], **options)).job_id


async def wait(client: WorkerClient, job_id: str) -> pb.Job:
    return await client.wait(job_id, PATIENCE_S)
