"""The frames on the unix socket between worker and supervisor, for both ends; what is in them is messages.py's matter.

A frame is an 8-byte head, two big-endian u32 (length of the header, length of the body), then the header, a JSON
object in UTF-8, then the body, raw bytes.
"""

from __future__ import annotations

import json
import struct
from typing import Any, Final, NamedTuple

from worker_svc.job import ARGV_ENV_MAX_BYTES, SPEC_MAX_BYTES, STDIN_MAX_BYTES

_HEAD: Final = struct.Struct("!II")
# Most of it for the environment that all jobs have, which comes with hello.
HEADER_MAX_BYTES: Final = 4 * 1024 * 1024
BODY_MAX_BYTES: Final = SPEC_MAX_BYTES + STDIN_MAX_BYTES + ARGV_ENV_MAX_BYTES

# ASCII: an environment can hold bytes that are no UTF-8, which Python keeps as lone surrogates (PEP 383).
# What JSONEncoder.encode makes anew for each text, which takes as long as the text itself.
_json_chunks = json.encoder.c_make_encoder(  # type: ignore[attr-defined]
    None, None, json.encoder.encode_basestring_ascii, None, ":", ",", False, False, True
)
_decode_json = json.JSONDecoder().raw_decode


class FrameError(Exception):
    """What is not a frame: if it came from the other side, the connection cannot go on."""


class Frame(NamedTuple):
    header: dict[str, Any]
    body: bytes = b""

    def __repr__(self) -> str:
        return f"Frame({self.header.get('op')!r}, {len(self.body)} bytes)"


def encode_frame(header: dict[str, Any], body: bytes = b"") -> bytes:
    """Raises FrameError: what the other side would have to refuse is not sent."""
    text = "".join(_json_chunks(header, 0)).encode()
    _check_sizes(len(text), len(body))
    return _HEAD.pack(len(text), len(body)) + text + body


class Decoder:
    """Cuts a byte stream into frames; holds at most one frame that is not complete."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, received: bytes) -> list[Frame]:
        """The frames that `received` completes. Raises FrameError."""
        self._buffer += received
        frames: list[Frame] = []
        at = 0
        while len(self._buffer) - at >= _HEAD.size:
            header_size, body_size = _HEAD.unpack_from(self._buffer, at)
            _check_sizes(header_size, body_size)
            end = at + _HEAD.size + header_size + body_size
            if len(self._buffer) < end:
                break
            start = at + _HEAD.size
            header = _parse(self._buffer[start : start + header_size])
            frames.append(Frame(header, bytes(self._buffer[start + header_size : end])))
            at = end
        if at:
            del self._buffer[:at]
        return frames


def _check_sizes(header_size: int, body_size: int) -> None:
    if header_size > HEADER_MAX_BYTES or body_size > BODY_MAX_BYTES:
        raise FrameError(f"frame too large: header {header_size} bytes, body {body_size} bytes")


def _parse(text: bytearray) -> dict[str, Any]:
    try:
        header, end = _decode_json(text.decode())
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON or bad UTF-8
        raise FrameError(f"frame header is not JSON: {error}") from error
    if not isinstance(header, dict) or end != len(text):
        raise FrameError("frame header is not a JSON object")
    return header
