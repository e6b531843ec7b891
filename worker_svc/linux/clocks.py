"""What time it is: the wall clock, which can be set to anything, and clocks that only go on."""

from __future__ import annotations

import json
import time
from typing import Final

NS_PER_S: Final = 1_000_000_000
_LATEST_NS: Final = 2**63 - 1
_OFF_MAX_NS: Final = 24 * 3600 * NS_PER_S
_KEEP_EVERY_NS: Final = 3600 * NS_PER_S


def wall_ns() -> int:
    """Nanoseconds since 1970, to be shown; never more than can be recorded, which is the year 2262."""
    try:
        return min(time.time_ns(), _LATEST_NS)
    except OverflowError:  # since Python 3.13
        return _LATEST_NS


def boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


class SteadyClock:
    """A clock of the state directory, for ages: it begins as the wall clock, and nobody can set it from then on.

    It goes on as long as the machine runs. How long that was off only the wall clock tells, which may be wrong by years
    then: it counts for at most a day.
    """

    def __init__(self, kept: str | None) -> None:
        """`kept` is what `to_keep` gave, for whichever process, before or after the last boot."""
        self._boot_id = boot_id()
        up_ns = _up_ns()
        boot, offset_ns, at_ns, at_wall_ns = json.loads(kept) if kept else ("", 0, wall_ns(), wall_ns())
        self._kept_ns = at_ns
        if boot != self._boot_id:
            offset_ns = at_ns + max(0, min(wall_ns() - at_wall_ns, _OFF_MAX_NS)) - up_ns
            self._kept_ns = -_KEEP_EVERY_NS
        self._offset_ns = int(offset_ns)

    def now_ns(self) -> int:
        return min(self._offset_ns + _up_ns(), _LATEST_NS)

    def to_keep(self) -> str:
        """What is to be kept, from time to time, against the next boot. Empty: it was not long ago."""
        now_ns = self.now_ns()
        if now_ns - self._kept_ns < _KEEP_EVERY_NS:
            return ""
        self._kept_ns = now_ns
        return json.dumps([self._boot_id, self._offset_ns, now_ns, wall_ns()])


def _up_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)
