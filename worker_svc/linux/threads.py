"""Threads that are made before they are needed (later there may be none), and threads for what may never return."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

T = TypeVar("T")

# Address space, of which some pages are ever touched.
_STACK_BYTES: Final = 256 * 1024


def start_thread(target: Callable[[], None], name: str) -> threading.Thread:
    """Raises RuntimeError if there is none to be had."""
    former = threading.stack_size(_STACK_BYTES)
    try:
        thread = threading.Thread(target=target, name=name, daemon=True)
        thread.start()
    finally:
        threading.stack_size(former)
    return thread


def ready_pool(threads: int, name: str) -> ThreadPoolExecutor:
    """A pool whose threads are there. Raises RuntimeError if they are not to be had."""
    from concurrent.futures import ThreadPoolExecutor  # not at the top: the supervisor has no need of it

    pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
    all_there = threading.Barrier(threads + 1)
    try:
        for _ in range(threads):
            pool.submit(all_there.wait)  # each waits, so that the next takes a thread of its own
        all_there.wait()
    except RuntimeError:
        all_there.abort()
        pool.shutdown(wait=False)
        raise
    return pool


def run_apart(call: Callable[[], T], name: str) -> asyncio.Future[T]:
    """What a call gives that may never return: it has a thread, which nobody waits for at the end of the process.
    Raises RuntimeError if there is none to be had."""
    import asyncio  # not at the top: the supervisor has no need of it

    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def settle(value: Any, error: BaseException | None) -> None:
        if result.done():  # cancelled
            return
        if error is None:
            result.set_result(value)
        else:
            result.set_exception(error)

    def run() -> None:
        value: Any = None
        failure: BaseException | None = None
        try:
            value = call()
        except BaseException as error:  # for the one who waits
            failure = error
        try:
            loop.call_soon_threadsafe(settle, value, failure)
        except RuntimeError:  # the loop is closed: whoever asked is gone
            return

    threading.Thread(target=run, name=name, daemon=True).start()
    return result
