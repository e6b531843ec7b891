"""A scheduler, as workers see one: a real grpclib server that records who registers and deregisters."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from ssl import SSLContext
from types import TracebackType

from grpclib.const import Status
from grpclib.exceptions import GRPCError
from grpclib.protocol import H2Protocol
from grpclib.server import Server

from tests.support.waiting import PATIENCE_S
from worker_svc.pb.jobscheduler import (
    DeregisterReq,
    DeregisterRes,
    RegisterReq,
    RegisterRes,
    SchedulerBase,
)


@dataclass(frozen=True)
class RegisterCall:
    address: str
    worker_id: str  # as answered; empty: it was not registered
    at_s: float  # time.monotonic()


@dataclass(frozen=True)
class DeregisterCall:
    worker_id: str
    at_s: float


class FakeScheduler(SchedulerBase):
    """`async with FakeScheduler() as scheduler` serves at `scheduler.host`, `scheduler.port`.

    The port is held from construction to close(), also while the scheduler is stopped: what connects is
    refused then, nobody else is given the port, and no retrying client can end up connected to itself.
    Like original schedulers it leaves `success` unset.
    """

    host = "127.0.0.1"

    def __init__(self, port: int = 0, ssl_context: SSLContext | None = None) -> None:
        self._ssl_context = ssl_context
        self._reservation = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reservation.bind((self.host, port))
        self.port: int = self._reservation.getsockname()[1]
        self.starts = 0
        self.register_calls: list[RegisterCall] = []
        self.deregister_calls: list[DeregisterCall] = []
        self.open_connections = 0
        self.hanging = 0  # calls that hang now
        self.server: _Server | None = None
        self._ids_given = 0
        self._to_fail: list[Status] = []
        self._to_leave_unnamed = 0
        self._to_hang = 0
        self._release = asyncio.Event()
        self._changed = asyncio.Event()

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def registered(self) -> list[RegisterCall]:
        """The register calls that were answered with a worker id."""
        return [call for call in self.register_calls if call.worker_id]

    async def start(self) -> None:
        assert self.server is None, "started already"
        server = _Server(self)
        await server.start(self.host, self.port, ssl=self._ssl_context)
        self.server = server
        self.starts += 1

    async def stop(self) -> None:
        """As by a crash: connections are dropped, calls get no answer. What connects then is refused."""
        server, self.server = self.server, None
        if server is None:
            return
        server.close()
        server.drop_connections()
        await server.wait_closed()
        await self.wait_for(lambda: self.open_connections == 0)

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    async def close(self) -> None:
        await self.stop()
        self._reservation.close()

    def drop_connections(self) -> None:
        """Drops them all, and serves on."""
        assert self.server is not None, "not started"
        self.server.drop_connections()

    async def __aenter__(self) -> FakeScheduler:
        await self.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    # What the next calls, of either kind, come to; in this order if several are set.

    def fail_next(self, calls: int = 1, status: Status = Status.UNAVAILABLE) -> None:
        self._to_fail += [status] * calls

    def leave_unnamed_next(self, calls: int = 1) -> None:
        """Answers without a worker id."""
        self._to_leave_unnamed += calls

    def hang_next(self, calls: int = 1) -> None:
        """They get no answer until release()."""
        self._to_hang += calls

    def release(self) -> None:
        """Calls that hang now go on."""
        self._release.set()
        self._release = asyncio.Event()

    async def wait_for(self, condition: Callable[[], object], timeout_s: float = PATIENCE_S, message: str = "") -> None:
        """Looks again whenever a call came in or a connection came or went. Raises AssertionError."""
        try:
            async with asyncio.timeout(timeout_s):
                while not condition():
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(
                f"{message or 'condition not met'} (after {timeout_s:g} s; "
                f"register calls: {self.register_calls}, deregister calls: {self.deregister_calls}, "
                f"open connections: {self.open_connections})"
            ) from None

    # The service.

    async def register_worker(self, register_req: RegisterReq) -> RegisterRes:
        worker_id = ""
        try:
            await self._misbehave()
            if self._to_leave_unnamed:
                self._to_leave_unnamed -= 1
            else:
                self._ids_given += 1
                worker_id = f"worker-{self.starts}.{self._ids_given}"
            return RegisterRes(worker_id=worker_id)
        finally:
            self.register_calls.append(RegisterCall(register_req.address, worker_id, time.monotonic()))
            self.changed()

    async def deregister_worker(self, deregister_req: DeregisterReq) -> DeregisterRes:
        self.deregister_calls.append(DeregisterCall(deregister_req.worker_id, time.monotonic()))
        self.changed()
        await self._misbehave()
        return DeregisterRes()

    async def _misbehave(self) -> None:
        if self._to_fail:
            raise GRPCError(self._to_fail.pop(0), "told to fail")
        if self._to_hang:
            self._to_hang -= 1
            self.hanging += 1
            self.changed()
            try:
                await self._release.wait()
            finally:
                self.hanging -= 1

    def changed(self) -> None:
        # A new event each time, not an asyncio.Condition: connections end in callbacks, which take no lock.
        self._changed.set()
        self._changed = asyncio.Event()


class _Server(Server):
    def __init__(self, scheduler: FakeScheduler) -> None:
        super().__init__([scheduler])
        self._scheduler = scheduler
        self.protocols: set[_Protocol] = set()

    def _protocol_factory(self) -> H2Protocol:
        protocol = super()._protocol_factory()
        return _Protocol(protocol, self, self._scheduler)

    def drop_connections(self) -> None:
        for protocol in self.protocols:
            protocol.transport.abort()


class _Protocol(H2Protocol):
    transport: asyncio.Transport

    def __init__(self, plain: H2Protocol, server: _Server, scheduler: FakeScheduler) -> None:
        super().__init__(plain.handler, plain.config, plain.h2_config)
        self._server = server
        self._scheduler = scheduler

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        super().connection_made(transport)
        self._server.protocols.add(self)
        self._scheduler.open_connections += 1
        self._scheduler.changed()

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self._server.protocols.discard(self)
        self._scheduler.open_connections -= 1
        self._scheduler.changed()
