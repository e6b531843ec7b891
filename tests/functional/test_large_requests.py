"""Large requests and large answers: what is accepted fits all that comes later, and nothing holds up others."""

from __future__ import annotations

import asyncio
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from grpclib.exceptions import GRPCError

from tests.support.workers import PATIENCE_S, Worker
from worker_svc import InvalidArgument, Unavailable, WorkerClient
from worker_svc.ipc import frames, messages
from worker_svc.ipc.messages import Done, SendSignal, Start, Started, Stop
from worker_svc.job import SPEC_MAX_BYTES
from worker_svc.link import SupervisorLink
from worker_svc.pb import jobscheduler as pb
from worker_svc.supervisor.connections import listen
from worker_svc.supervisor.settings import DEFAULTS

# What gRPC clients take by default.
ANSWER_MAX_BYTES = 4 * 1024 * 1024
PAGE_MAX_BYTES = 2 * 1024 * 1024
# JSON spells it with six bytes.
WORST = "\x01"
LARGE = ["x" * 100_000] * 14


@pytest.mark.parametrize(
    "large, field",
    [
        ({"args": [WORST * 131_000] * 14}, "args"),
        ({"env": {f"K{number}": WORST * 131_000 for number in range(14)}}, "env"),
        ({"sandbox": pb.Sandbox(read_only_paths=["/" + WORST * 4000] * 200)}, "sandbox"),
        ({"args": ["\N{GRINNING FACE}" * 30_000] * 10}, "args"),
        ({"args": ["\N{EURO SIGN}" * 40_000] * 14}, "args"),
    ],
    ids=["args", "env", "sandbox", "beyond the BMP", "euros"],
)
async def test_what_is_too_large_is_named(
    shared: Worker, shared_client: WorkerClient, large: dict[str, Any], field: str
) -> None:
    for job_id in ("", "large"):
        with pytest.raises(InvalidArgument, match=rf"^{field}: too large: .* at most {SPEC_MAX_BYTES} bytes"):
            await shared_client.start("true", job_id=job_id, **large)
    assert shared.log_events("supervisor.lost") == []


@pytest.mark.parametrize("text", [WORST * 87_000, "\N{GRINNING FACE}" * 32_000], ids=["control characters", "emoji"])
async def test_the_largest_that_is_accepted_comes_back(shared: Worker, shared_client: WorkerClient, text: str) -> None:
    """As stored it takes nearly all it may; each answer about it is within what a default client takes."""
    args = [text] * (SPEC_MAX_BYTES // 6 // len(text.encode("utf-16-le")) * 2)
    started = await shared_client.start("true", args=args, separate_stderr=True)
    job = await shared_client.wait(started.job_id, PATIENCE_S)
    assert (list(job.spec.args), job.left_out) == (args, [])
    assert len(bytes(job)) < ANSWER_MAX_BYTES
    listed = [one async for one in shared_client.list(view=pb.JobView.FULL) if one.job_id == started.job_id]
    assert [list(one.spec.args) for one in listed] == [args]
    assert shared.log_events("supervisor.lost") == []


async def test_pages_end_early_and_all_of_them_have_all_jobs(shared: Worker, shared_client: WorkerClient) -> None:
    mark = {"test": "pages"}
    ids = [(await shared_client.start("true", args=LARGE, env={"K": "v"}, labels=mark)).job_id for _ in range(6)]
    async with shared.client() as raw:
        for view, args, left_out in (
            (pb.JobView.UNSPECIFIED, [], ["spec.args", "spec.env"]),
            (pb.JobView.FULL, LARGE, []),
            (pb.JobView.NO_SPEC, [], ["spec"]),
        ):
            found: list[pb.Job] = []
            request = pb.ListJobsReq(labels=mark, page_size=1000, view=pb.JobView(view))
            while True:
                page = await raw._stub.list_jobs(request)
                assert len(bytes(page)) <= PAGE_MAX_BYTES
                found += page.jobs
                if not page.next_page_token:
                    break
                request.page_token = page.next_page_token
            assert [job.job_id for job in found] == ids[::-1]
            assert all((list(job.spec.args), job.left_out) == (args, left_out) for job in found)
    briefs = [job async for job in shared_client.list(labels=mark)]
    assert {(job.spec.command, tuple(job.spec.labels.items())) for job in briefs} == {("true", (("test", "pages"),))}
    assert (await shared_client.job(ids[0])).spec.args == LARGE


async def test_a_view_that_there_is_not(shared_client: WorkerClient) -> None:
    with pytest.raises(InvalidArgument, match=r"^view: "):
        _ = [job async for job in shared_client.list(view=9)]
    with pytest.raises(GRPCError, match="view: there is no view 9"):
        await shared_client._stub.list_jobs(pb.ListJobsReq(view=pb.JobView.try_value(9)))


class Severing:
    """In the place of a supervisor: greets, and hangs up at anything else."""

    def __init__(self, state: Path) -> None:
        self._listener = listen(str(state))
        self._listener.setblocking(True)
        self.asked: list[type[messages.Message]] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connected, _ = self._listener.accept()
            except OSError:
                return
            with connected:
                self._greet(connected)

    def _greet(self, connected: socket.socket) -> None:
        decoder = frames.Decoder()
        while received := connected.recv(65536):
            for frame in decoder.feed(received):
                number, request = messages.number_of(frame), messages.decode(frame)
                if not isinstance(request, messages.Hello):
                    self.asked.append(type(request))
                    return
                welcome = messages.Welcome(request.protocol, 1, 0, "x", "", 0, is_shutting_down=False)
                connected.sendall(messages.encode(number, welcome))

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


async def test_a_request_that_breaks_the_link_is_not_repeated_for_ever(tmp_path: Path) -> None:
    supervisor = Severing(tmp_path)
    link = SupervisorLink(tmp_path, DEFAULTS, "test", on_sequence=lambda n: None, on_event=lambda *a, **k: None)
    await link.connect()
    running = asyncio.create_task(link.run())
    with pytest.raises(Unavailable, match="may or may not have been carried out"):
        await link.ask(Start("j", "", is_new=True), Started)
    assert supervisor.asked == [Start] * 3
    with pytest.raises(Unavailable, match="may or may not have been carried out"):
        await link.ask(SendSignal("j"), Done)
    assert supervisor.asked == [Start] * 3 + [SendSignal]
    with pytest.raises(InvalidArgument, match="too large"):  # it never leaves
        await link.ask(Stop("x" * frames.HEADER_MAX_BYTES), Done)
    assert len(supervisor.asked) == 4
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    link.close()
    supervisor.close()
