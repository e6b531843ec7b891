"""A real supervisor is fed garbage on its socket: it must survive, and serve others meanwhile."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from typing import Any

import pytest

from tests.support.fuzzing import FRAMES, Mutator
from tests.support.programs import TRUE
from tests.support.waiting import eventually_sync
from tests.support.workers import Refused, SocketClient, SupervisorProcess, hello_fields, start_fields, with_spec
from worker_svc.record import paths

VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3.5, 1e308, float("inf"), float("nan"), 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, "", "a",
    "x" * 5000, "\0", "\ud800", "../../etc", "🙂", [], [1], [[[]]], {}, {"a": 1}, {"command": "true"}, ["true"],
    {"": None},
)  # fmt: skip
OPS = ("hello", "start", "stop", "signal", "delete", "status", "pause", "resume", "shutdown?", "", "__init__")
NAMES = (
    "job_id", "owner", "fingerprint", "spec", "is_new", "signal", "grace_s", "settings", "protocol", "stop_jobs", "op",
)  # fmt: skip
OF_JOB = {"job_id": "job-1", "owner": None}
WHOLE: dict[str, dict[str, Any]] = {
    "stop": {**OF_JOB, "signal": None, "grace_s": 0.1},
    "signal": {**OF_JOB, "signal": 15},
    "delete": {**OF_JOB, "remember": True},
    "pause": OF_JOB,
    "resume": OF_JOB,
}
SPEC_NAMES = (
    "command", "path", "args", "env", "cwd", "timeout_s", "stop_signal", "stop_grace_s", "labels", "separate_stderr",
    "output_max_bytes", "output_policy", "stdin_size_bytes", "limits",
)  # fmt: skip


def lives(supervisor: SupervisorProcess) -> bool:
    assert supervisor.process is not None
    assert supervisor.process.poll() is None, supervisor.log()
    return bool(supervisor.client.ask("status")["pid"] == supervisor.pid)


def test_bytes_that_are_no_frames(supervisor: SupervisorProcess) -> None:
    mutator = Mutator(3)
    for number in range(300):
        garbage = mutator.random.randbytes(mutator.random.randrange(1, 200))
        if number % 2:
            garbage = mutator.mutate(b"".join(mutator.random.choices(FRAMES, k=3)), FRAMES[1])
        client = SocketClient(supervisor.path, timeout_s=0.02)
        with contextlib.suppress(OSError):
            if number % 3:
                client.hello()
            client.send_bytes(garbage)
            client.receive()
        client.close()
    assert lives(supervisor)


def test_a_frame_that_announces_too_much(supervisor: SupervisorProcess) -> None:
    for sizes in ((2**32 - 1, 0), (0, 2**32 - 1), (2**31, 2**31)):
        client = SocketClient(supervisor.path)
        client.send_bytes(struct.pack("!II", *sizes))
        client.wait_hung_up()
        client.close()
    assert lives(supervisor)


def test_a_header_nested_deeply(supervisor: SupervisorProcess) -> None:
    client = SocketClient(supervisor.path)
    text = b"[" * 500_000
    client.send_bytes(struct.pack("!II", len(text), 0) + text)
    client.wait_hung_up()
    client.close()
    assert lives(supervisor)


@pytest.mark.long
@pytest.mark.timeout(180)
def test_requests_with_anything_for_a_value(supervisor: SupervisorProcess) -> None:
    """Well-formed frames, whose fields are of the wrong type, too large or missing."""
    mutator = Mutator(4)
    chance = mutator.random
    client = supervisor.connect()
    for number in range(4000):
        header: dict[str, Any] = {"r": number + 1, "op": chance.choice(OPS)}
        if chance.random() < 0.8:  # as it should be, but for what is changed next
            header |= WHOLE.get(header["op"], {})
        for name in chance.choices(list(header) if chance.random() < 0.8 else NAMES, k=chance.randrange(4)):
            header[name] = chance.choice(VALUES)
        if header.get("op") == "start" and chance.random() < 0.8:
            header |= {"job_id": f"job-{number}", "fingerprint": "", "spec": spec(chance)}
        if header.get("op") == "hello" and not isinstance(header.get("protocol"), int):
            odd = {name: chance.choice(VALUES) for name in ("slots", "base_env", "keep_age_s")}
            header = {"r": number + 1, "op": "hello", **hello_fields(supervisor.path)}
            header["settings"] = {**header["settings"]._asdict(), **odd}
        try:
            client.send_bytes(encode(*with_spec(header, chance.choice((b"", b"stdin")))))
            if number % 20 == 19:
                client.ask("status")
        except (OSError, Refused):  # hung up on us, which is its right
            client.close()
            client = supervisor.connect()
        assert supervisor.process is not None
        assert supervisor.process.poll() is None, (header, supervisor.log())
    client.close()
    # Whatever was started is run or refused; the next job is too.
    good = supervisor.connect()
    good.ask("start", **start_fields("the-last", TRUE))
    supervisor.wait_finished("the-last")
    good.close()
    assert lives(supervisor)


def spec(chance: Any) -> Any:
    if chance.random() < 0.1:
        return chance.choice(VALUES)
    made: dict[str, Any] = {"command": "true", "args": [], "cwd": "/"}
    for name in chance.choices(SPEC_NAMES, k=chance.randrange(4)):
        made[name] = chance.choice(VALUES)
    return made


def encode(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("!II", len(text), len(body)) + text + body


def test_many_connections(supervisor: SupervisorProcess) -> None:
    held = []
    for _ in range(300):
        one = eventually_sync(lambda: try_connect(str(supervisor.path / paths.SOCKET_NAME)))
        assert one is not None
        with contextlib.suppress(OSError):
            one.send(b"\0\0")
        held.append(one)
    # It accepts them in its own time: until then there is no place in the queue for one more.
    eventually_sync(lambda: reaches(supervisor), message="no place in the queue after 300 connections")
    for one in held:
        one.close()
    assert lives(supervisor)


def reaches(supervisor: SupervisorProcess) -> bool:
    try:
        return lives(supervisor)
    except BlockingIOError:
        return False


def try_connect(path: str) -> socket.socket | None:
    """None while too many wait to be accepted."""
    one = socket.socket(socket.AF_UNIX)
    one.settimeout(1)
    try:
        one.connect(path)
    except BlockingIOError:
        one.close()
        return None
    return one
