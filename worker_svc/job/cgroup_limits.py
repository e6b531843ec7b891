"""What a job may use of the machine, as far as cgroup v2 controllers hold it.

The kernel's Documentation/admin-guide/cgroup-v2.rst says what each does.
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

from worker_svc.job.errors import InvalidArgument

# Less would not even let a shell start: the job would end in an OOM kill that tells nobody anything.
MEMORY_MAX_FLOOR_BYTES: Final = 1024 * 1024
# The kernel refuses a quota below 1 ms (kernel/sched/core.c: min_cfs_quota_period), in our periods of 100 ms.
CPU_CORES_FLOOR: Final = 0.01
CPU_CORES_CEILING: Final = 100_000.0
WEIGHT_MAX: Final = 10_000
# What the kernel gives a group that asks for none.
WEIGHT_DEFAULT: Final = 100
# The kernel's own ceiling, PID_MAX_LIMIT on 64 bits.
PIDS_CEILING: Final = 4 * 1024 * 1024
_BYTES_CEILING: Final = 2**63 - 1
_UNITS: Final = (("T", 2**40), ("G", 2**30), ("M", 2**20), ("K", 2**10))


class CgroupLimits(NamedTuple):
    """None: not limited by us. Every field holds for the whole tree of the job together, not for each process."""

    memory_max_bytes: int | None = None
    """Above it the kernel reclaims, and then ends the whole job (memory.oom.group): OOM_KILLED."""
    swap_max_bytes: int | None = None
    cpu_max_cores: float | None = None
    """A quota: 1.5 is as much time as one and a half cores have. The job is throttled, not ended."""
    cpu_weight: int | None = None
    """Its share against other jobs when the CPUs are contended; the kernel's default is 100."""
    pids_max: int | None = None
    """Processes and threads; above it fork(2) fails with EAGAIN."""
    io_weight: int | None = None

    def validate(self, prefix: str = "limits") -> None:
        """Raises InvalidArgument for the first field that is out of range, whatever the machine."""
        if self == _NONE:
            return
        bounds: dict[str, tuple[float, float]] = {
            "memory_max_bytes": (MEMORY_MAX_FLOOR_BYTES, _BYTES_CEILING),
            "swap_max_bytes": (0, _BYTES_CEILING),
            "cpu_max_cores": (CPU_CORES_FLOOR, CPU_CORES_CEILING),
            "cpu_weight": (1, WEIGHT_MAX),
            "pids_max": (1, PIDS_CEILING),
            "io_weight": (1, WEIGHT_MAX),
        }
        for name, value in self._asdict().items():
            low, high = bounds[name]
            if value is not None and not (math.isfinite(value) and low <= value <= high):
                shown = f"must be from {amount_text(name, low)} to {amount_text(name, high)}, not {value}"
                raise InvalidArgument(f"{prefix}.{name}", shown)

    def over(self, defaults: CgroupLimits) -> CgroupLimits:
        """These limits, and the defaults for what they leave open."""
        return defaults._replace(**self.to_json())

    def to_json(self) -> dict[str, Any]:
        """A JSON object of the limits that are set."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> CgroupLimits:
        """The inverse of `to_json`; fields of a newer version are an error, TypeError."""
        return cls(**fields)


_NONE: Final = CgroupLimits()


def amount_text(name: str, amount: float) -> str:
    """Of the limit of this name: all digits, and bytes also as people write them: `1048576 (1M)`."""
    if isinstance(amount, float) and not amount.is_integer():
        return f"{amount:g}"
    whole = int(amount)
    if not name.endswith("_bytes") or not whole:
        return str(whole)
    unit, factor = next(((unit, factor) for unit, factor in _UNITS if whole % factor == 0), ("", 1))
    return f"{whole} ({whole // factor}{unit})" if unit else str(whole)
