"""The frames on the unix socket between worker and supervisor, for both sides.

A frame is an 8-byte head, two big-endian u32 (length of the header, length of the body), then the header, a JSON
object in UTF-8, then the body, raw bytes: of a start the spec as it is stored, JSON of `spec_bytes` bytes, then what
the job reads, then its secrets; otherwise empty.

Requests carry `op` and `r`, a number the worker chooses; the answer carries the same `r` and either `ok`, an object,
or `error`, a code of `job.ERRORS`, with `text`. Besides answers the supervisor sends one kind of frame unasked:
`{"seq": N}`, a doorbell: all transitions up to N are in the store. The worker reads them there, so a worker that is
slow, stopped or gone costs the supervisor no memory, and catching up is the same code as living on.

| op | fields | ok |
|---|---|---|
| hello | protocol, version, key, settings | protocol, version, pid, started_ns, state_id, cgroup, seq |
| start | id, fp, owner, spec_bytes, new; body: spec, standard input, secret variables | state, existed |
| stop | id, signal, grace_s (null: the job's own) | state |
| signal | id, signal | |
| pause, resume | id | |
| delete | id | |
| status | | what GetWorker tells of the supervisor: running, queued, seq, containment, unenforceable … |
| shutdown | stop_jobs | jobs: how many it waits for before it leaves |

A start without `spec_bytes` is of a job that must be there already: its body is secret variables.

Any request with an `id` can have `of`, an owner: it then finds no other owner's job.
"""

from __future__ import annotations

import json
import struct
from typing import Any, Final, NamedTuple

from worker_svc.job import ARGV_ENV_MAX_BYTES, SPEC_MAX_BYTES, STDIN_MAX_BYTES

# Raised whenever either side could misread the other; worker and supervisor refuse to mix.
PROTOCOL_VERSION: Final = 2

SOCKET_NAME: Final = "supervisor.sock"
# What a worker shows in its hello: only who can read the state directory knows it, and no sandbox lets a job do that.
KEY_NAME: Final = "supervisor.key"
# Its first eight bytes, little-endian: up to which transition all are logged (telemetry/cursor.py). The worker's alone.
CURSOR_NAME: Final = "worker.cursor"
SUPERVISOR_LOG_NAME: Final = "supervisor.log"
# What a supervisor exits with when another one has the state directory.
EXIT_LOCKED: Final = 3

_HEAD: Final = struct.Struct("!II")
# Most of it for the environment that all jobs have, which comes with hello.
HEADER_MAX_BYTES: Final = 4 * 1024 * 1024
BODY_MAX_BYTES: Final = SPEC_MAX_BYTES + STDIN_MAX_BYTES + ARGV_ENV_MAX_BYTES

_encode_json = json.JSONEncoder(separators=(",", ":")).encode


class FrameError(Exception):
    """What is not a frame: if it came from the other side, the connection cannot go on."""


class Frame(NamedTuple):
    header: dict[str, Any]
    body: bytes = b""

    def __repr__(self) -> str:
        return f"Frame({self.header.get('op')!r}, {len(self.body)} bytes)"


def encode(header: dict[str, Any], body: bytes = b"") -> bytes:
    """Raises FrameError: what the other side would have to refuse is not sent."""
    # ASCII: an environment can hold bytes that are no UTF-8, which Python keeps as lone surrogates (PEP 383).
    text = _encode_json(header).encode()
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
        header = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON or bad UTF-8
        raise FrameError(f"frame header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise FrameError("frame header is not a JSON object")
    return header
