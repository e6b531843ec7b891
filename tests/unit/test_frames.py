"""Frames on the unix socket: what is sent arrives whole however it is cut, and what is no frame is refused."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker_svc.ipc.frames import BODY_MAX_BYTES, HEADER_MAX_BYTES, Decoder, Frame, FrameError
from worker_svc.ipc.frames import encode_frame as encode

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
HEADERS = st.dictionaries(st.text(max_size=8), VALUES, max_size=4)
FRAMES = st.builds(Frame, HEADERS, st.binary(max_size=100))


@given(st.lists(FRAMES, max_size=4), st.data())
def test_what_is_sent_arrives(sent: list[Frame], data: st.DataObject) -> None:
    stream = b"".join(encode(frame.header, frame.body) for frame in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    decoder = Decoder()
    arrived = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        arrived += decoder.feed(stream[start:end])
    assert arrived == sent


def test_cut_at_every_byte() -> None:
    sent = [Frame({"r": 1, "é": "\0"}, b"\0body"), Frame({}), Frame({"seq": 2**63})]
    stream = b"".join(encode(frame.header, frame.body) for frame in sent)
    for cut in range(len(stream) + 1):
        decoder = Decoder()
        assert decoder.feed(stream[:cut]) + decoder.feed(stream[cut:]) == sent
    decoder = Decoder()
    assert [frame for at in range(len(stream)) for frame in decoder.feed(stream[at : at + 1])] == sent


def test_nothing_is_kept_of_frames_that_are_complete() -> None:
    decoder = Decoder()
    frame = encode({"r": 1}, b"x" * 1000)
    for _ in range(100):
        decoder.feed(frame)
    assert decoder.feed(frame[:-1]) == []
    assert decoder.feed(frame[-1:]) == [Frame({"r": 1}, b"x" * 1000)]
    assert len(decoder._buffer) == 0


def test_the_largest_frames_pass() -> None:
    body = bytes(BODY_MAX_BYTES)
    assert Decoder().feed(encode({}, body)) == [Frame({}, body)]
    text = "x" * (HEADER_MAX_BYTES - len('{"a":""}'))
    assert Decoder().feed(encode({"a": text})) == [Frame({"a": text})]


def raw(header: bytes, body: bytes = b"") -> bytes:
    return struct.pack("!II", len(header), len(body)) + header + body


@pytest.mark.parametrize(
    "stream",
    [
        struct.pack("!II", HEADER_MAX_BYTES + 1, 0),
        struct.pack("!II", 2, BODY_MAX_BYTES + 1),
        struct.pack("!II", 0xFFFFFFFF, 0xFFFFFFFF),
        b"GET / HTTP/1.1\r\n\r\n",
        raw(b""),
        raw(b"{"),
        raw(b"\xff\xfe\xfd"),
        raw(b'{"a": "\xff"}'),
        raw(b"[]"),
        raw(b"1"),
        raw(b"null"),
        raw(b'{"a": 1} x'),
        raw(b"[" * 100_000),
        raw(b'{"a":' * 100_000),
    ],
    ids=lambda stream: stream[:20].hex(),
)
def test_what_is_no_frame(stream: bytes) -> None:
    with pytest.raises(FrameError, match="frame"):
        Decoder().feed(stream)


@given(st.binary(max_size=200))
def test_garbage_is_refused_or_awaited_but_nothing_else(garbage: bytes) -> None:
    decoder = Decoder()
    try:
        for frame in decoder.feed(garbage):
            assert isinstance(frame.header, dict)
    except FrameError:
        return


@pytest.mark.parametrize("value", ["\udcff", "PATH=/home/caf\udce9", "a\ud800b"])
def test_text_that_is_not_unicode_survives(value: str) -> None:
    """As Python makes of a stray byte in the environment: os.fsencode gives the byte back."""
    header: dict[str, Any] = {"settings": {"base_env": {"HOME": value}}}
    assert Decoder().feed(encode(header)) == [Frame(header)]


def test_integers_are_exact() -> None:
    header = {"n": 2**63 + 1, "f": 0.1}
    assert Decoder().feed(encode(header))[0].header == header
    assert json.loads(json.dumps(header)) == header
