"""Many jobs in one call: RunJobs, StartJobs, QueryJobs, StopJobs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from grpclib.const import Cardinality

from tests.support import programs
from tests.support.calls import start
from tests.support.workers import PATIENCE_S, ROOT, Worker, until
from worker_svc import (
    InvalidArgument,
    JobState,
    JobView,
    Outcome,
    PermissionDenied,
    PreconditionFailed,
    Unavailable,
    WorkerClient,
)
from worker_svc.cli import main
from worker_svc.job import JobState as State
from worker_svc.pb import jobscheduler as pb

COUNT = 2000


def trues(count: int, prefix: str = "job") -> list[dict[str, Any]]:
    return [{"command": "/bin/true", "job_id": f"{prefix}-{number}"} for number in range(count)]


def runs_of(worker: Worker) -> Counter[str]:
    """How often each job began to run."""
    return Counter(moved.job_id for moved in worker.events() if moved.to_state is State.RUNNING)


async def raw_results(
    client: WorkerClient, requests: list[pb.RunJobsReq]
) -> tuple[list[pb.JobResult], list[pb.JobTransition]]:
    async def each() -> AsyncIterator[pb.RunJobsReq]:
        for request in requests:
            yield request

    results, moves = [], []
    async with asyncio.timeout(PATIENCE_S):
        async for reply in client._stub.run_jobs(each()):
            results += reply.results
            moves += reply.transitions
    return results, moves


# RunJobs


@pytest.fixture
def worker_keys() -> dict[str, Any]:
    return {"JOBS_SLOTS": "32"}


async def test_each_job_has_one_result(worker: Worker, client: WorkerClient) -> None:
    specs = trues(COUNT)
    specs[700]["command"] = "/no/such/program"
    specs[701] |= {"command": "/bin/sh", "args": ["-c", "exit 3"]}
    specs[702]["timeout_s"] = 10**9
    results = {}
    async for result in client.run_many(specs):
        assert result.job_id not in results
        results[result.job_id] = result
    assert set(results) == {spec["job_id"] for spec in specs}
    assert isinstance(results["job-700"].error, PreconditionFailed)
    failed = results["job-701"].job
    assert failed is not None
    assert (failed.outcome, failed.exit_code, failed.error_text) == (Outcome.FAILED, 3, "exit status 3")
    assert isinstance(results["job-702"].error, InvalidArgument)
    assert [result.job_id for result in results.values() if not result.succeeded] == [
        name for name in results if name in ("job-700", "job-701", "job-702")
    ]
    assert set(runs_of(worker).values()) == {1}


async def test_killed_midway_each_job_runs_once_and_has_one_result(worker: Worker) -> None:
    loop, results, port = asyncio.get_running_loop(), Counter[str](), ""
    async with worker.client() as client:
        port = worker.address.rpartition(":")[2]
        worker.keys["GRPC_SERVER_ADDR"] = f"127.0.0.1:{port}"
        killed: asyncio.Future[None] | None = None
        async for result in client.run_many(trues(600), in_flight=100, patience_s=PATIENCE_S):
            results[result.job_id] += 1
            assert result.succeeded, result
            if len(results) == 600 // 3:
                killed = loop.run_in_executor(None, worker.restart)
        assert killed is not None
        await killed
    assert set(results.values()) == {1}
    assert len(results) == 600
    assert runs_of(worker) == Counter({spec["job_id"]: 1 for spec in trues(600)})


async def test_the_same_specs_again_run_nothing_again(worker: Worker, client: WorkerClient) -> None:
    for _ in range(2):
        results = [result async for result in client.run_many(trues(50))]
        assert len(results) == 50
        assert all(result.succeeded for result in results)
    assert set(runs_of(worker).values()) == {1}


async def test_who_takes_no_results_is_read_from_no_further(worker: Worker, client: WorkerClient) -> None:
    taken = 0

    def specs() -> Any:
        nonlocal taken
        for spec in trues(10**4):
            taken += 1
            yield spec | {"labels": {"pad": "x" * 1000}}

    async with contextlib.aclosing(client.run_many(specs(), in_flight=100, view=JobView.FULL)) as results:
        await anext(results)
        await until(lambda: _has_ended(client, 100))
        before = programs.rss_bytes(worker.pid)
        assert taken <= 102
        for _ in range(500):
            await anext(results)
        assert taken <= 702
        assert programs.rss_bytes(worker.pid) - before < 16 * 1024 * 1024


async def _has_ended(client: WorkerClient, count: int) -> bool:
    ended = [job async for job in client.list(states=[JobState.FINISHED], page_size=1000, view=JobView.NO_SPEC)]
    return len(ended) >= count


async def test_a_client_that_reads_nothing_is_bounded_by_the_worker(worker: Worker, client: WorkerClient) -> None:
    """One that sends all it can, and takes not one result."""
    sent = 0
    async with client._channel.request(  # type: ignore[union-attr]
        "/jobscheduler.Worker/RunJobs", Cardinality.STREAM_STREAM, pb.RunJobsReq, pb.RunJobsRes
    ) as stream:
        padding = {"pad": "x" * 1000}
        with contextlib.suppress(TimeoutError):
            while sent < 20_000:
                starts = [
                    pb.StartJobReq(command="/bin/true", job_id=f"s-{sent + n}", labels=padding) for n in range(50)
                ]
                await asyncio.wait_for(stream.send_message(pb.RunJobsReq(starts=starts, in_flight=20)), 1.0)
                sent += 50
        # What is in flight, what the window holds, and one message: other calls go on by the same connection.
        assert sent < 5_000
        assert len(runs_of(worker)) <= sent
        await client.worker(deadline_s=PATIENCE_S)
        await stream.cancel()


async def test_transitions_come_before_the_result(shared_client: WorkerClient) -> None:
    starts = [pb.StartJobReq(command="/bin/true", job_id=f"moved-{number}") for number in range(20)]
    results, moves = await raw_results(shared_client, [pb.RunJobsReq(starts=starts, transitions=True)])
    assert {result.job_id: result.code for result in results} == {start.job_id: 0 for start in starts}
    for start_ in starts:
        mine = [moved.to_state for moved in moves if moved.job_id == start_.job_id]
        assert (mine[0], mine[-1]) == (JobState.STARTING, JobState.FINISHED)
    assert [moved.sequence for moved in moves] == sorted(moved.sequence for moved in moves)


async def test_what_is_wrong_with_one_does_not_keep_the_others(shared_client: WorkerClient) -> None:
    starts = [
        pb.StartJobReq(command="/bin/true"),
        pb.StartJobReq(command="/bin/true", job_id="a/b"),
        pb.StartJobReq(command="sleep", args=["0.2"], job_id="twin"),
        pb.StartJobReq(command="sleep", args=["0.2"], job_id="twin"),
        pb.StartJobReq(job_id="nothing"),
    ]
    results, _ = await raw_results(shared_client, [pb.RunJobsReq(starts=starts), pb.RunJobsReq()])
    assert sorted((result.job_id, result.code, result.message.partition(":")[0]) for result in results) == [
        ("", 3, "job_id"),
        ("a/b", 3, "job_id"),
        ("nothing", 3, "command"),
        ("twin", 0, ""),
        ("twin", 6, "job_id"),
    ]


async def test_a_worker_that_leaves_says_so_and_is_come_back_to(worker: Worker, client: WorkerClient) -> None:
    async with contextlib.aclosing(client.run_many([{"command": "sleep", "args": ["600"]}], patience_s=0.0)) as results:
        first = asyncio.ensure_future(anext(results))
        await until(lambda: _runs_one(client))
        await asyncio.get_running_loop().run_in_executor(None, worker.terminate)
        with pytest.raises(Unavailable):
            await first


async def _runs_one(client: WorkerClient) -> bool:
    return (await client.worker()).running == 1


async def test_a_spec_that_cannot_be_sent_is_its_own_result(shared_client: WorkerClient) -> None:
    specs = [{"command": "\udc80", "job_id": "odd"}, *trues(3, "fine"), {"command": "x", "timeout_s": -1.0}]
    results = [result async for result in shared_client.run_many(specs, in_flight=1)]
    assert [(result.job_id[:4], result.succeeded) for result in results] == [
        ("odd", False), ("fine", True), ("fine", True), ("fine", True), ("", False)
    ]  # fmt: skip
    assert str(results[0].error).startswith("command: is not valid Unicode")
    with pytest.raises(TypeError, match="labelz"):
        assert not [result async for result in shared_client.run_many([{"command": "true", "labelz": {}}])]


# Unary batches


async def test_batches_answer_in_order_each_as_a_call_by_itself(shared_client: WorkerClient) -> None:
    stub = shared_client._stub
    sleep = pb.StartJobReq(command=programs.SLEEP[0], args=programs.SLEEP[1:], job_id="batched")
    started = await stub.start_jobs(pb.StartJobsReq(starts=[sleep, pb.StartJobReq(), sleep]))
    assert [(one.job_id, one.code) for one in started.results] == [("batched", 0), ("", 3), ("batched", 0)]
    assert {started.results[0].existed, started.results[2].existed} == {False, True}
    queried = await stub.query_jobs(pb.QueryJobsReq(job_ids=["batched", "missing", "a/b"]))
    assert [(one.code, one.job.state) for one in queried.results] == [(0, 3), (5, 0), (3, 0)]
    assert queried.results[0].job.spec.args == programs.SLEEP[1:]
    stops = [pb.StopJobReq(job_id="batched", wait=True), pb.StopJobReq(job_id="missing")]
    stopped = await stub.stop_jobs(pb.StopJobsReq(stops=stops))
    assert [(one.job_id, one.code) for one in stopped.results] == [("batched", 0), ("missing", 5)]
    assert (await shared_client.job("batched")).outcome == Outcome.STOPPED


async def test_an_answer_that_is_full_says_so(shared_client: WorkerClient) -> None:
    job_id = await start(shared_client, ["/bin/true", "x" * 100_000, "x" * 100_000, "x" * 100_000])
    answer = await shared_client._stub.query_jobs(pb.QueryJobsReq(job_ids=[job_id] * 10))
    codes = [one.code for one in answer.results]
    assert codes == [0] * 6 + [8] * 4


# The command


def test_run_many(
    shared: Worker, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORKER_SVC_ADDR", shared.address)
    file = tmp_path / "jobs"
    file.write_text('{"command": "true"}\n\n{"command": "true", "timeout": "60s", "env": {"A": "b"}}\n')
    assert main(["run-many", str(file)]) == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err.partition(",")[0]) == ("", "2 jobs: 2 succeeded")
    file.write_text('{"command": "sh", "args": ["-c", "exit 3"], "job_id": "three"}\n{"command": "/no/such"}\n')
    assert main(["run-many", "--in-flight", "1", str(file)]) == 1
    three, missing = capsys.readouterr().out.splitlines()
    assert three == "three FAILED: exit status 3"
    assert missing.endswith(" was not run: command: /no/such: no such file or directory")
    assert main(["run-many", "--json", str(file)]) == 1
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["succeeded"], one.get("exit_code")) for one in told if one["job_id"] == "three"] == [(False, 3)]
    file.write_text('{"command": "true"}\n{"comand": "true"}\n')
    assert main(["run-many", str(file)]) == 125
    printed = capsys.readouterr()
    assert "1 jobs: 1 succeeded" in printed.err
    assert "worker-svc: run-many: line 2: " in printed.err
    assert "comand" in printed.err
    assert main(["run-many", str(tmp_path / "missing")]) == 125


def test_run_many_from_a_pipe(shared: Worker) -> None:
    """Jobs run as their lines come."""
    command = [sys.executable, "-m", "worker_svc", "run-many", "--addr", shared.address, "--json", "-"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for number in range(3):
            process.stdin.write(f'{{"command": "true", "job_id": "piped-{number}"}}\n')
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["job_id"] == f"piped-{number}"
        process.stdin.close()
        assert process.wait(PATIENCE_S) == 0


# Roles


@pytest.mark.parametrize("role", ["submitter", "viewer"])
async def test_roles(tmp_path: Any, role: str) -> None:
    with Worker(tmp_path, ACCESS_ANONYMOUS=role, ACCESS_ADMINS="uid:self") as worker:
        async with worker.client() as client:
            if role == "viewer":
                with pytest.raises(PermissionDenied, match=r"^RunJobs is not for role viewer"):
                    await anext(client.run_many(trues(1)))
                return
            (result,) = [result async for result in client.run_many(trues(1, "mine"))]
            assert result.succeeded
            line = worker.log_events("audit")[-1]
            assert (line["rpc"], line["job_id"], line["role"]) == ("StartJob", "mine-0", "submitter")
