"""Threads of the supervisor. What it needs while jobs run is made before the first job: later there may be none."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

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
