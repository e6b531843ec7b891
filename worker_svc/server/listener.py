"""Listening sockets, and who is let in: counted before TLS and before anything is set up for a connection.

asyncio's own servers hand out a connection only after its handshake, and from Python 3.12 on wait for all clients to
leave before they are closed.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from functools import partial
from typing import Final

from worker_svc.linux.kinship import peer_credentials
from worker_svc.server.admission import Admission, Place
from worker_svc.server.connection import ServerConnection
from worker_svc.server.turns import Turns

log = logging.getLogger(__name__)

_AT_ONCE: Final = 4
"""Accepted in one turn of the loop."""
# What a connection takes of the loop's time to be set up.
_CONNECT_S: Final = 0.0005
_HANDSHAKE_S: Final = 0.002
# Without a file to be had for a connection, it is no use to try again at once.
_OUT_OF_FILES_S: Final = 0.1


class Listener:
    def __init__(
        self,
        sockets: list[socket.socket],
        context: ssl.SSLContext | None,
        admission: Admission,
        turns: Turns,
        make_connection: Callable[[Place], ServerConnection],
        handshake_timeout_s: float,
        on_refused: Callable[[str, str], None],
    ) -> None:
        """`on_refused` gets peer and reason of each TLS handshake that a client's certificate, or none, made fail."""
        self.sockets = sockets
        self.context = context
        self._admission = admission
        self._turns = turns
        self._make_connection = make_connection
        self._handshake_timeout_s = handshake_timeout_s
        self._on_refused = on_refused
        self._loop = asyncio.get_running_loop()
        self._accepted: set[socket.socket] = set()
        """Those that wait to be connected."""
        self._connecting: set[asyncio.Task[None]] = set()
        self._pauses: set[asyncio.TimerHandle] = set()

    def start(self) -> None:
        for listening in self.sockets:
            self._loop.add_reader(listening.fileno(), self._accept, listening)

    def close(self) -> None:
        for pause in self._pauses:
            pause.cancel()
        while self.sockets:
            listening = self.sockets.pop()
            self._loop.remove_reader(listening.fileno())
            listening.close()
        for task in self._connecting:
            task.cancel()
        for accepted in self._accepted:
            accepted.close()

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(_AT_ONCE):
            try:
                accepted, address = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                log.warning("no connection can be accepted just now: %s", error)
                self._pause(listening)
                return
            peer = peer_of(accepted, address)
            place = self._admission.enter(peer)
            if place is None:
                accepted.close()
                continue
            accepted.setblocking(False)
            self._accepted.add(accepted)
            self._turns.submit(peer, partial(self._begin, accepted, place))

    def _begin(self, accepted: socket.socket, place: Place) -> None:
        self._accepted.discard(accepted)
        if accepted.fileno() < 0:  # closed meanwhile, as the listener was
            place.leave()
            return
        self._turns.charge(place.peer, _CONNECT_S if self.context is None else _HANDSHAKE_S)
        task = self._loop.create_task(self._connect(accepted, place))
        place.drop = task.cancel
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    def _pause(self, listening: socket.socket) -> None:
        self._loop.remove_reader(listening.fileno())

        def go_on() -> None:
            self._pauses.discard(pause)
            self._loop.add_reader(listening.fileno(), self._accept, listening)

        pause = self._loop.call_later(_OUT_OF_FILES_S, go_on)
        self._pauses.add(pause)

    async def _connect(self, accepted: socket.socket, place: Place) -> None:
        connection = self._make_connection(place)
        context = self.context
        timeout_s = None if context is None else self._handshake_timeout_s
        try:
            await self._loop.connect_accepted_socket(
                lambda: connection, accepted, ssl=context, ssl_handshake_timeout=timeout_s
            )
        except ssl.SSLError as error:
            self._on_refused(place.peer, getattr(error, "verify_message", "") or error.reason or str(error))
        except OSError as error:  # gone
            log.debug("handshake with %s failed: %s", place.peer, error)
        finally:
            if not connection.is_made:
                accepted.close()
                place.leave()


def peer_of(accepted: socket.socket, address: object) -> str:
    """Whom a connection counts for: an address (of IPv6 the network), or a user of this machine."""
    if accepted.family == socket.AF_UNIX:
        return f"uid:{peer_credentials(accepted)[1]}"
    assert isinstance(address, tuple)
    host = str(address[0])
    if accepted.family == socket.AF_INET6:
        packed = socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
        if packed[:12] == b"\0" * 10 + b"\xff\xff":
            return socket.inet_ntop(socket.AF_INET, packed[12:])
        # Who has one address of a /64 has all of them.
        return socket.inet_ntop(socket.AF_INET6, packed[:8] + b"\0" * 8) + "/64"
    return host
