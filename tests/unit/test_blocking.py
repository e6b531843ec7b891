"""The client without an event loop: the same answers and errors as WorkerClient's, over real connections."""

from __future__ import annotations

import dataclasses
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from tests.support.fake_worker import FakeWorker, finished, serving_in_thread
from tests.support.fuzzing import MESSAGES, example
from worker_svc import (
    DeadlineExceeded,
    InvalidArgument,
    Job,
    JobNotFound,
    JobSpec,
    Outcome,
    Unavailable,
    Unreachable,
)
from worker_svc.address import Address
from worker_svc.client.blocking import BlockingWorker
from worker_svc.wire.codec import decode, encode
from worker_svc.wire.plain import plain
from worker_svc.wire.pool import message_class


@contextmanager
def asking(worker: FakeWorker) -> Iterator[BlockingWorker]:
    with serving_in_thread(worker) as address, BlockingWorker(Address.parse(address)) as asked:
        yield asked


@contextmanager
def answered_with(answer: bytes) -> Iterator[BlockingWorker]:
    """Somebody who accepts one connection, reads what comes first, says `answer` and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 20)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with BlockingWorker(Address("127.0.0.1", listener.getsockname()[1])) as asked:
            yield asked
        thread.join(10)


def assert_same(one: Any, message: Any, kind: type[Any]) -> None:
    for field in dataclasses.fields(kind):
        value, expected = getattr(one, field.name), getattr(message, field.name)
        for got, wanted in zip(value, expected, strict=True) if isinstance(expected, list) else [(value, expected)]:
            if dataclasses.is_dataclass(wanted):
                assert_same(got, wanted, type(wanted))
            else:
                assert got == wanted, field.name
                assert getattr(got, "name", None) == getattr(wanted, "name", None), field.name


@pytest.mark.parametrize("kind", [kind for kind in MESSAGES if kind.__name__.endswith("Res")])
@pytest.mark.parametrize("is_empty", [False, True])
def test_answers_are_what_the_dataclasses_say(kind: type[Any], *, is_empty: bool) -> None:
    data = encode(kind() if is_empty else example(kind))
    assert_same(plain(message_class(kind.__name__).FromString(data)), decode(data, kind), kind)


def test_a_call_and_another_over_the_same_connection() -> None:
    worker = FakeWorker()
    worker.jobs["a"] = finished("a", Outcome.FAILED)
    with asking(worker) as asked:
        job = asked.ask("QueryJob", jobID="a", deadline_s=10).job
        assert (job.job_id, job.outcome.name, int(job.outcome)) == ("a", "FAILED", Outcome.FAILED)
        with pytest.raises(JobNotFound, match="job not found"):
            asked.ask("QueryJob", jobID="b")
        assert asked.ask("QueryJob", jobID="a").done


def test_answers_beyond_the_windows_of_http2() -> None:
    worker = FakeWorker()
    worker.jobs["a"] = Job(job_id="a", spec=JobSpec(command="x", args=["y" * 1000] * 3000))
    with asking(worker) as asked:
        assert len(asked.ask("QueryJob", jobID="a").job.spec.args) == 3000


def test_what_a_field_cannot_carry() -> None:
    with BlockingWorker(Address("127.0.0.1", 1)) as asked:
        with pytest.raises(InvalidArgument, match=r"^jobID: is not valid Unicode$"):
            asked.ask("QueryJob", jobID="\udcff")
        with pytest.raises(InvalidArgument, match=r"^page_size: "):
            asked.ask("ListJobs", page_size=2**40)


def test_a_worker_that_does_not_answer_in_time() -> None:
    worker = FakeWorker()
    worker.hangs = True
    with asking(worker) as asked, pytest.raises(DeadlineExceeded):
        asked.ask("QueryJob", jobID="a", deadline_s=0.2)
    with BlockingWorker(Address("127.0.0.1", 1)) as asked, pytest.raises(DeadlineExceeded):
        asked.ask("QueryJob", jobID="a", deadline_s=0)


def test_nobody_there() -> None:
    refused = pytest.raises(Unreachable, match=r"no connection to a worker at 127\.0\.0\.1:1: Connection refused")
    with BlockingWorker(Address("127.0.0.1", 1)) as asked, refused:
        asked.ask("QueryJob", jobID="a")


@pytest.mark.parametrize(
    "answer, why",
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "it does not speak HTTP/2"),
        (b"", "it may want TLS"),
        (b"\x15\x03\x03", "it may"),
    ],
)
def test_somebody_else(answer: bytes, why: str) -> None:
    with answered_with(answer) as asked, pytest.raises(Unavailable, match=f"was lost: {why}"):
        asked.ask("QueryJob", jobID="a")


def test_a_status_outside_the_table() -> None:
    worker = FakeWorker()
    worker.refusal = GRPCError(Status.INTERNAL, "100 % déjà vu")
    with asking(worker) as asked, pytest.raises(GRPCError) as caught:
        asked.ask("QueryJob", jobID="a")
    assert (caught.value.status, caught.value.message) == (Status.INTERNAL, "100 % déjà vu")


def test_times_are_timedeltas() -> None:
    made = message_class("Job").FromString(encode(Job(job_id="a", wall_time=timedelta(seconds=1.5))))
    assert plain(made).wall_time == timedelta(seconds=1.5)
    assert plain(made).cpu_time is None
