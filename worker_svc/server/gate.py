"""Looks at the heads of HTTP/2 frames before h2 does: counts them, and cuts what came into portions of bounded work.

h2 takes 10 to 90 µs a frame and whatever was read is handed to it at once, up to thousands of frames: one client could
hold up all others for a second. A head costs 0.5 µs here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from h2.errors import ErrorCodes

DATA: Final = 0
HEADERS: Final = 1
PRIORITY: Final = 2
RST_STREAM: Final = 3
SETTINGS: Final = 4
PING: Final = 6
GOAWAY: Final = 7
WINDOW_UPDATE: Final = 8
CONTINUATION: Final = 9

ACK: Final = 0x1
END_STREAM: Final = 0x1
END_HEADERS: Final = 0x4

_HEAD_BYTES: Final = 9
_PREFACE_BYTES: Final = 24
# The default of SETTINGS_MAX_FRAME_SIZE, which we do not raise. h2 would first wait for all of a larger frame.
_FRAME_MAX_BYTES: Final = 16384
# What one portion may cost, where a call is 8 and any other frame 1: a call with its message, some 0.2 ms.
_PORTION: Final = 9
_COSTS: Final = {HEADERS: 8, CONTINUATION: 4}

OnFrame = Callable[[int, int, int, int], None]
"""Type, length, flags, stream."""


class Abuse(Exception):
    """The connection has to end, with this code."""

    def __init__(self, code: ErrorCodes, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


def has_head(data: bytes) -> bool:
    """Whether there is enough of what was held back to go on with."""
    return len(data) >= _HEAD_BYTES


class FrameGate:
    def __init__(self) -> None:
        self._left = _PREFACE_BYTES
        """Bytes to come of the frame that was begun; at first, of the connection preface."""

    @property
    def is_within_frame(self) -> bool:
        return self._left > 0

    def portion(self, data: bytes, on_frame: OnFrame) -> int:
        """Where the first portion of it ends. Part of a head stays out of it. Raises Abuse, or `on_frame` does."""
        at, end = 0, len(data)
        cost = 0
        if self._left:
            step = min(self._left, end - at)
            self._left -= step
            at += step
        while at + _HEAD_BYTES <= end and cost < _PORTION:
            length = data[at] << 16 | data[at + 1] << 8 | data[at + 2]
            kind = data[at + 3]
            if length > _FRAME_MAX_BYTES:
                raise Abuse(ErrorCodes.FRAME_SIZE_ERROR, f"a frame of {length} bytes")
            stream = int.from_bytes(data[at + 5 : at + 9], "big") & 0x7FFFFFFF
            on_frame(kind, length, data[at + 4], stream)
            cost += _COSTS.get(kind, 1)
            at += _HEAD_BYTES
            step = min(length, end - at)
            self._left = length - step
            at += step
        return at
