"""What time it is: the wall clock, which can be set to anything, and clocks that only go on."""

from __future__ import annotations

import time
from typing import Final

NS_PER_S: Final = 1_000_000_000
_LATEST_NS: Final = 2**63 - 1


def wall_ns() -> int:
    """Nanoseconds since 1970, to be shown; never more than can be recorded, which is the year 2262."""
    try:
        return min(time.time_ns(), _LATEST_NS)
    except OverflowError:  # since Python 3.13
        return _LATEST_NS
