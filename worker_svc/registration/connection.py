"""The connection to the scheduler: one that tells of its loss at once, whatever the way it was lost."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, cast

from grpclib.client import Channel, Handler
from grpclib.config import Configuration
from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError
from grpclib.protocol import Connection, EventsProcessor, H2Protocol
from h2.config import H2Configuration
from h2.errors import ErrorCodes
from h2.events import ConnectionTerminated, Event
from h2.exceptions import H2Error

from worker_svc.linux.threads import run_apart
from worker_svc.token_bucket import TokenBucket

# How long a TLS peer is given to confirm the close: by asyncio's 30 s the news of a black hole would be late.
_TLS_CLOSE_TIMEOUT_S: Final = 1.0
_TCP_KEEPALIVE_PROBES: Final = 3
# What a scheduler may send: two short answers, and from then on a PING now and then. A larger answer, and a flood of
# whatever frames, costs no more than to connect again.
_RECEIVED_BURST_BYTES: Final = 32 * 1024
_RECEIVED_BYTES_PER_S: Final = 512
_TOO_MUCH: Final = f"it sends more than the {_RECEIVED_BURST_BYTES} bytes that a registration may take"


class RegistrationRefused(Exception):
    """The scheduler answered, but gave no worker id."""


# What can happen to a call, however well both ends are written; UnicodeError is of an impossible host name.
FORESEEN: Final = (
    OSError,
    UnicodeError,
    GRPCError,
    StreamTerminatedError,
    ProtocolError,
    H2Error,
    RegistrationRefused,
)


@dataclass(frozen=True)
class Endpoint:
    """Where the scheduler is, and how to connect to it."""

    host: str
    port: int
    unix_path: str | None
    ssl_context: ssl.SSLContext | None
    server_name: str | None
    timeout_s: float
    keepalive_s: float
    resolver: Resolver = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "resolver", Resolver(self.host, self.port))

    def __str__(self) -> str:
        if self.unix_path is not None:
            return f"unix:{self.unix_path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    async def connect(self, factory: Callable[[], H2Protocol]) -> H2Protocol:
        """Raises OSError, of the last address tried, or UnicodeError for a name that cannot be one."""
        loop = asyncio.get_running_loop()
        tls: dict[str, Any] = {}
        if self.ssl_context is not None:
            tls = {
                "ssl": self.ssl_context,
                "server_hostname": self.server_name,
                "ssl_shutdown_timeout": _TLS_CLOSE_TIMEOUT_S,
            }
        if self.unix_path is not None:
            _, protocol = await loop.create_unix_connection(factory, self.unix_path, **tls)
            return protocol
        addresses = await self.resolver.addresses()
        last_error = OSError(f"{self.host} has no address")
        for address in addresses:
            try:
                # A share each, so that one that nobody answers at leaves time for the next.
                async with asyncio.timeout(self.timeout_s / len(addresses)):
                    _, protocol = await loop.create_connection(factory, address, self.port, **tls)
            except TimeoutError:
                last_error = TimeoutError(f"no connection to {address} in time")
            except OSError as error:
                last_error = error
            else:
                return protocol
        raise last_error

    def configuration(self, pings: bool) -> Configuration:
        return Configuration(  # private fields: there are no public ones
            _keepalive_time=self.keepalive_s if pings else None,
            _keepalive_timeout=self.timeout_s,
            _keepalive_permit_without_calls=True,
            _http2_max_pings_without_data=0,  # no limit; by default there is no PING after the second
            # Half: with the whole of it, the rounding of clocks would leave out every other PING.
            _http2_min_sent_ping_interval_without_data=self.keepalive_s / 2,
        )


class Link(Channel):
    """One connection to the scheduler. A Channel silently connects anew; this, once lost, stays lost."""

    def __init__(self, endpoint: Endpoint, pings: bool, on_lost: Callable[[Link], None]) -> None:
        super().__init__(
            endpoint.host or "localhost",  # for :authority only
            endpoint.port,
            ssl=endpoint.ssl_context,
            config=endpoint.configuration(pings),
        )
        self.endpoint = endpoint
        self.lost_reason: str | None = None
        self.pings_refused = False
        self._on_lost = on_lost
        self._link_protocol: _LinkProtocol | None = None

    @property
    def connected(self) -> bool:
        return self._connected

    def _protocol_factory(self) -> H2Protocol:
        self._link_protocol = _LinkProtocol(self, self._config, self._h2_config)
        return self._link_protocol

    async def _create_connection(self) -> H2Protocol:
        if self._link_protocol is not None:
            raise ConnectionError(self.lost_reason or "connection lost")
        return await self.endpoint.connect(self._protocol_factory)

    def lose(self, protocol: H2Protocol, reason: str) -> None:
        # The protocol of an address that was given up is not the connection.
        if protocol is self._link_protocol and self.lost_reason is None:
            self.lost_reason = reason
            self._on_lost(self)

    async def drop(self) -> None:
        """Closes the connection, if there is one, and returns when its socket is closed."""
        connected = self._protocol is not None
        self.close()  # sends what is due, and a TLS farewell
        if connected and self._link_protocol is not None:
            self._link_protocol.transport.abort()  # does not wait for the peer's
            await self._link_protocol.closed.wait()


class _LinkProtocol(H2Protocol):
    """Tells its link about the loss, at once and with the reason; grpclib only notices at the next call."""

    transport: asyncio.Transport

    def __init__(self, link: Link, config: Configuration, h2_config: H2Configuration) -> None:
        super().__init__(Handler(), config, h2_config)
        self.link = link
        self.closed = asyncio.Event()
        self._allowed_bytes = TokenBucket(_RECEIVED_BYTES_PER_S, _RECEIVED_BURST_BYTES, time.monotonic())
        self._sends_too_much = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport = cast(asyncio.Transport, transport)
        self.processor = _LinkProcessor(self, self.connection)
        sock = transport.get_extra_info("socket")
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            interval_s = max(1, round(self.link.endpoint.keepalive_s))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, interval_s)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval_s)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _TCP_KEEPALIVE_PROBES)

    def data_received(self, data: bytes) -> None:
        if self._allowed_bytes.take(time.monotonic(), len(data)):
            super().data_received(data)
            return
        self._sends_too_much = True
        self.transport.abort()  # of which connection_lost tells

    def connection_lost(self, exc: BaseException | None) -> None:
        # grpclib's timer for the answer to a PING closes the transport without a word.
        timer = self.connection._close_by_ping_handler
        if timer is not None and timer.when() <= asyncio.get_running_loop().time():
            reason = "no answer to a keepalive PING"
        elif self._sends_too_much:
            reason = _TOO_MUCH
        else:
            reason = "closed by the scheduler" if exc is None else describe(exc)
        self.processor.close(reason)
        self.closed.set()


class _LinkProcessor(EventsProcessor):
    def __init__(self, protocol: _LinkProtocol, connection: Connection) -> None:
        super().__init__(protocol.handler, connection)
        self._protocol = protocol

    def process(self, event: Event) -> None:
        try:
            super().process(event)
        except NotImplementedError:
            return  # frames that HTTP/2 does not know of are ignored (RFC 9113, 5.5)

    def process_connection_terminated(self, event: ConnectionTerminated) -> None:
        self._protocol.link.pings_refused = event.error_code == ErrorCodes.ENHANCE_YOUR_CALM
        super().process_connection_terminated(event)

    def close(self, reason: str = "Connection closed") -> None:
        """Where every loss comes by: GOAWAY, a protocol error, the transport's."""
        super().close(reason)
        self._protocol.link.lose(self._protocol, reason)


