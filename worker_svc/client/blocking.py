"""Unary calls without an event loop, for the command line: asyncio, grpclib and betterproto take longer to import than
a short command takes in all.
"""

from __future__ import annotations

import socket
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.parse import unquote

from google.protobuf.message import DecodeError
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from ngh2 import (
    Configuration,
    Connection,
    ConnectionClosed,
    DataReceived,
    NGH2Error,
    ResponseReceived,
    Role,
    StreamClosed,
    TrailersReceived,
)

from worker_svc.client.errors import lost, not_reached, not_trusted, too_late, why_refused, why_silent
from worker_svc.job import DeadlineExceeded, InvalidArgument, JobError
from worker_svc.wire.plain import plain
from worker_svc.wire.pool import answer_class, message_class
from worker_svc.wire.statuses import from_grpc

if TYPE_CHECKING:
    from ssl import SSLContext

    from worker_svc.address import Address

_INITIAL_WINDOW_SIZE: Final = 0x4
_WINDOW_BYTES: Final = 2**31 - 1  # answers are read as they come
_HEADERS_MAX_BYTES: Final = 1024 * 1024
_READ_BYTES: Final = 256 * 1024
_LONGEST_MS: Final = 99_999_999
"""gRPC has eight digits for a deadline."""


class BlockingWorker:
    """One worker, asked one thing after the other, over one connection.

    Raises what WorkerClient raises: the `JobError`s of `worker_svc.job`, and a `grpclib.GRPCError` for a status outside
    their table.
    """

    def __init__(self, address: Address, *, ssl: SSLContext | None = None, server_name: str = "") -> None:
        self._address = address
        self._ssl = ssl
        self._server_name = server_name
        self._socket: socket.socket | None = None
        self._http2 = Connection(Role.CLIENT, Configuration(max_inbound_header_list_size=_HEADERS_MAX_BYTES))
        self._heard = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._socket is not None:
            self._socket.close()

    def ask(self, method: str, *, deadline_s: float | None = None, **fields: Any) -> Any:
        """Calls the RPC `method` ("QueryJob") with a request of `fields`, by their names in the contract ("jobID");
        what is None is left out. The answer is as `wire.plain` makes it. `deadline_s`: seconds it may take, connecting
        included; None: any."""
        request = _encoded(f"{method}Req", {name: value for name, value in fields.items() if value is not None})
        ends_at_s = None if deadline_s is None else time.monotonic() + deadline_s
        try:
            answer = self._call(method, request, ends_at_s)
        except TimeoutError as error:
            raise DeadlineExceeded(too_late(str(self._address))) from error
        try:
            return plain(answer_class(method).FromString(answer))
        except (DecodeError, InvalidArgument) as error:
            raise GRPCError(Status.INTERNAL, f"the answer to {method} is malformed: {error}") from error

    def _call(self, method: str, request: bytes, ends_at_s: float | None) -> bytes:
        """Raises TimeoutError, and what `ask` raises."""
        connected = self._connected(ends_at_s)
        left_s = _left(ends_at_s)
        headers = [
            (b":method", b"POST"),
            (b":scheme", b"http" if self._ssl is None else b"https"),
            (b":path", f"/jobscheduler.Worker/{method}".encode()),
            (b":authority", (self._address.host or "localhost").encode()),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
        ]
        if left_s is not None:
            headers.append((b"grpc-timeout", b"%dm" % min(max(int(left_s * 1000), 1), _LONGEST_MS)))
        stream_id = self._http2.send_request(headers)
        # Not compressed, and its length.
        self._http2.send_data(stream_id, b"\0" + len(request).to_bytes(4, "big") + request, end_stream=True)
        answer = b""
        while True:
            for event in self._exchange(connected, ends_at_s):
                match event:
                    case ResponseReceived() | TrailersReceived():
                        _raise_for_status(dict(event.headers), is_last=isinstance(event, TrailersReceived))
                    case DataReceived():
                        answer += event.data
                    case ConnectionClosed():
                        text = event.debug_data.decode(errors="replace")
                        why = self._why_silent() or f"it does not speak HTTP/2 as it should: {text}"
                        raise lost(str(self._address), why)
                    case StreamClosed() if event.error_code or len(answer) < 5:
                        raise lost(str(self._address), f"the call was reset (HTTP/2 error {event.error_code})")
                    case StreamClosed():
                        return answer[5:]

    def _exchange(self, connected: socket.socket, ends_at_s: float | None) -> list[Any]:
        """What came of sending what there is to send, or else of reading once. Raises TimeoutError and Unavailable."""
        try:
            while data := self._http2.data_to_send():
                connected.settimeout(_left(ends_at_s))
                connected.sendall(data)
            if events := self._http2.events():
                return events
            connected.settimeout(_left(ends_at_s))
            data = connected.recv(_READ_BYTES)
        except OSError as error:
            if isinstance(error, TimeoutError) and error.errno is None:
                raise
            why = why_refused(error) if _is_of_tls(error) else self._why_silent()  # type: ignore[arg-type]
            raise lost(str(self._address), why) from error
        self._heard = self._heard or data[:2]
        if not data:
            raise lost(str(self._address), self._why_silent())
        try:
            self._http2.receive_data(data)
        except NGH2Error as error:
            raise lost(
                str(self._address), self._why_silent() or f"it does not speak HTTP/2 as it should: {error}"
            ) from error
        return self._http2.events()

    def _why_silent(self) -> str:
        return why_silent(self._heard, with_tls=self._ssl is not None)

    def _connected(self, ends_at_s: float | None) -> socket.socket:
        if self._socket is None:
            try:
                self._socket = self._connect(ends_at_s)
            except OSError as error:
                if isinstance(error, TimeoutError) and error.errno is None:
                    raise
                if _is_of_tls(error):
                    raise not_trusted(str(self._address), error) from error  # type: ignore[arg-type]
                raise not_reached(str(self._address), error) from error
            self._http2.initiate_connection({_INITIAL_WINDOW_SIZE: _WINDOW_BYTES})
            self._http2.set_local_window_size(_WINDOW_BYTES)
        return self._socket

    def _connect(self, ends_at_s: float | None) -> socket.socket:
        address = self._address
        if address.is_unix:
            connected = socket.socket(socket.AF_UNIX)
        else:
            # Bytes: text goes through the codec for international names, which takes 4 ms to import. Ours is ASCII.
            host = (address.host or "127.0.0.1").encode("ascii")
            where: Any = (host, address.port)
            connected = socket.create_connection(where, _left(ends_at_s))
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            connected.settimeout(_left(ends_at_s))
            if address.is_unix:
                connected.connect(address.unix_path)
            if self._ssl is None:
                return connected
            return self._ssl.wrap_socket(connected, server_hostname=self._server_name or address.host or "127.0.0.1")
        except BaseException:
            connected.close()
            raise


