"""An HTTP/2 client that sends whatever it is told to, frame by frame."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

from hpack import Decoder, Encoder
from hyperframe.frame import (
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from tests.support.waiting import PATIENCE_S

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
START: Final = "/jobscheduler.Worker/StartJob"
STREAM: Final = "/jobscheduler.Worker/StreamJob"
QUERY: Final = "/jobscheduler.Worker/QueryJob"


class Answer(NamedTuple):
    """What came on a stream until its end."""

    headers: dict[str, str]
    data: bytes
    reset: int | None

    @property
    def status(self) -> int:
        return int(self.headers["grpc-status"])

    @property
    def message(self) -> str:
        return self.headers.get("grpc-message", "")


class Gone(Exception):
    """The server has hung up."""


def prefixed(message: bytes, flag: int = 0) -> bytes:
    return struct.pack("!BI", flag, len(message)) + message


def head(kind: int, length: int, flags: int = 0, stream: int = 0) -> bytes:
    return struct.pack("!IB", length, 0)[1:4] + struct.pack("!BBI", kind, flags, stream)


class RawClient:
    def __init__(
        self, address: str, *, begin: bool = True, source: str = "127.0.0.1", settings: dict[int, int] | None = None
    ) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=PATIENCE_S, source_address=(source, 0))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.encoder = Encoder()
        self._decoder = Decoder()
        self._buffer = b""
        self._next_id = 1
        self.settings: dict[int, int] = {}
        self.goaway: GoAwayFrame | None = None
        self.pings = 0
        self.answers_pings = True
        self.opens_windows = True
        self._streams: dict[int, tuple[dict[str, str], bytearray, list[int | None]]] = {}
        if begin:
            self.send(PREFACE, SettingsFrame(0, settings=settings or {}))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    def send(self, *parts: bytes | Frame) -> None:
        self.socket.sendall(b"".join(part if isinstance(part, bytes) else part.serialize() for part in parts))

    def open(self, pairs: Iterable[tuple[Any, Any]], *, end: bool = False) -> int:
        """Sends headers as a new stream."""
        stream_id = self._next_id
        self._next_id += 2
        self.send(self.headers_frame(stream_id, pairs, end=end))
        return stream_id

    def headers_frame(self, stream_id: int, pairs: Iterable[tuple[Any, Any]], *, end: bool = False) -> HeadersFrame:
        frame = HeadersFrame(stream_id, self.encoder.encode([*pairs]))
        frame.flags.add("END_HEADERS")
        if end:
            frame.flags.add("END_STREAM")
        return frame

    def data(self, stream_id: int, data: bytes, *, end: bool = True) -> None:
        self.send(self.data_frame(stream_id, data, end=end))

    def data_frame(self, stream_id: int, data: bytes, *, end: bool = True) -> DataFrame:
        frame = DataFrame(stream_id, data)
        if end:
            frame.flags.add("END_STREAM")
        return frame

    def call(self, path: str = START, message: bytes = b"\x0a\x02hi", *extra: tuple[Any, Any]) -> int:
        stream_id = self.open([*grpc_headers(path), *extra])
        self.data(stream_id, prefixed(message))
        return stream_id

    def answer(self, stream_id: int) -> Answer:
        """Waits for the end of a stream. Raises Gone."""
        while True:
            headers, data, ends = self._stream(stream_id)
            if ends:
                return Answer(headers, bytes(data), ends[0])
            self.receive()

    def is_answered(self, stream_id: int) -> bool:
        return bool(self._stream(stream_id)[2])

    def received(self, stream_id: int) -> int:
        """Bytes, so far."""
        return len(self._stream(stream_id)[1])

    def wait_goaway(self) -> GoAwayFrame:
        while self.goaway is None:
            self.receive()
        return self.goaway

    def wait_gone(self) -> None:
        try:
            while True:
                self.receive()
        except Gone:
            return

    def receive(self) -> None:
        """What comes next. Raises Gone."""
        try:
            received = self.socket.recv(65536)
        except ConnectionError:
            raise Gone from None
        if not received:
            raise Gone
        self._buffer += received
        while len(self._buffer) >= 9:
            frame, length = Frame.parse_frame_header(memoryview(self._buffer[:9]))
            if len(self._buffer) < 9 + length:
                return
            frame.parse_body(memoryview(self._buffer[9 : 9 + length]))
            self._buffer = self._buffer[9 + length :]
            self._take(frame)

    def _take(self, frame: Frame) -> None:
        match frame:
            case SettingsFrame() if "ACK" not in frame.flags:
                self.settings = dict(frame.settings)
                self._try_send(SettingsFrame(0, flags=["ACK"]))
            case PingFrame() if "ACK" not in frame.flags:
                self.pings += 1
                if self.answers_pings:
                    self._try_send(PingFrame(0, opaque_data=frame.opaque_data, flags=["ACK"]))
            case GoAwayFrame():
                self.goaway = frame
            case HeadersFrame():
                headers, _, _ = self._stream(frame.stream_id)
                headers.update({str(name): str(value) for name, value in self._decoder.decode(frame.data)})
            case DataFrame():
                self._stream(frame.stream_id)[1].extend(frame.data)
                if frame.data and self.opens_windows:
                    self._try_send(WindowUpdateFrame(0, window_increment=len(frame.data)))
            case RstStreamFrame():
                # After the end it only means that nobody reads on.
                self._stream(frame.stream_id)[2].append(frame.error_code)
        if "END_STREAM" in frame.flags:
            self._stream(frame.stream_id)[2].append(None)

    def _try_send(self, frame: Frame) -> None:
        try:
            self.send(frame)
        except OSError:  # it may have hung up already: what it said before counts
            return

    def _stream(self, stream_id: int) -> tuple[dict[str, str], bytearray, list[int | None]]:
        return self._streams.setdefault(stream_id, ({}, bytearray(), []))


def grpc_headers(path: str = START) -> list[tuple[Any, Any]]:
    return [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "localhost"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ]


def without(name: str, path: str = START) -> list[tuple[Any, Any]]:
    return [pair for pair in grpc_headers(path) if pair[0] != name]


def replaced(name: str, value: Any, path: str = START) -> list[tuple[Any, Any]]:
    return [(key, value if key == name else old) for key, old in grpc_headers(path)]
