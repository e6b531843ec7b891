"""The client, against a fake worker: what it sends and what it makes of the answers."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from datetime import UTC, datetime, timedelta

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from tests.support.fake_worker import MERGED, FakeWorker, chunks, finished
from tests.support.waiting import eventually
from worker_svc import (
    Groups,
    Identity,
    JobError,
    JobState,
    LeaderExit,
    Limits,
    Outcome,
    OutputPolicy,
    OutputStream,
    OutputVia,
    PruneJobsReq,
    Rlimit,
    Sandbox,
    StartJobReq,
    Unreachable,
    WorkerClient,
)
from worker_svc.job import ERRORS
from worker_svc.pb.jobscheduler import (
    DeleteJobReq,
    ListJobsReq,
    SignalJobReq,
    StopJobReq,
    StreamJobReq,
    WatchJobsReq,
)
from worker_svc.wire.statuses import STATUSES, from_grpc, to_grpc

LIMITS = Limits(memory_max_bytes=2**30, cpu_max_cores=0.5, rlimits=[Rlimit(name="core", soft=0)], nice=-5, umask=0)


def test_every_error_has_a_status_and_comes_back_as_itself() -> None:
    assert set(STATUSES) == set(ERRORS.values())
    assert len(set(STATUSES.values())) == len(STATUSES)
    for kind in ERRORS.values():
        error = from_grpc(to_grpc(kind("what is wrong")))
        assert type(error) is kind
        assert str(error) == "what is wrong"


def test_an_error_that_is_not_in_the_table() -> None:
    assert to_grpc(Unreachable("gone")).status is Status.UNAVAILABLE
    assert to_grpc(JobError("odd")).status is Status.INTERNAL
    internal = GRPCError(Status.INTERNAL, "fault")
    assert from_grpc(internal) is internal
    assert str(from_grpc(GRPCError(Status.NOT_FOUND))) == "not found"


async def test_start_sends_every_field(faked: WorkerClient, fake_worker: FakeWorker) -> None:
    answer = await faked.start(
        "bash",
        "x.sh",
        args=("a", "b"),
        env={"K": "V"},
        cwd="/tmp",
        stdin=b"in",
        timeout_s=1.5,
        stop_signal="INT",
        stop_grace_s=0,
        labels={"l": "m"},
        separate_stderr=True,
        job_id="mine",
        output_max_bytes=0,
        output_policy=OutputPolicy.STOP,
        output_via=OutputVia.FILE,
        limits=LIMITS,
        identity=Identity(user="nobody", groups=Groups()),
        sandbox=Sandbox(no_network=True),
        leader_exit=LeaderExit.WAIT,
        deadline_s=10,
    )
    assert answer.job_id == "mine"
    [request] = fake_worker.requests
    assert request == StartJobReq(
        command="bash",
        path="x.sh",
        args=["a", "b"],
        env={"K": "V"},
        cwd="/tmp",
        stdin=b"in",
        timeout=timedelta(seconds=1.5),
        stop_signal="INT",
        stop_grace=timedelta(0),
        labels={"l": "m"},
        separate_stderr=True,
        job_id="mine",
        output_max_bytes=0,
        output_policy=OutputPolicy(OutputPolicy.STOP),
        output_via=OutputVia(OutputVia.FILE),
        limits=LIMITS,
        identity=Identity(user="nobody", groups=Groups()),
        sandbox=Sandbox(no_network=True),
        leader_exit=LeaderExit(LeaderExit.WAIT),
    )


async def test_what_is_left_out_is_not_sent(faked: WorkerClient, fake_worker: FakeWorker) -> None:
    answer = await faked.start("true")
    assert (answer.job_id, answer.state) == ("assigned", JobState.RUNNING)
    assert fake_worker.requests == [StartJobReq(command="true")]
    assert fake_worker.requests[0].timeout is None


async def test_the_life_of_a_job(faked: WorkerClient, fake_worker: FakeWorker) -> None:
    job_id = (await faked.start("sleep")).job_id
    assert not (await faked.query(job_id)).done
    await faked.signal(job_id, "USR1")
    await faked.stop(job_id, signal="KILL", grace_s=2, wait=True)
    answer = await faked.query(job_id)
    assert (answer.done, answer.error) == (True, True)
    assert (await faked.job(job_id)).outcome == Outcome.STOPPED
    assert (await faked.wait(job_id)).job_id == job_id
    await faked.delete(job_id)
    assert fake_worker.took(SignalJobReq) == [SignalJobReq(job_id, "USR1")]
    assert fake_worker.took(StopJobReq) == [StopJobReq(job_id, "KILL", timedelta(seconds=2), wait=True)]
    assert fake_worker.took(DeleteJobReq) == [DeleteJobReq(job_id)]
    assert (await faked.worker()).slots == 4


async def test_prune(faked: WorkerClient, fake_worker: FakeWorker) -> None:
    answer = await faked.prune(max_age_s=60, max_count=0, max_bytes=5, dry_run=True)
    assert answer.job_ids == ["a"]
    assert fake_worker.requests == [PruneJobsReq(timedelta(seconds=60), 0, 5, dry_run=True)]


async def test_list_walks_the_pages(faked: WorkerClient, fake_worker: FakeWorker) -> None:
    fake_worker.jobs = {name: finished(name, Outcome.SUCCEEDED) for name in "abcde"}
    since = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    listing = faked.list(states=[JobState.FINISHED], labels={"k": "v"}, accepted_since=since, page_size=7)
    assert [job.job_id async for job in listing] == list("abcde")
    requests = fake_worker.took(ListJobsReq)
    assert len(requests) == 3
    assert requests[0].states == [JobState.FINISHED]
    assert requests[0].labels == {"k": "v"}
    assert requests[0].accepted_since == since
    assert requests[0].accepted_before is None
    assert requests[0].page_size == 7


async def test_list_takes_a_naive_time_for_local(faked: WorkerClient, fake_worker: FakeWorker) -> None:
    naive = datetime(2026, 1, 2, 3, 4, 5)  # noqa: DTZ001 - the point of the test
    assert [job async for job in faked.list(accepted_before=naive)] == []
    assert fake_worker.took(ListJobsReq)[0].accepted_before == naive.astimezone(UTC)


async def test_list_can_be_left_early(faked: WorkerClient, fake_worker: FakeWorker) -> None:
    fake_worker.jobs = {name: finished(name, Outcome.SUCCEEDED) for name in "abcde"}
    async with aclosing(faked.list()) as listing:
        assert (await anext(listing)).job_id == "a"
    assert len(fake_worker.took(ListJobsReq)) == 1


async def test_output(faked: WorkerClient, fake_worker: FakeWorker) -> None:
    fake_worker.jobs["a"] = finished("a", Outcome.SUCCEEDED)
    fake_worker.chunks[MERGED] = chunks(4096, b"\x00\xffend")
    got = [chunk async for chunk in faked.output("a", follow=True, offset=0)]
    assert [(chunk.offset, chunk.gap_bytes, chunk.data) for chunk in got] == [
        (0, 4096, b""),
        (4096, 0, b"\x00\xffend"),
    ]
    assert fake_worker.took(StreamJobReq) == [StreamJobReq(job_id="a", offset=0, follow=True)]


async def test_where_output_begins(faked: WorkerClient, fake_worker: FakeWorker) -> None:
    fake_worker.jobs["a"] = finished("a", Outcome.SUCCEEDED)
    assert [c async for c in faked.output("a", stream=OutputStream.STDERR, tail_lines=3)] == []
    assert [c async for c in faked.output("a", tail_bytes=0)] == []
    first, second = fake_worker.took(StreamJobReq)
    assert (first.stream, first.tail_lines, first.offset) == (OutputStream.STDERR, 3, None)
    assert second.tail_bytes == 0


async def test_leaving_a_stream_ends_it_at_the_worker(faked: WorkerClient, fake_worker: FakeWorker) -> None:
    async with aclosing(faked.watch(2, job_ids=["a"])) as transitions:
        assert [(await anext(transitions)).sequence for _ in range(2)] == [2, 3]
        await eventually(lambda: fake_worker.open_streams == 1)
    await eventually(lambda: fake_worker.open_streams == 0)
    assert fake_worker.took(WatchJobsReq) == [WatchJobsReq(2, ["a"])]


async def test_cancelling_a_stream_ends_it_at_the_worker(faked: WorkerClient, fake_worker: FakeWorker) -> None:
    job_id = (await faked.start("sleep")).job_id

    async def follow() -> None:
        async for _ in faked.output(job_id, follow=True):
            pass

    task = asyncio.create_task(follow())
    await eventually(lambda: fake_worker.open_streams == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually(lambda: fake_worker.open_streams == 0)
