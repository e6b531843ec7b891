"""Threads that are made before they are needed: later there may be none."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

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
