"""The supervisor's socket: good and bad requests, and clients of all sorts."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest

from tests.support import programs
from tests.support.programs import rss_bytes, sleeps_for
from tests.support.waiting import eventually_sync
from tests.support.workers import (
    Refused,
    SocketClient,
    SupervisorProcess,
    hello_fields,
    start_fields,
    with_spec,
)
from worker_svc.ipc import frames, messages
from worker_svc.job import SPEC_MAX_BYTES
from worker_svc.supervisor.settings import DEFAULTS

# The socket


def test_the_first_request_must_be_hello(supervisor: SupervisorProcess) -> None:
    client = SocketClient(supervisor.path)
    with pytest.raises(Refused, match="invalid: op: the first request must be hello"):
        client.ask("status")
    client.hello()
    client.ask("status")
    client.close()


def test_another_protocol_is_refused(supervisor: SupervisorProcess) -> None:
    client = SocketClient(supervisor.path)
    with pytest.raises(Refused) as caught:
        client.ask("hello", **hello_fields(supervisor.path) | {"protocol": messages.PROTOCOL_VERSION + 1})
    assert caught.value.code == "version"
    assert f"speaks protocol {messages.PROTOCOL_VERSION}" in caught.value.text
    with pytest.raises(Refused, match="must be hello"):
        client.ask("start", **start_fields("j", programs.TRUE))
    client.close()


GARBAGE = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"\xff" * 64,
    b"\0\0\0\2\0\0\0\0[]",
    b"\0\0\0\1\0\0\0\0{",
    b"\0\0\0\2\xff\xff\xff\xff{}",
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=lambda garbage: garbage[:12].hex())
def test_who_talks_nonsense_is_hung_up_on(supervisor: SupervisorProcess, garbage: bytes) -> None:
    supervisor.run("j", programs.SLEEP)
    client = supervisor.connect()
    client.send_bytes(garbage)
    client.wait_hung_up()
    client.close()
    assert supervisor.client.ask("status")["running"] == 1


START: dict[str, Any] = {"op": "start", "job_id": "j", "fingerprint": ""}
STOP: dict[str, Any] = {"op": "stop", "job_id": "running", "owner": None, "signal": None, "grace_s": None}
SIGNAL: dict[str, Any] = {"op": "signal", "job_id": "running", "owner": None}
DELETE: dict[str, Any] = {"op": "delete", "owner": None, "remember": False}
HELLO: dict[str, Any] = {
    "op": "hello",
    "protocol": messages.PROTOCOL_VERSION,
    "version": "x",
    "key": "",
    "exclusive": False,
}
SETTINGS = DEFAULTS._asdict()

MALFORMED: list[dict[str, Any]] = [
    {},
    {"op": None},
    {"op": 1},
    {"op": ["start"]},
    {"op": "no such request"},
    {"op": "x" * 3_000_000},
    {"op": "done"},
    {"op": "doorbell", "sequence": 9},
    {"op": "hello"},
    {"op": "hello", "protocol": messages.PROTOCOL_VERSION},
    {**HELLO, "settings": 1},
    {**HELLO, "settings": {}},
    {**HELLO, "settings": SETTINGS | {"from_the_future": 1}},
    {**HELLO, "settings": SETTINGS | {"slots": "many"}},
    {"op": "start"},
    {"op": "start", "job_id": "j"},
    START,
    {**START, "spec": {"command": "true"}, "from_the_future": 1},
    {**START, "spec": {"command": "true"}, "is_new": 1},
    {**START, "spec": {"command": "true", "stdin_size_bytes": 5}},
    {**START, "spec": 1},
    {**START, "spec": {}},
    {**START, "spec": {"command": "x" * SPEC_MAX_BYTES}},
    {**START, "spec": {"command": "true", "from_the_future": 1}},
    {**START, "spec": {"command": "true"}, "job_id": "../j"},
    {**START, "spec": {"command": "true"}, "job_id": ""},
    {"op": "stop"},
    {"op": "stop", "job_id": "running"},
    {**STOP, "from_the_future": 1},
    {**STOP, "job_id": {}},
    {**STOP, "job_id": []},
    {**STOP, "job_id": None},
    {**STOP, "job_id": 1.5},
    {**STOP, "job_id": 2**70},
    {**STOP, "signal": 99},
    {**STOP, "signal": "TERM"},
    {**STOP, "grace_s": "soon"},
    {**STOP, "grace_s": -1},
    {**STOP, "grace_s": float("nan")},
    SIGNAL,
    {**SIGNAL, "signal": None},
    {**SIGNAL, "signal": 0.5},
    {**SIGNAL, "signal": 99},
    {**SIGNAL, "signal": -1},
    {**SIGNAL, "signal": "x"},
    {"op": "delete"},
    {**DELETE, "job_id": 2**70},
    {**DELETE, "job_id": []},
]


@pytest.mark.parametrize("header", MALFORMED, ids=str)
def test_a_malformed_request_is_answered(supervisor: SupervisorProcess, header: dict[str, Any]) -> None:
    supervisor.run("running", programs.SLEEP)
    client = supervisor.connect()
    client.send_bytes(frames.encode_frame(*with_spec({"r": 77, **header})))
    with pytest.raises(Refused):
        client.answer(77)
    client.ask("status")
    client.close()
    assert supervisor.client.ask("status")["running"] == 1


def test_a_body_of_another_size_than_its_fields_say(supervisor: SupervisorProcess) -> None:
    header, body = with_spec({"r": 77, **START, "spec": {"command": "true"}})
    for wrong in (body[:-1], body + b"!"):
        supervisor.client.send_bytes(frames.encode_frame(header, wrong))
        with pytest.raises(Refused, match="invalid: start: has a body of"):
            supervisor.client.answer(77)
    for odd in (-1, 2**70, "0", None):
        supervisor.client.send_bytes(frames.encode_frame({**header, "stdin": odd}, body))
        with pytest.raises(Refused, match="invalid: stdin: "):
            supervisor.client.answer(77)


@pytest.mark.parametrize("number", ['"\\ud800"', "[]", "{}", "null", "1e999", "9" * 400], ids=lambda text: text[:8])
def test_a_request_number_that_is_none(supervisor: SupervisorProcess, number: str) -> None:
    supervisor.run("running", programs.SLEEP)
    client = supervisor.connect()
    for op in ('"status"', '"none"', '"stop"'):
        text = f'{{"op":{op},"r":{number}}}'.encode()
        client.send_bytes(len(text).to_bytes(4, "big") + bytes(4) + text)
    client.close()
    assert supervisor.client.ask("status")["running"] == 1


def test_a_client_that_reads_no_answers(supervisor: SupervisorProcess) -> None:
    """It costs the others nothing, and the supervisor no memory beyond a few buffers."""
    deaf = SocketClient(supervisor.path, timeout_s=1.0)
    deaf.hello()
    before = rss_bytes(supervisor.pid)
    _, frame = deaf.frame("status")
    batch = frame * 10_000
    sent = 0
    with suppress(TimeoutError):
        for _ in range(100):
            deaf.send_bytes(batch)
            sent += len(batch)
    assert sent < 50_000_000
    assert rss_bytes(supervisor.pid) - before < 16 << 20
    for number in range(20):
        supervisor.finish(f"j{number}", programs.TRUE)
    assert rss_bytes(supervisor.pid) - before < 16 << 20
    eventually_sync(lambda: sleeps_for(supervisor.pid, 0.2), message="it spins over what it cannot send")
    deaf.close()
    eventually_sync(lambda: supervisor.client.ask("status"))


def test_a_frame_that_comes_byte_by_byte(supervisor: SupervisorProcess) -> None:
    number, frame = supervisor.client.frame("start", b"in", **start_fields("j", programs.CAT_STDIN, stdin=b"in"))
    for at in range(len(frame)):
        supervisor.client.send_bytes(frame[at : at + 1])
    supervisor.client.answer(number)
    supervisor.wait_finished("j")
    assert supervisor.output("j") == b"in"


def test_many_requests_in_one_write(supervisor: SupervisorProcess) -> None:
    numbers, batch = [], b""
    for n in range(50):
        number, frame = supervisor.client.frame("start", **start_fields(f"j{n}", programs.exits(n)))
        numbers.append(number)
        batch += frame
    supervisor.client.send_bytes(batch)
    for number in numbers:
        assert supervisor.client.answer(number)["existed"] is False
    for n in range(50):
        assert supervisor.wait_finished(f"j{n}").exit_code == n
