"""Listens, watches over the connections, and leaves: no new calls, running ones finish, every client is told."""

from __future__ import annotations

import asyncio
import math
import resource
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from grpclib.server import Server

from worker_svc.config import Address, TransportConfig
from worker_svc.server.admission import Admission, Place
from worker_svc.server.connection import READ_BYTES, ServerConnection, Shared
from worker_svc.server.listener import Listener
from worker_svc.server.rates import ReceiveBudget, RequestRates
from worker_svc.server.sending import SendBudget
from worker_svc.server.sockets import open_sockets
from worker_svc.server.turns import Turns
from worker_svc.wire.codec import MessageCodec

if TYPE_CHECKING:
    from grpclib._typing import IServable

    class Drainable(IServable, Protocol):
        async def drain(self, grace_s: float) -> None:
            """Lets running calls finish for so long, then tells them to come back."""


_SWEEP_S: Final = 1.0
# Calls that were told to end have as long to say so, and connections to be gone.
_LAST_WORDS_S: Final = 1.0
_GONE_S: Final = 2.0

Identify = Callable[[asyncio.BaseTransport, str], str]
"""Whose requests are counted together: from a connection, and the peer's address or "uid:N"."""


class GrpcServer(Server):
    def __init__(
        self,
        service: Drainable,
        limits: TransportConfig | None = None,
        *,
        others: Sequence[IServable] = (),
        identify: Identify | None = None,
        expiry_s: Callable[[ssl.SSLObject], float] = lambda connection: math.inf,
        on_refused: Callable[[str, str], None] = lambda peer, reason: None,
    ) -> None:
        """`expiry_s`: when, by the wall clock, a connection takes no more new calls. `on_refused`: as of Listener."""
        super().__init__([service, *others], codec=MessageCodec())
        self._service = service
        self._on_refused = on_refused
        limits = limits or TransportConfig()
        self._limits = limits
        self._shared = Shared(
            limits=limits,
            mapping=self._mapping,
            codec=self._codec,
            rates=RequestRates(limits.requests_per_s, limits.requests_burst),
            receiving=ReceiveBudget(limits.max_receiving_bytes),
            sending=SendBudget(limits.max_sending_bytes),
            turns=Turns(),
            expiry_s=expiry_s,
            identify=identify or (lambda transport, peer: peer),
            read_buffer=memoryview(bytearray(READ_BYTES)),
        )
        self._admission = Admission(self._most_connections, limits.max_connections_per_peer)
        self._connections: set[ServerConnection] = set()
        self._listener: Listener | None = None
        self._sweeping: asyncio.TimerHandle | None = None
        self._all_gone = asyncio.Event()
        self._unix_path = ""
        self._accepts: Callable[[ssl.SSLObject], bool] = lambda connection: True

    @property
    def connections(self) -> int:
        return len(self._connections)

    async def listen(self, address: Address, context: ssl.SSLContext | None) -> Address:
        """As `serve`, on sockets of its own. Raises OSError."""
        return self.serve(address, await open_sockets(address), context)

    def serve(self, address: Address, sockets: list[socket.socket], context: ssl.SSLContext | None) -> Address:
        """Takes over the sockets, which are of `open_sockets`. Returns the address, with the real port."""
        port = 0 if address.is_unix else sockets[0].getsockname()[1]
        taken = list(sockets)
        sockets.clear()
        self._listener = Listener(
            taken,
            context,
            self._admission,
            self._shared.turns,
            self._make_connection,
            self._limits.connect_timeout_s,
            self._on_refused,
        )
        self._listener.start()
        if address.is_unix:
            self._unix_path = address.unix_path
            return address
        return Address(host=address.host, port=port)

    def use_context(self, context: ssl.SSLContext | None, accepts: Callable[[ssl.SSLObject], bool]) -> int:
        """For connections from now on. Those that are open live on if `accepts` says so; else they take no new calls,
        and end when those that run have. Returns how many these are."""
        if self._listener is not None:
            self._listener.context = context
        self._accepts = accepts
        return sum(self._turn_away(connection) for connection in list(self._connections))

    def _turn_away(self, connection: ServerConnection) -> bool:
        """Whether it is one that is not let in any more."""
        tls = connection.tls
        if connection.is_leaving or tls is None or self._accepts(tls):
            return False
        connection.leave()
        return True

    async def leave(self, grace_s: float) -> None:
        """Lets running calls finish for `grace_s`, tells every client, and closes."""
        assert self._listener is not None
        self._listener.close()
        for connection in list(self._connections):
            connection.leave()
        await self._service.drain(grace_s)
        # What other services have running, such as a watch of the health, is for nothing now.
        for connection in list(self._connections):
            connection.end_calls()
        await self._wait_gone(_LAST_WORDS_S)
        self.close()
        await self._wait_gone(_GONE_S)
        for connection in list(self._connections):
            connection.abort()
        await asyncio.sleep(0)  # for the connections that were aborted to be lost
        if self._unix_path:
            Path(self._unix_path).unlink(missing_ok=True)

    def close(self) -> None:
        """Ends all connections, with a GOAWAY, and the calls that run. They are gone a moment later."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for connection in list(self._connections):
            connection.say_goodbye()

    async def wait_closed(self) -> None:
        await self._wait_gone(None)

    async def _wait_gone(self, timeout_s: float | None) -> None:
        if not self._connections:
            return
        self._all_gone.clear()
        try:
            async with asyncio.timeout(timeout_s):
                await self._all_gone.wait()
        except TimeoutError:
            return

    def _make_connection(self, place: Place) -> ServerConnection:
        return ServerConnection(self._shared, place, self._on_made, self._on_lost)

    def _on_made(self, connection: ServerConnection) -> None:
        self._connections.add(connection)
        if self._listener is None:
            connection.say_goodbye()  # its handshake ended after we had closed
        self._turn_away(connection)  # if it began before the certificates were read again
        if self._sweeping is None:
            self._sweeping = asyncio.get_running_loop().call_later(_SWEEP_S, self._sweep)

    def _on_lost(self, connection: ServerConnection) -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._all_gone.set()

    def _sweep(self) -> None:
        """Looks for what has been quiet for too long: one timer for all connections, none when there are none."""
        now_s = time.monotonic()
        for connection in list(self._connections):
            connection.sweep(now_s)
        self._shared.rates.forget_quiet(now_s)
        self._shared.turns.forget_quiet(now_s)
        for peer in [peer for peer, until_s in self._shared.probation.items() if until_s < now_s]:
            del self._shared.probation[peer]
        self._sweeping = None
        if self._connections:
            self._sweeping = asyncio.get_running_loop().call_later(_SWEEP_S, self._sweep)

    def _most_connections(self) -> int:
        """As configured, but leaving files for output, the store and the supervisor."""
        return min(self._limits.max_connections, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
