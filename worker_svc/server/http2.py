"""One connection's HTTP/2: the one place that knows the engine, libnghttp2 by way of `ngh2`.

The engine is young, so its version is pinned, and its limits are all set here. It resets single streams for malformed
requests, ignores frames that it does not know, and ends the connection for what is no HTTP/2; what it cannot know is
what a frame was good for, which `connection` counts.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import Final

from ngh2 import (
    Configuration,
    Connection,
    ConnectionClosed,
    DataReceived,
    Event,
    NGH2Error,
    PingAcknowledged,
    PingReceived,
    RequestReceived,
    Role,
    SettingsReceived,
    StreamClosed,
    WindowUpdated,
)

__all__ = [
    "CANCEL",
    "ENHANCE_YOUR_CALM",
    "INTERNAL_ERROR",
    "NO_ERROR",
    "PROTOCOL_ERROR",
    "REFUSED_STREAM",
    "ConnectionClosed",
    "DataReceived",
    "Headers",
    "Http2",
    "Http2Error",
    "PingAcknowledged",
    "PingReceived",
    "RequestReceived",
    "SettingsReceived",
    "StreamClosed",
    "WindowUpdated",
]

# RFC 9113, section 7
NO_ERROR: Final = 0x0
PROTOCOL_ERROR: Final = 0x1
INTERNAL_ERROR: Final = 0x2
REFUSED_STREAM: Final = 0x7
CANCEL: Final = 0x8
ENHANCE_YOUR_CALM: Final = 0xB

# RFC 9113, section 6.5.2
_MAX_CONCURRENT_STREAMS: Final = 0x3
_INITIAL_WINDOW_SIZE: Final = 0x4
_MAX_HEADER_LIST_SIZE: Final = 0x6

# What may be under way unread, of one stream and of a connection. Requests are read at once, so little is enough.
_STREAM_WINDOW_BYTES: Final = 256 * 1024
_CONNECTION_WINDOW_BYTES: Final = 1024 * 1024
# Above our limit of headers a request is refused with an answer; above this multiple of it the connection ends.
_HEADER_HARD_FACTOR: Final = 2
_HEADER_COUNT_MAX: Final = 1024
_HEADERS_OF_OURS_MAX_BYTES: Final = 256 * 1024
# The engine's own counts are a backstop: burst, and how much a second.
_RESETS: Final = (4096, 1000)
_GLITCHES: Final = (1000, 100)

_GOAWAY: Final = 0x7
_STREAM_ID_MAX: Final = 2**31 - 1

Headers = tuple[tuple[bytes, bytes], ...]


class Http2Error(Exception):
    """The peer broke the connection's state; it cannot go on."""


def goaway(code: int, reason: str) -> bytes:
    """The frame (RFC 9113, 6.8), for when the engine itself cannot go on."""
    text = reason.encode()
    head = (8 + len(text)).to_bytes(3, "big") + bytes((_GOAWAY, 0))
    return head + struct.pack("!III", 0, _STREAM_ID_MAX, code) + text


class Http2:
    """The server's end. What is to be sent gathers here until `take`."""

    __slots__ = ("_connection",)

    def __init__(self, *, max_streams: int, max_header_bytes: int) -> None:
        self._connection = Connection(
            Role.SERVER,
            Configuration(
                auto_window_update=False,
                max_send_header_block_length=_HEADERS_OF_OURS_MAX_BYTES,
                max_outbound_ack=1000,
                max_settings=32,
                stream_reset_rate_limit=_RESETS,
                max_continuations=2 + _HEADER_HARD_FACTOR * max_header_bytes // 16384,
                glitch_rate_limit=_GLITCHES,
                max_inbound_header_list_size=_HEADER_HARD_FACTOR * max_header_bytes,
                max_inbound_header_count=_HEADER_COUNT_MAX,
            ),
        )
        self._connection.initiate_connection(
            {
                _MAX_CONCURRENT_STREAMS: max_streams,
                _INITIAL_WINDOW_SIZE: _STREAM_WINDOW_BYTES,
                _MAX_HEADER_LIST_SIZE: max_header_bytes,
            }
        )
        self._connection.set_local_window_size(_CONNECTION_WINDOW_BYTES)

    def feed(self, data: bytes) -> list[Event]:
        """What came. Raises Http2Error."""
        try:
            self._connection.receive_data(data)
        except NGH2Error as error:
            raise Http2Error(str(error)) from error
        return self._connection.events()

    def take(self, most_bytes: int) -> tuple[bytes, list[Event]]:
        """What is to be sent now, at most so much, and what its being sent brought about. Raises Http2Error."""
        try:
            return self._connection.data_to_send(most_bytes), self._connection.events()
        except NGH2Error as error:
            raise Http2Error(str(error)) from error

    @property
    def wants_to_send(self) -> bool:
        return self._connection.want_write

    @property
    def window(self) -> int:
        """How much more the client takes on this connection, in bytes."""
        return self._connection.remote_window_size

    def stream_window(self, stream_id: int) -> int:
        """The same of one stream, which the connection's bounds too."""
        try:
            return self._connection.stream_remote_window_size(stream_id)
        except NGH2Error:
            return 1  # it is closed: whoever sends is told

    def unsent(self, stream_id: int) -> int:
        """Bytes of the stream's body that wait for the client's window."""
        try:
            return self._connection.queued_body_size(stream_id)
        except NGH2Error:
            return 0  # it is closed

    # Said to the client, who may have closed the stream, or the connection: then there is nobody to tell.

    def _say(self, action: Callable[..., object], *arguments: object, **named: object) -> None:
        try:
            action(*arguments, **named)
        except NGH2Error:
            return

    def consumed(self, stream_id: int, size: int) -> None:
        """So much of the stream's data is dealt with: the client may send as much again."""
        self._say(self._connection.acknowledge_received_data, size, stream_id)

    def respond(self, stream_id: int, headers: Iterable[tuple[bytes, bytes]], *, end: bool = False) -> None:
        self._say(self._connection.send_response, stream_id, headers, end_stream=end)

    def send(self, stream_id: int, data: bytes) -> None:
        self._say(self._connection.send_data, stream_id, data)

    def end(self, stream_id: int, trailers: Iterable[tuple[bytes, bytes]]) -> None:
        self._say(self._connection.send_trailers, stream_id, trailers)

    def reset(self, stream_id: int, code: int) -> None:
        self._say(self._connection.reset_stream, stream_id, code)

    def ping(self) -> None:
        self._say(self._connection.ping, b"worker?!")

    def goodbye(self, code: int, reason: str) -> None:
        """GOAWAY; what comes after it is not looked at."""
        self._say(self._connection.send_goaway, code, debug_data=reason.encode())
