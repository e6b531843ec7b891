"""A client of another make (grpcio), with stubs from the original messages alone, as schedulers have; and bad input."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest

from tests.support import programs
from tests.support.stubs import OUR_PROTO, Messages, generate, raw_call
from tests.support.waiting import eventually_sync
from tests.support.workers import PATIENCE_S, Worker
from worker_svc.pb import jobscheduler as pb

# The contract as it was, to the byte.
ORIGINAL = """
syntax = "proto3";
package jobscheduler;

service Worker {
  rpc StartJob(StartJobReq) returns (StartJobRes) {}
  rpc StopJob(StopJobReq) returns (StopJobRes) {}
  rpc QueryJob(QueryJobReq) returns (QueryJobRes) {}
}
service Scheduler {
  rpc RegisterWorker(RegisterReq) returns (RegisterRes) {}
  rpc DeregisterWorker(DeregisterReq) returns (DeregisterRes) {}
}
message StartJobReq { string command = 1; string path = 2; }
message StartJobRes { string jobID = 1; }
message StopJobReq { string jobID = 1; }
message StopJobRes {}
message QueryJobReq { string jobID = 1; }
message QueryJobRes { bool done = 1; bool error = 2; string errorText = 3; }
message RegisterReq { string address = 1; }
message RegisterRes { bool success = 1; string workerID = 2; }
message DeregisterReq { string workerID = 1; }
message DeregisterRes { bool success = 1; }
"""


class Original(NamedTuple):
    messages: Any
    stubs: Any


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Original:
    folder = tmp_path_factory.mktemp("original")
    proto = folder / "original_jobscheduler.proto"
    proto.write_text(ORIGINAL)
    return Original(*generate(proto, folder))


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Messages:
    return Messages(OUR_PROTO, tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def channel(shared: Worker) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(shared.address) as opened:
        yield opened


@pytest.fixture
def stub(original: Original, channel: grpc.Channel) -> Any:
    return original.stubs.WorkerStub(channel)


def wait_done(stub: Any, original: Original, job_id: str) -> Any:
    def done() -> Any:
        answer = stub.QueryJob(original.messages.QueryJobReq(jobID=job_id), timeout=PATIENCE_S)
        return answer if answer.done else None

    return eventually_sync(done, PATIENCE_S, f"{job_id} is not done")


@pytest.mark.parametrize(
    "command, text, error, error_text",
    [
        ("bash", "exit 0", False, ""),
        ("bash", "exit 3", True, "exit status 3"),
        ("sh", "exit 255", True, "exit status 255"),
        ("bash", "kill -9 $$", True, "signal: killed"),
        ("bash", "kill -TERM $$", True, "signal: terminated"),
        ("bash", "kill -HUP $$", True, "signal: hangup"),
    ],
)
def test_start_and_query(
    stub: Any, original: Original, tmp_path: Path, command: str, text: str, error: bool, error_text: str
) -> None:
    script = tmp_path / "script"
    script.write_text(text)
    started = stub.StartJob(original.messages.StartJobReq(command=command, path=str(script)), timeout=PATIENCE_S)
    assert len(started.jobID) == 36  # a UUID
    answer = wait_done(stub, original, started.jobID)
    assert (answer.done, answer.error, answer.errorText) == (True, error, error_text)


def test_stop(stub: Any, original: Original, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("exec sleep 999")
    job_id = stub.StartJob(original.messages.StartJobReq(command="sh", path=str(script))).jobID
    answer = stub.QueryJob(original.messages.QueryJobReq(jobID=job_id))
    assert (answer.done, answer.error, answer.errorText) == (False, False, "")
    assert stub.StopJob(original.messages.StopJobReq(jobID=job_id)) == original.messages.StopJobRes()
    answer = wait_done(stub, original, job_id)
    assert (answer.done, answer.error, answer.errorText) == (True, True, "signal: terminated")
    stub.StopJob(original.messages.StopJobReq(jobID=job_id))  # fine


@pytest.mark.parametrize("method", ["StopJob", "QueryJob"])
def test_an_unknown_job(stub: Any, original: Original, method: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        getattr(stub, method)(getattr(original.messages, f"{method}Req")(jobID="unknown"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert caught.value.details() == "job not found"


ID = "7f9c24e8-3b12-4f1a-9d2e-0c5b6a7d8e9f"
EXAMPLES: list[tuple[str, dict[str, Any], Any]] = [
    ("StartJobReq", {"command": "bash", "path": "é.sh"}, pb.StartJobReq(command="bash", path="é.sh")),
    ("StartJobReq", {}, pb.StartJobReq()),
    ("StartJobRes", {"jobID": ID}, pb.StartJobRes(job_id=ID)),
    ("StopJobReq", {"jobID": ID}, pb.StopJobReq(job_id=ID)),
    ("StopJobRes", {}, pb.StopJobRes()),
    ("QueryJobReq", {"jobID": ID}, pb.QueryJobReq(job_id=ID)),
    ("QueryJobRes", {"done": True}, pb.QueryJobRes(done=True)),
    (
        "QueryJobRes",
        {"done": True, "error": True, "errorText": "exit status 3"},
        pb.QueryJobRes(done=True, error=True, error_text="exit status 3"),
    ),
    ("RegisterReq", {"address": "127.0.0.1:50000"}, pb.RegisterReq(address="127.0.0.1:50000")),
    ("RegisterRes", {"success": True, "workerID": ID}, pb.RegisterRes(success=True, worker_id=ID)),
    ("DeregisterReq", {"workerID": ID}, pb.DeregisterReq(worker_id=ID)),
    ("DeregisterRes", {"success": True}, pb.DeregisterRes(success=True)),
]


@pytest.mark.parametrize("name, fields, message", EXAMPLES, ids=lambda value: str(value)[:30])
def test_byte_for_byte(original: Original, name: str, fields: dict[str, Any], message: Any) -> None:
    assert getattr(original.messages, name)(**fields).SerializeToString() == bytes(message)


def test_every_original_message_has_an_example(original: Original) -> None:
    assert {name for name, _, _ in EXAMPLES} == set(original.messages.DESCRIPTOR.message_types_by_name)
    for name, described in original.messages.DESCRIPTOR.message_types_by_name.items():
        fields = {field for example, given, _ in EXAMPLES if example == name for field in given}
        assert fields == set(described.fields_by_name)


def test_ours_are_above_nine(ours: Messages, original: Original) -> None:
    """In messages that both know, and with the original ones as they were."""
    for name, described in original.messages.DESCRIPTOR.message_types_by_name.items():
        for field in getattr(ours, name).DESCRIPTOR.fields:
            theirs = described.fields_by_name.get(field.name)
            if theirs is None:
                assert field.number >= 10, f"{name}.{field.name}"
            else:
                assert (field.number, field.type) == (theirs.number, theirs.type)


def test_the_answers_on_the_wire(channel: grpc.Channel, original: Original, tmp_path: Path) -> None:
    """What is ours comes after what was there, and those who do not know it lose nothing."""
    script = tmp_path / "script"
    script.write_text("exit 3")
    request = original.messages.StartJobReq(command="sh", path=str(script)).SerializeToString()
    received = raw_call(channel, "StartJob")(request)
    job_id = original.messages.StartJobRes.FromString(received).jobID
    plain = original.messages.StartJobRes(jobID=job_id).SerializeToString()
    assert received.startswith(plain)
    assert len(received) > len(plain)

    query = original.messages.QueryJobReq(jobID=job_id).SerializeToString()

    def done() -> bytes:
        answer = raw_call(channel, "QueryJob")(query)
        return answer if original.messages.QueryJobRes.FromString(answer).done else b""

    received = eventually_sync(done, PATIENCE_S)
    plain = original.messages.QueryJobRes(done=True, error=True, errorText="exit status 3").SerializeToString()
    assert plain == b"\x08\x01\x10\x01\x1a\x0dexit status 3"
    assert received.startswith(plain)
    assert raw_call(channel, "StopJob")(query) == b""


def test_everything_as_another_implementation_reads_it(
    channel: grpc.Channel, ours: Messages, tmp_path: Path, shared: Worker
) -> None:
    started = ours.call(channel, "StartJob")(
        ours.StartJobReq(
            command="sh",
            args=["-c", "cat; echo $KEY; echo oops >&2; exit 0"],
            env={"KEY": "secret"},
            cwd=str(tmp_path),
            stdin=b"in\0put\n",
            timeout={"seconds": 60, "nanos": 500_000_000},
            stop_signal="INT",
            stop_grace={},
            labels={"team": "red"},
            separate_stderr=True,
            job_id="everything",
        )
    )
    assert (started.jobID, started.state, started.existed) == ("everything", 3, False)
    job = ours.call(channel, "WaitJob")(ours.WaitJobReq(jobID="everything", timeout={"seconds": 30})).job
    assert (job.state, job.outcome, job.error_text, job.signal) == (5, 1, "", "")
    assert job.HasField("exit_code")
    assert job.exit_code == 0
    assert job.HasField("cpu_time")
    assert (job.output_size_bytes, job.stderr_size_bytes) == (14, 5)
    assert Path(job.output_file).read_bytes() == b"in\0put\nsecret\n"
    assert Path(job.stderr_file).read_bytes() == b"oops\n"
    spec = job.spec
    assert (spec.command, next(iter(spec.args)), dict(spec.env), spec.cwd) == (
        "sh",
        "-c",
        {"KEY": "secret"},
        str(tmp_path),
    )
    assert (spec.stdin_size_bytes, spec.stop_signal, dict(spec.labels)) == (7, "SIGINT", {"team": "red"})
    assert (spec.timeout.seconds, spec.timeout.nanos) == (60, 500_000_000)
    assert spec.HasField("stop_grace")
    assert (spec.stop_grace.seconds, spec.stop_grace.nanos) == (0, 0)
    now = time.time()
    assert now - 60 < job.accepted_at.ToMicroseconds() / 1e6 <= job.started_at.ToMicroseconds() / 1e6 <= now
    assert job.finished_at.ToMicroseconds() - job.started_at.ToMicroseconds() <= job.wall_time.ToMicroseconds() + 5000
    again = ours.call(channel, "QueryJob")(ours.QueryJobReq(jobID="everything"))
    assert again.job == job
    assert (again.done, again.error, again.errorText) == (True, False, "")
    # The log is written behind: an answer waits for no line of it.
    eventually_sync(
        lambda: [event["job_id"] for event in shared.log_events("job.transition")].count("everything") == 3,
        message="its three transitions are not in the log",
    )


NUL_ARGUMENT = ["fine", "a\0b"]
BAD: list[tuple[str, dict[str, Any], grpc.StatusCode, str]] = [
    ("StartJob", {}, grpc.StatusCode.INVALID_ARGUMENT, "command: must not be empty"),
    ("StartJob", {"command": "a\0"}, grpc.StatusCode.INVALID_ARGUMENT, "command: "),
    ("StartJob", {"command": "true", "path": "\0"}, grpc.StatusCode.INVALID_ARGUMENT, "path: "),
    ("StartJob", {"command": "true", "args": NUL_ARGUMENT}, grpc.StatusCode.INVALID_ARGUMENT, "args[1]: "),
    ("StartJob", {"command": "true", "args": [""] * 4097}, grpc.StatusCode.INVALID_ARGUMENT, "args: "),
    ("StartJob", {"command": "true", "env": {"A=B": ""}}, grpc.StatusCode.INVALID_ARGUMENT, "env: key 'A…'"),
    ("StartJob", {"command": "true", "env": {"": "x"}}, grpc.StatusCode.INVALID_ARGUMENT, "env: "),
    ("StartJob", {"command": "true", "env": {"A": "\0"}}, grpc.StatusCode.INVALID_ARGUMENT, "env: "),
    ("StartJob", {"command": "true", "timeout": {"seconds": -1}}, grpc.StatusCode.INVALID_ARGUMENT, "timeout: "),
    ("StartJob", {"command": "true", "timeout": {"nanos": -1000}}, grpc.StatusCode.INVALID_ARGUMENT, "timeout: "),
    ("StartJob", {"command": "true", "timeout": {"seconds": 10**10}}, grpc.StatusCode.INVALID_ARGUMENT, "timeout: "),
    ("StartJob", {"command": "true", "stop_grace": {"seconds": -5}}, grpc.StatusCode.INVALID_ARGUMENT, "stop_grace: "),
    ("StartJob", {"command": "true", "stop_signal": "NO"}, grpc.StatusCode.INVALID_ARGUMENT, "stop_signal: "),
    ("StartJob", {"command": "true", "cwd": "here"}, grpc.StatusCode.INVALID_ARGUMENT, "cwd: must be an absolute"),
    ("StartJob", {"command": "cat", "stdin": bytes(2**20 + 1)}, grpc.StatusCode.INVALID_ARGUMENT, "stdin: "),
    ("StartJob", {"command": "true", "job_id": "../x"}, grpc.StatusCode.INVALID_ARGUMENT, "job_id: "),
    ("StartJob", {"command": "true", "job_id": "x" * 129}, grpc.StatusCode.INVALID_ARGUMENT, "job_id: "),
    ("StartJob", {"command": "true", "labels": {"": ""}}, grpc.StatusCode.INVALID_ARGUMENT, "labels: "),
    ("StartJob", {"command": "true", "cwd": "/missing"}, grpc.StatusCode.FAILED_PRECONDITION, "cwd: /missing: "),
    ("StartJob", {"command": "no-such-command"}, grpc.StatusCode.FAILED_PRECONDITION, "command: 'no-such-command' was"),
    ("StartJob", {"command": "/etc/passwd"}, grpc.StatusCode.FAILED_PRECONDITION, "command: /etc/passwd is not exec"),
    ("StartJob", {"command": "/tmp"}, grpc.StatusCode.FAILED_PRECONDITION, "command: /tmp is a directory"),
    ("StopJob", {"jobID": ""}, grpc.StatusCode.INVALID_ARGUMENT, "jobID: must not be empty"),
    ("StopJob", {"jobID": "a/b"}, grpc.StatusCode.INVALID_ARGUMENT, "jobID: "),
    ("StopJob", {"jobID": "unknown"}, grpc.StatusCode.NOT_FOUND, "job not found"),
    ("StopJob", {"jobID": "unknown", "wait": True}, grpc.StatusCode.NOT_FOUND, "job not found"),
    ("StopJob", {"jobID": "x", "signal": "NO"}, grpc.StatusCode.INVALID_ARGUMENT, "signal: "),
    ("StopJob", {"jobID": "x", "grace": {"seconds": -1}}, grpc.StatusCode.INVALID_ARGUMENT, "grace: "),
    ("QueryJob", {"jobID": ".."}, grpc.StatusCode.INVALID_ARGUMENT, "jobID: "),
    ("QueryJob", {"jobID": "unknown"}, grpc.StatusCode.NOT_FOUND, "job not found"),
    ("WaitJob", {"jobID": "\n"}, grpc.StatusCode.INVALID_ARGUMENT, "jobID: "),
    ("WaitJob", {"jobID": "unknown"}, grpc.StatusCode.NOT_FOUND, "job not found"),
    ("WaitJob", {"jobID": "x", "timeout": {"seconds": -1}}, grpc.StatusCode.INVALID_ARGUMENT, "timeout: "),
    ("SignalJob", {"jobID": "unknown", "signal": "TERM"}, grpc.StatusCode.NOT_FOUND, "job not found"),
    ("SignalJob", {"jobID": "x"}, grpc.StatusCode.INVALID_ARGUMENT, "signal: must not be empty"),
    ("SignalJob", {"jobID": "x", "signal": "0"}, grpc.StatusCode.INVALID_ARGUMENT, "signal: "),
    ("DeleteJob", {"jobID": "unknown"}, grpc.StatusCode.NOT_FOUND, "job not found"),
    ("DeleteJob", {"jobID": "é"}, grpc.StatusCode.INVALID_ARGUMENT, "jobID: "),
    ("ListJobs", {"states": [0]}, grpc.StatusCode.INVALID_ARGUMENT, "states: "),
    ("ListJobs", {"states": [99]}, grpc.StatusCode.INVALID_ARGUMENT, "states: "),
    ("ListJobs", {"page_size": -1}, grpc.StatusCode.INVALID_ARGUMENT, "page_size: "),
    ("ListJobs", {"page_token": "x"}, grpc.StatusCode.INVALID_ARGUMENT, "page_token: "),
]


@pytest.mark.parametrize("method, fields, code, text", BAD, ids=lambda value: str(value)[:40])
def test_bad_input(
    channel: grpc.Channel, ours: Messages, method: str, fields: dict[str, Any], code: grpc.StatusCode, text: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        ours.call(channel, method)(getattr(ours, f"{method}Req")(**fields), timeout=PATIENCE_S)
    assert (caught.value.code(), (caught.value.details() or "")[: len(text)]) == (code, text)


def test_a_script_with_a_missing_interpreter(channel: grpc.Channel, ours: Messages, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    with pytest.raises(grpc.RpcError) as caught:
        ours.call(channel, "StartJob")(ours.StartJobReq(command=str(script)))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "interpreter '/no/such/interpreter'" in (caught.value.details() or "")


# Well-formed to gRPC, and no message or one whose times are beyond all calendars.
STRANGE = [
    ("StartJob", b"\xff\xff\xff"),
    ("StartJob", b"\x0a\xff"),
    ("StartJob", b"\x0a\x02\xff\xfe"),  # command: not UTF-8
    ("StartJob", b"\x0a\x04true\x72\x0b\x08\xff\xff\xff\xff\xff\xff\xff\xff\x7f\x10\x00"),  # timeout: 2**63 - 1 s
    ("ListJobs", b"\x62\x0a\x08\xff\xff\xff\xff\xff\xff\xff\xff\x7f"),  # accepted_since: as late
]


@pytest.mark.parametrize("method, data", STRANGE, ids=lambda value: str(value)[:30])
def test_what_is_no_message(channel: grpc.Channel, ours: Messages, method: str, data: bytes) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        raw_call(channel, method)(data, timeout=PATIENCE_S)
    assert caught.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL)
    assert ours.call(channel, "GetWorker")(ours.GetWorkerReq()).worker_id


def test_a_method_that_is_not_there(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        raw_call(channel, "NoSuchMethod")(b"", timeout=PATIENCE_S)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_cancelled_calls_leave_nothing_behind(channel: grpc.Channel, ours: Messages, shared: Worker) -> None:
    ours.call(channel, "StartJob")(ours.StartJobReq(command="sleep", args=["999"], job_id="slow"))
    before = programs.open_fds(shared.pid)
    watch = channel.unary_stream(
        "/jobscheduler.Worker/WatchJobs",
        request_serializer=ours.WatchJobsReq.SerializeToString,
        response_deserializer=ours.JobTransition.FromString,
    )
    follow = channel.unary_stream(
        "/jobscheduler.Worker/StreamJob",
        request_serializer=ours.StreamJobReq.SerializeToString,
        response_deserializer=ours.OutputChunk.FromString,
    )
    for _ in range(20):
        with pytest.raises(grpc.RpcError) as caught:
            ours.call(channel, "WaitJob")(ours.WaitJobReq(jobID="slow"), timeout=0.02)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        for stream in (watch(ours.WatchJobsReq(from_sequence=1)), follow(ours.StreamJobReq(jobID="slow", follow=True))):
            stream.cancel()
    assert programs.is_alive(shared.pid)
    ours.call(channel, "StopJob")(ours.StopJobReq(jobID="slow", wait=True), timeout=PATIENCE_S)
    job = ours.call(channel, "QueryJob")(ours.QueryJobReq(jobID="slow")).job
    assert job.signal == signal.SIGTERM.name
    eventually_sync(lambda: len(programs.open_fds(shared.pid)) <= len(before) + 2, PATIENCE_S, "fds are left open")
