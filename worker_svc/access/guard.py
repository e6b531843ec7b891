"""The one way into the service: who calls, whether its role may, and whether the job is its own; then the handler.

Every RPC of the contract comes by here, those too that are yet to be written: what `roles.RPCS` does not name is
refused to all.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Final, NamedTuple, TypeVar, cast

import grpclib.const
import grpclib.server
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from worker_svc.access.policy import Decision
from worker_svc.access.roles import RPCS, UNKNOWN_RPC, Caller, Doorkeeper, Role, Rpc, Scope, Verdict
from worker_svc.feed import unreadable
from worker_svc.job import (
    JobError,
    JobNotFound,
    JobRecord,
    JobSpec,
    PermissionDenied,
    Unavailable,
    check_job_id,
    is_job_id,
    name_of,
)
from worker_svc.masking import Masker
from worker_svc.output import Room
from worker_svc.pb import jobscheduler as pb
from worker_svc.printable import printable
from worker_svc.record.schema import StoreError
from worker_svc.telemetry import Audit
from worker_svc.wire import statuses
from worker_svc.wire.statuses import DRAINING

_HIDDEN_KEYS: Final = "access.secret_keys"
_OWN_JOBS_ONLY: Final = "own jobs only"
# What stands in the log for a job id that is none: that can be whatever a caller writes.
_MALFORMED_ID: Final = "(malformed)"
_TROUBLE_TOLD_S: Final = 10.0
# A start by the policy, the requests of many one by one.
_DECIDED_LATER: Final = (Scope.START, Scope.MANY)

_T = TypeVar("_T")

log = logging.getLogger(__name__)


class Gate(NamedTuple):
    """What decides who gets in, and what is told of it."""

    doorkeeper: Doorkeeper
    masker: Masker
    audit: Audit


class Call:
    """One call under way: who makes it, and how far it may reach."""

    __slots__ = ("_decision", "_gate", "_job_id", "caller", "name", "room", "rpc")

    def __init__(self, name: str, rpc: Rpc, caller: Caller, gate: Gate, room: Room) -> None:
        self.name = name
        self.room = room
        """For answers: what may be large waits for it."""
        self.rpc = rpc
        self.caller = caller
        self._gate = gate
        self._decision = ""
        self._job_id = ""
        """The job that the call is about, as far as is known."""

    @property
    def verdict(self) -> Verdict:
        return self.rpc.verdict(self.caller.role)

    @property
    def owner(self) -> str | None:
        """Whose jobs alone there are for this call; None: all."""
        return self.caller.identity if self.verdict is Verdict.OWN else None

    @property
    def role_label(self) -> str:
        return self.caller.role_label

    def sees_all_of(self, owner: str) -> bool:
        """Whether it may see all of the owner's jobs. A viewer has no jobs: who else was `anonymous` when a job was
        started is somebody else."""
        role = self.caller.role
        return role is Role.ADMIN or (role is not Role.VIEWER and owner == self.caller.identity)

    def shown(self, record: JobRecord) -> JobRecord:
        """The record as this caller may see it."""
        return record if self.sees_all_of(record.owner) else self._gate.masker.record(record)

    def shown_reason(self, reason: str, owner: str) -> str:
        return reason if not reason or self.sees_all_of(owner) else self.masked(reason)

    def masked(self, text: str) -> str:
        """A text of ours that quotes others, as it may be shown."""
        return printable(self._gate.masker.text(text))

    def check_filter(self, labels: Mapping[str, str]) -> None:
        """Raises PermissionDenied for what could only confirm guesses: who cannot see a value cannot look for it in
        others' jobs either."""
        if self.owner is not None or self.caller.role is Role.ADMIN:
            return
        shown = self._gate.masker.table(labels)
        for key, value in labels.items():
            if shown[key] != value:
                self.deny("", _HIDDEN_KEYS)
                raise PermissionDenied(
                    f"labels: only an admin may look for {name_of(key)!r}, which is secret ({_HIDDEN_KEYS})"
                )

    def is_about(self, job_id: str) -> None:
        self._job_id = job_id if not job_id or is_job_id(job_id) else _MALFORMED_ID

    def told(self, spec: JobSpec) -> dict[str, Any]:
        """What the audit says of a job that is to be started."""
        return self._gate.masker.told(spec)

    async def allow(self, job_id: str, rule: str, **more: Any) -> None:
        """Before it takes effect. Raises Unavailable if that cannot be logged."""
        self.is_about(job_id)
        self._decision = "allowed"
        await self._gate.audit.allowed_first(makes_room=self.rpc.makes_room, **self._facts(), rule=rule, **more)

    def deny(self, job_id: str, rule: str, **more: Any) -> None:
        self.is_about(job_id)
        self._decision = "denied"
        audit = self._gate.audit
        write = audit.not_allowed if self.caller.role else audit.stranger
        write(decision="denied", **self._facts(), rule=rule, **more)

    def fail(self, status: str) -> None:
        """It ended so, before anything was decided or after it was allowed."""
        if self.rpc.mutates and self._decision != "denied":
            self._gate.audit.not_allowed(decision="failed", **self._facts(), rule=status)

    def _facts(self) -> dict[str, str]:
        caller = self.caller
        return {
            "identity": caller.identity,
            "role": caller.role_label,
            "peer": caller.peer,
            "rpc": self.name,
            "job_id": self._job_id,
        }


