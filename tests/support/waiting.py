"""Waits for a condition rather than for a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from inspect import isawaitable
from typing import Final, TypeVar, cast

T = TypeVar("T")

# A machine under load needs more than a quiet one; no passing test waits for as long.
PATIENCE_S: Final = 60.0

# Grows from the first to the last: quick answers come quickly, and slow ones cost no CPU.
_POLL_FIRST_S = 0.001
_POLL_LAST_S = 0.05


async def eventually(condition: Callable[[], T | Awaitable[T]], timeout_s: float = PATIENCE_S, message: str = "") -> T:
    """The first true value of `condition`, which may be a coroutine function.

    Raises AssertionError with `message` and the last value if there is none in `timeout_s`.
    """
    deadline_s = time.monotonic() + timeout_s
    poll_s = _POLL_FIRST_S
    while True:
        last = condition()
        value = cast(T, await last if isawaitable(last) else last)
        if value:
            return value
        if time.monotonic() >= deadline_s:
            raise AssertionError(_failure(timeout_s, message, value))
        await asyncio.sleep(poll_s)
        poll_s = min(poll_s * 1.5, _POLL_LAST_S)


def eventually_sync(condition: Callable[[], T], timeout_s: float = PATIENCE_S, message: str = "") -> T:
    """As eventually(), where no event loop runs. Raises AssertionError."""
    deadline_s = time.monotonic() + timeout_s
    poll_s = _POLL_FIRST_S
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= deadline_s:
            raise AssertionError(_failure(timeout_s, message, value))
        time.sleep(poll_s)
        poll_s = min(poll_s * 1.5, _POLL_LAST_S)


def stays(condition: Callable[[], object], for_s: float = 0.2) -> bool:
    """Whether it is true all the while: for what must not come. Who is right passes however busy the machine is, and
    who is wrong may pass on a very busy one.
    """
    end_s = time.monotonic() + for_s
    while time.monotonic() < end_s:
        if not condition():
            return False
        time.sleep(_POLL_LAST_S / 5)
    return bool(condition())


def next_tick() -> None:
    """Until a process that starts now is younger than any that has started before: start times are in hundredths of a
    second.
    """
    began_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    while time.clock_gettime_ns(time.CLOCK_BOOTTIME) < began_ns + 20_000_000:
        time.sleep(_POLL_FIRST_S)


def _failure(timeout_s: float, message: str, value: object) -> str:
    return f"{message or 'condition not met'} (after {timeout_s:g} s; last value: {value!r})"
