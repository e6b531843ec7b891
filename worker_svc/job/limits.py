"""What a job may use of the machine: one table, one row a limit.

Everything that knows limits by name reads the rows: the sections of the configuration, the maxima of a policy, the
messages, the options of the command line, what `query` shows, and the table in docs/limits.md. A new limit is one row,
one field in the .proto, and what enforces it (`containment/groups.py` writes the cgroup files by this table;
`spawn/steps.py` has the limits of a process).

A job's limits are a dict by the names of the rows; a limit that is not there is not set. How people write values is in
`limit_texts`, which the supervisor does not load.
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

from worker_svc.job.errors import InvalidArgument
from worker_svc.job.texts import name_of

# The RLIMIT_ names of getrlimit(2), in lower case.
RLIMIT_NAMES: Final = (
    "as", "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc", "rss", "rtprio",
    "rttime", "sigpending", "stack",
)  # fmt: skip
# No limit, for rlimits on the wire and in setrlimit(2). For every other limit that is said by leaving it out.
UNLIMITED: Final = -1
INT64_MAX: Final = 2**63 - 1

BYTES: Final = "bytes"
DECIMAL: Final = "decimal"
WHOLE: Final = "whole"
OCTAL: Final = "octal"
CPUS: Final = "cpus"
RLIMITS: Final = "rlimits"

_UNITS: Final = (("T", 2**40), ("G", 2**30), ("M", 2**20), ("K", 2**10))

Limits = dict[str, Any]
"""Name of a row → value: int or float; of `cpu_affinity` a tuple of CPU numbers; of `rlimits` a dict of name → soft and
hard limit, -1 for unlimited, hard None for the one that the job inherits. Never changed once it is part of a spec."""


class Limit(NamedTuple):
    name: str
    """In the messages, in `[limits]`, in a policy's `max`, in errors."""
    kind: str
    low: float
    high: float
    doc: str
    """For those who configure it; says what holds when it is left empty."""
    flag: str
    """The option of `start` and `run`."""
    metavar: str
    help: str
    word: str
    """In the line that `query` shows."""
    file: str = ""
    """The cgroup file that holds it for the whole tree of a job; empty: it holds for each single process."""
    bound: str = ""
    """Which end of it a worker and a policy can bound, `max` or `min`; empty: a job can change it at will anyway."""
    zero_is_none: bool = False
    """Whether asking for zero asks for no limit."""
    usual: int | None = None
    """What the kernel gives a job that asks for none."""

    @property
    def controller(self) -> str:
        return self.file.partition(".")[0]

    @property
    def bound_key(self) -> str:
        """In `[limits]`."""
        return f"{self.name}_min" if self.bound == "min" else f"{self.name}_limit"

    @property
    def policy_key(self) -> str:
        """In a policy's `max`."""
        return f"{self.name}_min" if self.bound == "min" else self.name

    def is_beyond(self, value: float, bound: float) -> bool:
        return value < bound if self.bound == "min" else value > bound


