"""Messages between worker and supervisor: what is encoded is decoded as it was, and what is none is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from worker_svc.ipc import messages
from worker_svc.ipc.frames import Decoder, Frame
from worker_svc.job import InvalidArgument
from worker_svc.record.writer import JobStore
from worker_svc.supervisor.settings import DEFAULTS, keep_settings, kept_settings

SETTINGS = DEFAULTS._replace(base_env={"A": "\udcff"}, user_env=("HOME", "USER"), idle_exit_s=1)
# One of each kind.
ALL: tuple[messages.Message, ...] = (
    messages.Hello(messages.PROTOCOL_VERSION, "1.0", "key", SETTINGS, exclusive=True),
    messages.Start("j", "f", "owner", True, b'{"command":"true"}', b"\0in", b"secret"),
    messages.Stop("j", None, 15, 0.5),
    messages.SendSignal("j", "owner", 9),
    messages.Pause("j"),
    messages.Resume("j", "owner"),
    messages.Delete("j", remember=True),
    messages.GetStatus(),
    messages.Shutdown(stop_jobs=True),
    messages.Welcome(messages.PROTOCOL_VERSION, 1, 2**62, "state", "/group", 7, is_shutting_down=False),
    messages.Started(3, existed=True),
    messages.Status(1, 2, 3, 4, 5, "cgroup", "", "native", {"cpus": "none here"}, True, "", False),
    messages.Leaving(4),
    messages.Done(),
    messages.Refused("invalid", "field: é"),
    messages.Doorbell(2**62),
)


def framed(message: messages.Message, number: int = 5) -> Frame:
    (frame,) = Decoder().feed(messages.encode(number, message))
    return frame


def test_there_is_one_of_each_kind() -> None:
    assert [type(message) for message in ALL] == [*messages.KIND_OF_OP.values()]


@pytest.mark.parametrize("message", ALL, ids=lambda message: type(message).__name__)
def test_what_is_encoded_is_decoded_as_it_was(message: messages.Message) -> None:
    frame = framed(message)
    assert messages.number_of(frame) == 5
    decoded = messages.decode(frame)
    assert (type(decoded), decoded) == (type(message), message)


@pytest.mark.parametrize("message", ALL, ids=lambda message: type(message).__name__)
def test_a_field_too_few_or_too_many_is_an_error(message: messages.Message) -> None:
    names = [name for name in message._fields if name != "protocol"]
    for name in names:
        frame = framed(message)
        del frame.header[name]
        with pytest.raises(InvalidArgument, match="is to have the fields"):
            messages.decode(frame)
    frame = framed(message)
    frame.header["from_the_future"] = 1
    with pytest.raises(InvalidArgument, match="is to have the fields"):
        messages.decode(frame)


@pytest.mark.parametrize("message", ALL, ids=lambda message: type(message).__name__)
def test_a_field_of_another_type_is_named(message: messages.Message) -> None:
    for name in message._fields:
        if name == "protocol" and isinstance(message, messages.Hello):
            continue
        for odd in ([1], [], {"a": 1}, 1e300):
            frame = framed(message)
            if isinstance(frame.header[name], dict) and not isinstance(odd, dict):
                odd = {"a": 1}
            frame.header[name] = odd
            with pytest.raises(InvalidArgument, match=rf"^{name}: "):
                messages.decode(frame)


def test_any_hello_tells_its_protocol_and_any_refusal_its_reason() -> None:
    with pytest.raises(messages.OtherProtocol, match=r"^7$"):
        messages.decode(Frame({"op": "hello", "r": 1, "protocol": 7, "anything": "else"}))
    refusal = messages.decode(Frame({"r": 1, "error": "version", "text": "why"}))  # as release 0.1.0 sends it
    assert refusal == messages.Refused("version", "why")


@pytest.mark.parametrize(
    "kept",
    [None, {}, {"slots": 3}, {"slots": 3, "of_another_version": [1]}],
    ids=json.dumps,
)
def test_settings_that_another_version_kept(tmp_path: Path, kept: dict[str, Any] | None) -> None:
    store = JobStore(str(tmp_path))
    if kept is not None:
        store.set_meta("settings", json.dumps(kept))
    assert kept_settings(store) == (DEFAULTS._replace(slots=3) if kept else DEFAULTS)
    keep_settings(store, SETTINGS)
    assert kept_settings(store) == SETTINGS
    store.close()