CALL: Final[ContextVar[Call]] = ContextVar("call")
"""The call that is being handled. There is none, and LookupError, where the guard was not passed."""


class GuardedService(pb.WorkerBase):
    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._calls: set[asyncio.Task[Any]] = set()
        self._lasting: set[asyncio.Task[Any]] = set()
        """The calls that only wait for something to happen: there is no point in letting them finish."""
        self.is_draining = False
        self._trouble_told_s: float = -_TROUBLE_TOLD_S

    def _is_owned(self, job_id: str, owner: str) -> bool:
        """Whether it is there and this owner's. Takes as long where it is not there as where it is somebody else's."""
        raise NotImplementedError

    def _denial_of(self, call: Call, request: Any) -> Decision | None:
        """What the policy has against a request that its role may make."""
        return None

    def __mapping__(self) -> dict[str, grpclib.const.Handler]:
        return {
            path: handler._replace(func=self._guarded(path.rpartition("/")[2], handler))
            for path, handler in super().__mapping__().items()
        }

    def _guarded(
        self, name: str, handler: grpclib.const.Handler
    ) -> Callable[[grpclib.server.Stream[Any, Any]], Coroutine[Any, Any, None]]:
        rpc = RPCS.get(name, UNKNOWN_RPC)
        handle = getattr(self, method_name(name))
        cardinality = handler.cardinality

        async def call(stream: grpclib.server.Stream[Any, Any]) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._calls.add(task)
            caller = self._gate.doorkeeper.caller(stream.peer._transport)
            current = Call(name, rpc, caller, self._gate, cast(Room, stream))  # GrpcServer's
            CALL.set(current)
            try:
                await self._settled(current, self._handle(current, handle, cardinality, stream))
            except asyncio.CancelledError:
                if not self.is_draining or task.uncancel():
                    raise
                current.fail(Status.UNAVAILABLE.name)
                raise GRPCError(Status.UNAVAILABLE, DRAINING) from None
            finally:
                self._calls.discard(task)
                self._lasting.discard(task)

        return call

    async def _settled(self, call: Call, handling: Awaitable[_T]) -> _T:
        """What it comes to. Raises GRPCError: the answer to whatever went wrong."""
        try:
            with self._disk_trouble_told():
                return await handling
        except (JobError, GRPCError) as error:
            answer = statuses.to_grpc(error) if isinstance(error, JobError) else error
            call.fail(answer.status.name)
            await self._gate.audit.settled()
            raise GRPCError(answer.status, call.masked(answer.message or ""), answer.details) from error
        except Exception:  # a fault of ours, which is told where all calls are
            call.fail(Status.INTERNAL.name)
            raise

    async def one_of_many(self, name: str, request: Any) -> Any:
        """Handles one request of a call that holds many, as if it were a call by itself. Raises GRPCError."""
        whole = CALL.get()
        call = Call(name, RPCS[name], whole.caller, self._gate, whole.room)
        token = CALL.set(call)
        try:
            return await self._settled(call, self._handle_one(call, getattr(self, method_name(name)), request))
        finally:
            CALL.reset(token)

    async def _handle_one(self, call: Call, handle: Callable[[Any], Awaitable[Any]], request: Any) -> Any:
        if call.verdict is Verdict.DENIED:
            self._refuse(call)
        await self._check(call, request)
        return await handle(request)

    @contextlib.contextmanager
    def _disk_trouble_told(self) -> Iterator[None]:
        """What the store or another file has against a call may pass; the caller is told what it is, the log now and
        then."""
        try:
            yield
        except (sqlite3.ProgrammingError, sqlite3.InterfaceError, sqlite3.DataError):
            raise  # a fault of ours
        except (sqlite3.Error, StoreError, OSError) as error:
            if isinstance(error, TimeoutError) and error.errno is None:
                raise  # the caller's deadline
            reason = f"the worker cannot do it now: {error}"
            if isinstance(error, sqlite3.Error | StoreError):
                reason = unreadable(error)
            if time.monotonic() - self._trouble_told_s > _TROUBLE_TOLD_S:
                self._trouble_told_s = time.monotonic()
                log.warning("%s: %s", CALL.get().name, reason)
            raise Unavailable(reason) from error

    async def _handle(
        self,
        call: Call,
        handle: Callable[..., Any],
        cardinality: grpclib.const.Cardinality,
        stream: grpclib.server.Stream[Any, Any],
    ) -> None:
        if call.verdict is Verdict.DENIED:  # nothing of theirs is even read
            self._refuse(call)
        if cardinality.client_streaming:
            argument: Any = self._checked_requests(call, stream)
        else:
            argument = await stream.recv_message()
            await self._check(call, argument)
        if not cardinality.server_streaming:
            await stream.send_message(await handle(argument))
            return
        # Closes the generator at once, however the call ends.
        async with contextlib.aclosing(handle(argument)) as replies:
            async for reply in replies:
                await stream.send_message(reply)

    async def _checked_requests(self, call: Call, stream: grpclib.server.Stream[Any, Any]) -> AsyncIterator[Any]:
        async for request in stream:
            await self._check(call, request)
            yield request

    async def _check(self, call: Call, request: Any) -> None:
        """Raises PermissionDenied, InvalidArgument, and JobNotFound for what is somebody else's."""
        job_id = getattr(request, "job_id", "")
        call.is_about(job_id)
        if call.verdict is Verdict.OWN and call.rpc.scope is Scope.JOB:
            check_job_id(job_id)
            if not self._is_owned(job_id, call.caller.identity):
                call.deny(job_id, _OWN_JOBS_ONLY)
                raise JobNotFound
        if call.rpc.mutates and call.rpc.scope not in _DECIDED_LATER:
            denied = self._denial_of(call, request)
            if denied is not None:
                call.deny(job_id, denied.rule)
                raise PermissionDenied(f"{denied.reason} ({denied.rule})")
            more = {"dry_run": True} if getattr(request, "dry_run", False) else {}
            await call.allow(job_id, f"role {call.role_label}: {call.verdict.value}", **more)

    def _refuse(self, call: Call) -> None:
        caller = call.caller
        call.deny("", f"role {caller.role_label}: {call.name} {Verdict.DENIED.value}")
        if caller.role is None:
            raise PermissionDenied(f"{caller.identity} has no role on this worker (its [access] section gives roles)")
        raise PermissionDenied(f"{call.name} is not for role {caller.role_label}, which {caller.identity} has")

    def _lasts(self) -> None:
        """Says that the current call now waits for something that may never happen. Raises Unavailable."""
        if self.is_draining:
            raise Unavailable(DRAINING)
        task = asyncio.current_task()
        if task in self._calls:
            self._lasting.add(task)

    async def drain(self, grace_s: float) -> None:
        """Lets running calls finish for so long; then, and streams at once, they are told to come back."""
        self.is_draining = True
        for task in self._lasting:
            task.cancel()
        if self._calls:
            _, late = await asyncio.wait(self._calls, timeout=grace_s)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=1.0)


def method_name(rpc: str) -> str:
    """`start_job` for `StartJob`, as the generated code has it."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", rpc).lower()