LIMITS: Final = (
    Limit(
        "memory_max_bytes", BYTES,
        # Less would not even let a shell start: the job would end in an OOM kill that tells nobody anything.
        1024 * 1024, INT64_MAX,
        "Memory of a job as a whole. Empty: no limit.",
        "--memory-max", "SIZE", "memory: bytes, or 512M, 1.5G; 0: any", "memory",
        file="memory.max", bound="max", zero_is_none=True,
    ),
    Limit(
        "swap_max_bytes", BYTES, 0, INT64_MAX, "Swap of a job as a whole. Empty: no limit.",
        "--swap-max", "SIZE", "swap, likewise; 0: none", "swap", file="memory.swap.max", bound="max",
    ),
    Limit(
        "cpu_max_cores", DECIMAL,
        # The kernel refuses a quota below 1 ms (kernel/sched/core.c: min_cfs_quota_period), in our periods of 100 ms.
        0.01, 100_000.0,
        "CPU time per time that a job may take: 1.5 is one and a half cores. Empty: no limit.",
        "--cpus", "N", "CPU time per time: 1.5 is one and a half cores; 0: any", "cpus",
        file="cpu.max", bound="max", zero_is_none=True,
    ),
    Limit(
        "cpu_weight", WHOLE, 1, 10_000, "A job's share of contended CPUs against other jobs. Empty: 100, the kernel's.",
        "--cpu-weight", "N", "share of contended CPUs, 1 to 10000; usual is 100", "cpu weight",
        file="cpu.weight", bound="max", zero_is_none=True, usual=100,
    ),
    Limit(
        # The kernel's own ceiling is PID_MAX_LIMIT on 64 bits.
        "pids_max", WHOLE, 1, 4 * 1024 * 1024, "Processes and threads of a job as a whole. Empty: no limit.",
        "--pids-max", "N", "processes and threads; 0: any", "pids", file="pids.max", bound="max", zero_is_none=True,
    ),
    Limit(
        "io_weight", WHOLE, 1, 10_000,
        "A job's share of contended I/O against other jobs. Empty: 100, as the kernel's.",
        "--io-weight", "N", "share of contended I/O, 1 to 10000; usual is 100", "io weight",
        file="io.weight", bound="max", zero_is_none=True, usual=100,
    ),
    Limit(
        "memory_high_bytes", BYTES, 1024 * 1024, INT64_MAX,
        "Memory of a job as a whole above which it is slowed down. Empty: no limit.",
        "--memory-high", "SIZE", "memory above which it is slowed down, not ended; 0: any", "memory high",
        file="memory.high", bound="max", zero_is_none=True,
    ),
    Limit(
        "rlimits", RLIMITS, UNLIMITED, INT64_MAX,
        'Limits of setrlimit(2) for each process, "NAME=SOFT", "NAME=SOFT:HARD", also "unlimited".',
        "--rlimit", "NAME=SOFT[:HARD]", "of setrlimit(2), repeatable: nofile=1024:4096, core=0, stack=unlimited", "",
        bound="max",
    ),
    Limit(
        "nice", WHOLE, -20, 19, "Nice value. Empty: the worker's own.",
        "--nice", "N", "from -20, most favoured, to 19", "nice", bound="min",
    ),
    Limit(
        "cpu_affinity", CPUS, 0, 8191, "CPUs that jobs may run on. Empty: those that the worker may use.",
        "--cpu-affinity", "CPUS", "CPUs to run on: 0,2-3", "on cpus",
    ),
    Limit(
        "umask", OCTAL, 0, 0o777, "Permissions that new files do not get, in octal. Empty: the worker's own.",
        "--umask", "OCTAL", "permissions new files do not get: 027", "umask",
    ),
    Limit(
        "oom_score_adj", WHOLE, -1000, 1000,
        "How willingly the kernel kills jobs when memory is out. Empty: as the worker.",
        "--oom-score-adj", "N", "from -1000 to 1000: kill it late or early", "oom score", bound="min",
    ),
)  # fmt: skip
NO_LIMITS: Final[Limits] = {}
BY_NAME: Final = {limit.name: limit for limit in LIMITS}
OF_TREE: Final = tuple(limit for limit in LIMITS if limit.file)


def check_limits(limits: Limits, prefix: str = "limits") -> None:
    """Raises InvalidArgument for the first value that is out of range, whatever the machine."""
    for name, value in limits.items():
        limit, field = BY_NAME[name], f"{prefix}.{name}"
        if limit.kind == RLIMITS:
            for rlimit, (soft, hard) in value.items():
                _check_rlimit(f"{field}.{name_of(rlimit)}", limit, rlimit, soft, hard)
        elif limit.kind == CPUS:
            for number in value:
                _check_range(field, limit, number)
        else:
            _check_range(field, limit, value)


def _check_range(field: str, limit: Limit, value: float) -> None:
    if not (math.isfinite(value) and limit.low <= value <= limit.high):
        low, high = amount_text(limit, limit.low), amount_text(limit, limit.high)
        shown = f"{value:#o}" if limit.kind == OCTAL else value
        raise InvalidArgument(field, f"must be from {low} to {high}, not {shown}")


def _check_rlimit(field: str, limit: Limit, name: str, soft: int, hard: int | None) -> None:
    if name not in RLIMIT_NAMES:
        raise InvalidArgument(field, f"there is no such limit: use one of {', '.join(RLIMIT_NAMES)}")
    _check_range(field, limit, soft)
    if hard is None:
        return
    _check_range(field, limit, hard)
    if hard != UNLIMITED and (soft == UNLIMITED or soft > hard):
        shown = "unlimited" if soft == UNLIMITED else soft
        raise InvalidArgument(field, f"the soft limit {shown} must not exceed the hard limit {hard}")


def limits_from_json(fields: dict[str, Any]) -> Limits:
    """What JSON has made of limits, as they were. Raises TypeError for a limit of a newer version."""
    unknown = [name for name in fields if name not in BY_NAME]
    if unknown:
        raise TypeError(f"there is no limit {unknown[0]!r}")
    limits = dict(fields)
    if "cpu_affinity" in limits:
        limits["cpu_affinity"] = tuple(limits["cpu_affinity"])
    if "rlimits" in limits:
        limits["rlimits"] = {name: (soft, hard) for name, (soft, hard) in dict(limits["rlimits"]).items()}
    return limits


def amount_text(limit: Limit | None, amount: float) -> str:
    """All digits, and bytes also as people write them: `1048576 (1M)`. None: of something else that is counted."""
    if isinstance(amount, float) and not amount.is_integer():
        return f"{amount:g}"
    whole = int(amount)
    if limit is not None and limit.kind == OCTAL:
        return f"0{whole:o}" if whole else "0"
    if limit is None or limit.kind != BYTES or not whole:
        return str(whole)
    unit, factor = next(((unit, factor) for unit, factor in _UNITS if whole % factor == 0), ("", 1))
    return f"{whole} ({whole // factor}{unit})" if unit else str(whole)
