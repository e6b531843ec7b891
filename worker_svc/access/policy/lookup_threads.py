"""Looks at files in threads, since a dead file system keeps whoever looks for ever: its victims must not be others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, TypeVar

from worker_svc.job import Unavailable
from worker_svc.linux.threads import run_apart

T = TypeVar("T")

_PATIENCE_S: Final = 10.0


class _Caller:
    """What one identity has under way."""

    def __init__(self, most: int) -> None:
        self.free = asyncio.Semaphore(most)
        self.hanging: list[_Lookup] = []
        """Those past their patience, the oldest first."""
        self.holders = 0
        """Calls and threads."""


class _Lookup:
    def __init__(self, identity: str, caller: _Caller, named: str) -> None:
        self.identity = identity
        self.caller = caller
        self.named = named
        """What is looked at, for whoever asks what hangs."""
        self.patience: asyncio.TimerHandle | None = None


class LookupThreads:
    """A thread each, which nobody waits for at the end of the process.

    So many at once for all, and a few for each identity. One that hangs makes room for others, but not for others of
    the same identity, until there are as many threads as there may ever be.
    """

    def __init__(
        self, at_once: int = 32, of_each: int = 4, threads: int = 256, patience_s: float = _PATIENCE_S
    ) -> None:
        self._free = asyncio.Semaphore(at_once)
        self._of_each = of_each
        self._threads_left = threads
        self._patience_s = patience_s
        self._callers: dict[str, _Caller] = {}

    async def run(self, identity: str, named: str, look: Callable[[], T]) -> T:
        """Raises Unavailable, with the cause, when there is no room for it or it takes too long."""
        caller = self._enter(identity)
        waits_for: asyncio.Semaphore | None = caller.free
        try:
            if len(caller.hanging) >= self._of_each:
                raise _they_hang(caller)
            async with asyncio.timeout(self._patience_s):
                await caller.free.acquire()
                waits_for = self._free
                try:
                    await self._free.acquire()
                except asyncio.CancelledError:
                    caller.free.release()
                    raise
                waits_for = None
                return await self._start(_Lookup(identity, caller, named), look)
        except TimeoutError:
            if waits_for is None:
                text = (
                    f"the file system has not answered for {self._patience_s:g} s about {named}, its script or its cwd"
                )
                raise Unavailable(f"command: {text}: try again when it does") from None
            raise _they_hang(caller) if waits_for is caller.free else _no_room() from None
        finally:
            self._leave(identity, caller)

    def _enter(self, identity: str) -> _Caller:
        caller = self._callers.get(identity)
        if caller is None:
            caller = self._callers[identity] = _Caller(self._of_each)
        caller.holders += 1
        return caller

    def _leave(self, identity: str, caller: _Caller) -> None:
        caller.holders -= 1
        if not caller.holders:
            del self._callers[identity]

    def _start(self, lookup: _Lookup, look: Callable[[], T]) -> asyncio.Future[T]:
        self._begin(lookup)
        try:
            if self._threads_left < 0:
                raise RuntimeError
            looking = run_apart(look, "policy")
        except RuntimeError:  # there are as many as there may be, by us or by the system
            self._end(lookup)
            raise _no_room() from None
        looking.add_done_callback(lambda _: self._end(lookup))
        return asyncio.shield(looking)  # which goes on when nobody waits for it any more

    def _begin(self, lookup: _Lookup) -> None:
        self._threads_left -= 1
        lookup.caller.holders += 1
        lookup.patience = asyncio.get_running_loop().call_later(self._patience_s, self._give_up, lookup)

    def _give_up(self, lookup: _Lookup) -> None:
        lookup.patience = None
        lookup.caller.hanging.append(lookup)
        self._free.release()

    def _end(self, lookup: _Lookup) -> None:
        self._threads_left += 1
        if lookup.patience is None:
            lookup.caller.hanging.remove(lookup)
        else:
            lookup.patience.cancel()
            self._free.release()
        lookup.caller.free.release()
        self._leave(lookup.identity, lookup.caller)


def _they_hang(caller: _Caller) -> Unavailable:
    which = f", such as that of {caller.hanging[0].named}" if caller.hanging else ""
    text = f"while earlier starts of yours wait for a file system that does not answer{which}"
    return Unavailable(f"command: cannot be looked at {text}")


def _no_room() -> Unavailable:
    return Unavailable("command: cannot be looked at now: too many look-ups of others are under way: try again")
