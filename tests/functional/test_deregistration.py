"""Leaving the scheduler, and what is left of a registration."""

from __future__ import annotations

import asyncio
import gc
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_scheduler import FakeScheduler
from tests.support.registering import NEVER_S, Log, registration, running, tls_contexts
from tests.support.waiting import PATIENCE_S, eventually
from worker_svc.registration import Registration


async def test_deregisters_with_its_id(scheduler: FakeScheduler) -> None:
    log = Log()
    subject = registration(scheduler, log)
    async with running(subject):
        await eventually(lambda: subject.registered)
        await subject.deregister(10.0)
        assert not subject.registered
        await subject.deregister(10.0)  # the second has nothing to do
        await scheduler.wait_for(lambda: scheduler.open_connections == 0)
        await scheduler.restart()
        await asyncio.sleep(0.1)  # many times the backoff: it does not register any more
    assert [call.worker_id for call in scheduler.deregister_calls] == ["worker-1.1"]
    assert len(scheduler.register_calls) == 1
    assert [name for _, name, _ in log.lines] == ["scheduler.registered", "scheduler.deregistered"]


async def test_deregisters_after_run_was_cancelled(scheduler: FakeScheduler) -> None:
    subject = registration(scheduler, Log())
    async with running(subject):
        await eventually(lambda: subject.registered)
    await scheduler.wait_for(lambda: scheduler.open_connections == 0)
    await subject.deregister(10.0)
    assert [call.worker_id for call in scheduler.deregister_calls] == ["worker-1.1"]
    await scheduler.wait_for(lambda: scheduler.open_connections == 0)


async def test_deregister_waits_for_the_registration_under_way(scheduler: FakeScheduler) -> None:
    """The scheduler has it before it: its answer must not leave a worker behind that is gone."""
    scheduler.hang_next()
    subject = registration(scheduler, Log())
    async with running(subject):
        await scheduler.wait_for(lambda: scheduler.hanging == 1)
        leaving = asyncio.create_task(subject.deregister(10.0))
        await asyncio.sleep(0)  # its first step
        scheduler.release()
        await leaving
    assert [call.worker_id for call in scheduler.deregister_calls] == ["worker-1.1"]


@pytest.mark.parametrize("run_on", [True, False], ids=["while running", "after run"])
async def test_deregister_with_the_scheduler_gone(scheduler: FakeScheduler, run_on: bool) -> None:
    log = Log()
    subject = registration(scheduler, log, backoff_initial_s=NEVER_S, backoff_max_s=NEVER_S)
    async with running(subject) as task:
        await eventually(lambda: subject.registered)
        if not run_on:
            task.cancel()
            await asyncio.wait((task,))
        await scheduler.stop()
        await subject.deregister(NEVER_S)
    [failed] = log.of("scheduler.deregister_failed", "warning")
    assert failed["scheduler_worker_id"] == "worker-1.1"


async def test_deregister_is_bounded(scheduler: FakeScheduler) -> None:
    log = Log()
    subject = registration(scheduler, log)
    async with running(subject):
        await eventually(lambda: subject.registered)
        scheduler.hang_next()
        await subject.deregister(0.1)
    assert log.of("scheduler.deregister_failed")[0]["reason"].startswith("no answer in")
    await scheduler.wait_for(lambda: scheduler.open_connections == 0)


async def test_deregister_before_any_registration(absent: FakeScheduler) -> None:
    log = Log()
    subject = registration(absent, log, backoff_initial_s=NEVER_S, backoff_max_s=NEVER_S)
    async with running(subject):
        await eventually(lambda: log.of("scheduler.unreachable"))
        await subject.deregister(NEVER_S)
    assert [name for _, name, _ in log.lines] == ["scheduler.unreachable"]


TURNS = itertools.count()


async def connecting(_: FakeScheduler, subject: Registration) -> None:
    await asyncio.sleep(0)


async def calling(scheduler: FakeScheduler, _: Registration) -> None:
    await scheduler.wait_for(lambda: scheduler.hanging == 1)


async def registered(_: FakeScheduler, subject: Registration) -> None:
    await eventually(lambda: subject.registered)


async def losing(scheduler: FakeScheduler, subject: Registration) -> None:
    await eventually(lambda: subject.registered)
    scheduler.drop_connections()  # takes effect in the turn of the loop in which run() is cancelled


async def losing_in_call(scheduler: FakeScheduler, _: Registration) -> None:
    """In one of these turns grpclib's own cancellation of the call and that of run() come together."""
    await scheduler.wait_for(lambda: scheduler.hanging == 1)
    scheduler.drop_connections()
    for _turn in range(next(TURNS) % 8):
        await asyncio.sleep(0)


@pytest.mark.parametrize("moment", [connecting, calling, registered, losing, losing_in_call])
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
async def test_cancellation_leaves_nothing_behind(moment: Callable[..., Any], tls: bool, tmp_path: Path) -> None:
    server_context, client_context = tls_contexts(tmp_path) if tls else (None, None)
    async with FakeScheduler(ssl_context=server_context) as scheduler:
        tasks_before = asyncio.all_tasks()
        for _ in range(8):
            if moment in (calling, losing_in_call):
                scheduler.hang_next()
            subject = registration(scheduler, Log(), ssl_context=client_context)
            task = asyncio.create_task(subject.run())
            await moment(scheduler, subject)
            task.cancel()
            await asyncio.wait((task,), timeout=PATIENCE_S)
            assert task.cancelled()
            await scheduler.wait_for(lambda: scheduler.open_connections == 0 and scheduler.hanging == 0)
        await eventually(lambda: asyncio.all_tasks() == tasks_before)  # the server's own end a turn later
    gc.collect()  # a ResourceWarning would fail the test


def test_nothing_left_when_the_loop_ends() -> None:
    """As the worker ends: no connection outlives run() that asyncio.run() would have to warn of."""

    async def main() -> None:
        async with FakeScheduler() as scheduler:
            subject = registration(scheduler, Log())
            task = asyncio.create_task(subject.run())
            await eventually(lambda: subject.registered)
            task.cancel()
            await asyncio.wait((task,))

    asyncio.run(main())
    gc.collect()
