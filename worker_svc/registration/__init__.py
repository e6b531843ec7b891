"""Registers the worker with its scheduler, again and again until it is there, and again when it was gone.

The connection that the registration was made over is kept open, idle: its loss is the news that the scheduler
restarted or went away. Nothing here ticks; a silent network is found out by HTTP/2 PINGs and TCP keepalive.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from ssl import SSLContext
from typing import Any, Final, Protocol, TypeVar

from worker_svc.pb.jobscheduler import DeregisterReq, RegisterReq, SchedulerStub
from worker_svc.registration.connection import FORESEEN, Endpoint, Link, RegistrationRefused, describe

__all__ = ["Registration"]

T = TypeVar("T")

_WARN_EVERY_S: Final = 60.0


class Logger(Protocol):
    """What is needed of a structlog logger."""

    def debug(self, event: str, **fields: Any) -> Any: ...
    def info(self, event: str, **fields: Any) -> Any: ...
    def warning(self, event: str, **fields: Any) -> Any: ...


class Registration:
    """Keeps this worker registered with one scheduler: `run()` in a task, `deregister()` on the way out.

    A lost connection ends the registration, and the next one is made from scratch: the id that was lost is
    not given back, for a scheduler that restarted may have given it to another worker.
    """

    def __init__(
        self,
        advertise_address: str,
        log: Logger,
        *,
        host: str = "",
        port: int = 0,
        unix_path: str | None = None,
        ssl_context: SSLContext | None = None,
        server_name: str = "",
        register_timeout_s: float = 5.0,
        backoff_initial_s: float = 0.2,
        backoff_max_s: float = 30.0,
        keepalive_s: float = 10.0,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        """The scheduler is at `host` and `port`, or at `unix_path`.

        `ssl_context` must offer "h2" by ALPN; its peer's name is checked against `server_name`, by default
        `host`. An attempt, from name look-up to answer, takes at most `register_timeout_s`. The delay after
        the n-th failure in a row (from 0) is `uniform(0, min(backoff_max_s, backoff_initial_s * 2**n))`. A
        PING is sent every `keepalive_s`; the connection is lost when there is no answer to it in
        `register_timeout_s`.

        Raises ValueError if there is nowhere to connect to, or no name to check a peer on a unix socket
        against.
        """
        if bool(host) == bool(unix_path):
            raise ValueError("give the scheduler's host and port, or its unix_path")
        if ssl_context is not None and not (server_name or host):
            raise ValueError("server_name is needed for TLS over a unix socket")
        self._advertise_address = advertise_address
        self._endpoint = Endpoint(
            host=host,
            port=port,
            unix_path=unix_path or None,
            ssl_context=ssl_context,
            server_name=(server_name or host) if ssl_context is not None else None,
            timeout_s=register_timeout_s,
            keepalive_s=keepalive_s,
        )
        self._target = str(self._endpoint)
        self._log = log
        self._register_timeout_s = register_timeout_s
        self._backoff_initial_s = backoff_initial_s
        self._backoff_max_s = backoff_max_s
        self._uniform = uniform

        self._running = False
        self._leaving = False  # deregister() was called: no registration from here on
        self._wake = asyncio.Event()  # the link was lost, or we are leaving
        self._pings_allowed = True
        self._attempt: asyncio.Task[Link] | None = None
        self._link: Link | None = None
        self._worker_id = ""
        self._lost_worker_id = ""  # of the registration that this outage ended
        self._registered_at_s = 0.0  # the loop's time, of the latest registration
        self._warned_at_s: float | None = None  # the same, in this outage

    @property
    def scheduler_worker_id(self) -> str:
        """The id the scheduler gave; empty: not registered."""
        return self._worker_id

    @property
    def registered(self) -> bool:
        return bool(self._worker_id)

    def use_context(self, ssl_context: SSLContext | None) -> None:
        """For connections to come; the one that is there lives on."""
        self._endpoint = replace(self._endpoint, ssl_context=ssl_context)

    async def run(self) -> None:
        """Registers, and again after every loss of the connection, until cancelled.

        Cancelled without deregister(), the connection is closed and the id kept: the scheduler still counts
        on us, and a later deregister() tells it over a connection of its own.

        Raises RuntimeError if it runs already; whatever the scheduler does is logged and tried again.
        """
        if self._running:
            raise RuntimeError("this registration runs already")
        self._running = True
        try:
            await self._keep_registered()
            await asyncio.get_running_loop().create_future()  # we have left: nothing to do until cancelled
        finally:
            self._running = False
            if not self._leaving:  # otherwise deregister() may be using the link, and drops it
                await self._drop_link()

    async def deregister(self, timeout_s: float) -> None:
        """Gives the registration back, in at most `timeout_s`, and makes no other.

        An attempt to register that the scheduler has before it is waited for, so that its id can be given
        back. Raises nothing of the scheduler's making: a failure is logged.
        """
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        self._leaving = True
        self._wake.set()
        try:
            await self._settle_attempt(timeout_s)
            worker_id, self._worker_id = self._worker_id, ""
            lost_worker_id, self._lost_worker_id = self._lost_worker_id, ""
            if worker_id:
                await self._give_back(worker_id, deadline_s - loop.time())
            elif lost_worker_id:
                self._log_deregister_failed(lost_worker_id, "the connection to the scheduler was lost before")
        finally:
            await self._drop_link()

    # The steps of run().

    async def _keep_registered(self) -> None:
        attempt = 0  # in this outage
        short_lived = 0  # registrations in a row that did not last: they add to the backoff, or we would flap
        while not self._leaving:
            attempt += 1
            try:
                link = await self._try_to_register(attempt)
            except Exception as error:  # what a peer can make grpclib raise has no common base
                await self._drop_link()
                if not self._leaving:
                    delay_s = self._backoff_s(attempt - 1 + short_lived)
                    self._log_unreachable(error, attempt, delay_s)
                    await self._pause(delay_s)
                continue

            if not await self._until_lost(link):
                return
            await self._drop_link()
            attempt = 0
            short_lived = 0 if self._lasted_s() > self._backoff_max_s else short_lived + 1
            # A scheduler that restarts loses all its workers at once: the jitter spreads their return.
            await self._pause(self._backoff_s(max(0, short_lived - 1)))

    async def _try_to_register(self, attempt: int) -> Link:
        self._attempt = asyncio.create_task(self._register(attempt), name="scheduler-register")
        try:
            return await _outcome(self._attempt, self._register_timeout_s)
        finally:
            self._attempt = None

    async def _register(self, attempt: int) -> Link:
        """Sets `_link` and `_worker_id` as soon as known: who awaits this may be cancelled meanwhile."""
        link = await self._open_link()
        reply = await SchedulerStub(link).register_worker(RegisterReq(address=self._advertise_address))
        worker_id: object = reply.worker_id  # betterproto may have put there what is no string
        if not isinstance(worker_id, str) or not worker_id:
            raise RegistrationRefused(f"the answer has no worker id (success: {reply.success})")
        self._worker_id = worker_id
        self._lost_worker_id = ""
        self._registered_at_s = asyncio.get_running_loop().time()
        self._warned_at_s = None
        self._log.info(
            "scheduler.registered",
            scheduler_worker_id=worker_id,
            address=self._advertise_address,
            scheduler=self._target,
            attempt=attempt,
        )
        if link.lost_reason is not None:
            self._on_lost(link)
        return link

    async def _until_lost(self, link: Link) -> bool:
        """Returns when the connection is lost; False: because we leave."""
        while link.lost_reason is None and not self._leaving:
            self._wake.clear()
            await self._wake.wait()
        return not self._leaving

    async def _pause(self, delay_s: float) -> None:
        """Waits `delay_s`, or until we leave."""
        try:
            async with asyncio.timeout(delay_s):
                while not self._leaving:
                    self._wake.clear()
                    await self._wake.wait()
        except TimeoutError:
            return

    def _backoff_s(self, failures: int) -> float:
        ceiling_s = min(self._backoff_max_s, self._backoff_initial_s * 2.0 ** min(failures, 60))
        return self._uniform(0.0, ceiling_s)

    def _lasted_s(self) -> float:
        return asyncio.get_running_loop().time() - self._registered_at_s

    # The steps of deregister().

    async def _settle_attempt(self, timeout_s: float) -> None:
        attempt = self._attempt
        if attempt is None:
            return
        if self._link is not None and self._link.connected:
            await asyncio.wait((attempt,), timeout=max(0.0, timeout_s))
        if not attempt.done():
            attempt.cancel()
            await asyncio.wait((attempt,))

    async def _give_back(self, worker_id: str, timeout_s: float) -> None:
        call = asyncio.create_task(self._call_deregister(worker_id), name="scheduler-deregister")
        try:
            await _outcome(call, timeout_s)
        except Exception as error:  # as for registering
            self._log_deregister_failed(worker_id, describe(error))
        else:
            self._log.info("scheduler.deregistered", scheduler_worker_id=worker_id, scheduler=self._target)

    async def _call_deregister(self, worker_id: str) -> None:
        link = self._link or await self._open_link()
        await SchedulerStub(link).deregister_worker(DeregisterReq(worker_id=worker_id))

    # The connection.

    async def _open_link(self) -> Link:
        self._link = link = Link(self._endpoint, self._pings_allowed, self._on_lost)
        await link.__connect__()
        return link

    async def _drop_link(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            await link.drop()

    def _on_lost(self, link: Link) -> None:
        """Called by the connection, at once, while it is being lost."""
        if link.pings_refused and self._pings_allowed:
            # As gRPC servers do by default (grpc-go: more than one PING in 2 h while idle). From here on TCP
            # keepalive alone looks after the connection, or each one would end like this.
            self._pings_allowed = False
            self._log.info("scheduler.keepalive_refused", scheduler=self._target)
        if link is self._link:
            if self._worker_id:
                self._lost_worker_id, self._worker_id = self._worker_id, ""
                self._log.warning(
                    "scheduler.lost",
                    scheduler_worker_id=self._lost_worker_id,
                    scheduler=self._target,
                    reason=link.lost_reason,
                    lasted_s=round(self._lasted_s(), 3),
                )
            self._wake.set()

    # Log lines.

    def _log_unreachable(self, error: Exception, attempt: int, delay_s: float) -> None:
        now_s = asyncio.get_running_loop().time()
        unforeseen = {} if isinstance(error, FORESEEN) else {"exc_info": error}
        write = self._log.debug
        if self._warned_at_s is None or now_s - self._warned_at_s >= _WARN_EVERY_S:
            self._warned_at_s = now_s
            write = self._log.warning
        told: dict[str, Any] = {"reason": describe(error), "attempt": attempt, "retry_in_s": round(delay_s, 3)}
        write("scheduler.unreachable", scheduler=self._target, **told, **unforeseen)

    def _log_deregister_failed(self, worker_id: str, reason: str) -> None:
        told = {"scheduler_worker_id": worker_id, "scheduler": self._target, "reason": reason}
        self._log.warning("scheduler.deregister_failed", **told)


async def _outcome(task: asyncio.Task[T], timeout_s: float) -> T:
    """The task's result, or what it raised, or TimeoutError: in any case the task ends with this call.

    grpclib calls run in tasks of their own: it ends a call by cancelling the task that awaits it, and when
    that coincides with a true cancellation, the latter is lost; nor does it ever uncancel().
    """
    try:
        await asyncio.wait((task,), timeout=max(0.0, timeout_s))
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))
    if task.cancelled():
        raise TimeoutError(f"no answer in {timeout_s:.3g} s")
    return task.result()