def _left(ends_at_s: float | None) -> float | None:
    """Seconds. Raises TimeoutError when there are none."""
    if ends_at_s is None:
        return None
    left_s = ends_at_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    return left_s


def _is_of_tls(error: OSError) -> bool:
    return hasattr(error, "library")  # an ssl.SSLError; without TLS, `ssl` is not loaded


def _encoded(message: str, fields: dict[str, Any]) -> bytes:
    made = message_class(message)
    try:
        return made(**fields).SerializeToString()  # type: ignore[no-any-return]
    except ValueError as error:
        for name, value in fields.items():
            try:
                made(**{name: value})
            except UnicodeEncodeError:
                raise InvalidArgument(name, "is not valid Unicode") from error
            except ValueError as fault:
                raise InvalidArgument(name, str(fault)) from error
        raise


def _raise_for_status(headers: dict[bytes, bytes], *, is_last: bool) -> None:
    """Raises JobError or GRPCError unless all is well so far."""
    if not is_last and headers.get(b":status") != b"200":
        raise GRPCError(Status.UNKNOWN, f"HTTP status {headers.get(b':status', b'').decode(errors='replace')}")
    code = headers.get(b"grpc-status")
    if code is None and not is_last:
        return
    try:
        status = Status(int(code or b""))
    except ValueError:
        raise GRPCError(Status.UNKNOWN, f"there is no gRPC status {code!r}") from None
    if status is not Status.OK:
        error: JobError | GRPCError = from_grpc(
            GRPCError(status, unquote(headers.get(b"grpc-message", b"").decode(errors="replace")) or None)
        )
        raise error