class Resolver:
    """Looks a name up on a thread of its own, one at a time.

    On asyncio's executor a resolver that hangs would delay the end of the process, which waits for its
    threads, and one retry after the other would take a thread from those who read files there.
    """

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._lookup: asyncio.Future[list[str] | OSError | UnicodeError] | None = None

    async def addresses(self) -> list[str]:
        """Raises OSError (socket.gaierror), or UnicodeError for a name that cannot be one."""
        try:
            return [str(ipaddress.ip_address(self._host))]
        except ValueError:
            pass  # a name
        lookup = self._lookup
        if lookup is None:
            try:
                lookup = self._lookup = run_apart(self._look_up, "scheduler-dns")
            except RuntimeError as error:
                raise OSError(errno.EAGAIN, "no thread is to be had to look the name up") from error
        await asyncio.wait((lookup,))
        answer = lookup.result()
        self._lookup = None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _look_up(self) -> list[str] | OSError | UnicodeError:
        """An error is returned, not raised: nobody may be there any more to take note of it."""
        try:
            infos = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            return error
        return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in infos))


def describe(error: BaseException) -> str:
    if isinstance(error, GRPCError):
        return f"{error.status.name}: {error.message}" if error.message else error.status.name
    if isinstance(error, OSError) and error.errno and not isinstance(error, socket.gaierror | ssl.SSLError):
        return os.strerror(error.errno)  # asyncio's own text says "Connect call failed", not why
    if isinstance(error, FORESEEN):
        return str(error) or type(error).__name__
    return f"{type(error).__name__}: {error}"  # not made for people: the type says more
