"""Values at the ends of what a message can hold, in requests to a real worker: understood, or refused by name."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.support.workers import Worker
from worker_svc import InvalidArgument, Outcome, OutOfRange, PreconditionFailed

# SQLite's whole numbers, and so the store's nanoseconds, have 64 bits: the years 1677 to 2262.
LONG_AGO = [datetime.min.replace(tzinfo=UTC), datetime(1677, 1, 1, tzinfo=UTC)]
FAR_AWAY = [datetime.max.replace(tzinfo=UTC), datetime(2263, 1, 1, tzinfo=UTC)]


async def test_times_that_no_record_can_have(worker: Worker) -> None:
    async with worker.client() as client:
        job = await client.wait((await client.start("true")).job_id)

        async def listed(**query: Any) -> list[str]:
            return [one.job_id async for one in client.list(**query)]

        for moment in LONG_AGO:
            assert await listed(accepted_since=moment) == [job.job_id]
            assert await listed(accepted_before=moment) == []
        for moment in FAR_AWAY:
            assert await listed(accepted_before=moment) == [job.job_id]
            assert await listed(accepted_since=moment) == []


async def test_numbers_that_no_record_can_have(worker: Worker) -> None:
    async with worker.client() as client:
        for number in (2**63, 2**64 - 1):
            with pytest.raises(InvalidArgument, match=r"^output_max_bytes: must be at most 9223372036854775807, not"):
                await client.start("true", output_max_bytes=number)
        job = await client.wait((await client.start("true", output_max_bytes=2**63 - 1)).job_id)
        assert (job.outcome, job.spec.output_max_bytes) == (Outcome.SUCCEEDED, 2**63 - 1)
        with pytest.raises(OutOfRange, match=r"^from_sequence: "):
            async for _ in client.watch(from_sequence=2**64 - 1):
                pass
        pruned = await client.prune(max_age_s=10 * 365 * 86400.0, max_count=2**64 - 1, max_bytes=2**64 - 1)
        assert pruned.jobs == 0


async def test_the_time_of_a_running_job_is_not_by_a_clock_that_can_be_set(worker: Worker) -> None:
    """As if that had been set back by a year since it started."""
    async with worker.client() as client:
        job_id = (await client.start("sleep", args=["999"])).job_id
        with closing(sqlite3.connect(worker.path / "jobs.sqlite3", timeout=30)) as db, db:
            db.execute("UPDATE jobs SET started_ns = started_ns + ?", (365 * 86400 * 10**9,))
        job = (await client.query(job_id)).job
        listed = [one async for one in client.list()]
        for wall_time in (job.wall_time, listed[0].wall_time):
            assert wall_time is not None
            assert timedelta(0) < wall_time < timedelta(days=1)


async def test_an_error_that_quotes_much_reaches_every_client(worker: Worker) -> None:
    """With the usual limit of 8 KiB on headers; a message has each byte that is no plain letter three times as long."""
    async with worker.client() as client:
        for name, value in (("cwd", "/" + "é" * 60_000), ("job_id", "x" * 100_000), ("stop_signal", "é" * 30_000)):
            odd: dict[str, Any] = {name: value}
            with pytest.raises((InvalidArgument, PreconditionFailed)) as refused:
                await client.start("true", **odd)
            assert str(refused.value).startswith(f"{name}: ")
            assert len(str(refused.value).encode()) <= 2048
