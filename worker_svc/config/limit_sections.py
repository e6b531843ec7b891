"""The sections that say what a job may use and see: as declared in `sections`, with what the worker makes of them."""

from collections.abc import Iterator
from dataclasses import dataclass

from worker_svc.config.declare import Conflict, Section, declare
from worker_svc.config.kinds import Bool
from worker_svc.config.limit_kinds import (
    CpuNumbers,
    MaybeBytes,
    MaybeDecimal,
    MaybeWhole,
    Umask,
    absolute_paths,
    rlimit_maxima,
    rlimits,
)
from worker_svc.job import CgroupLimits, ProcessLimits, Sandbox
from worker_svc.job.cgroup_limits import (
    CPU_CORES_CEILING,
    CPU_CORES_FLOOR,
    MEMORY_MAX_FLOOR_BYTES,
    PIDS_CEILING,
    WEIGHT_DEFAULT,
    WEIGHT_MAX,
    amount_text,
)
from worker_svc.job.limit_texts import parse_cpus, parse_rlimit, parse_umask
from worker_svc.job.limits import UNLIMITED

_LIMIT_DOC = "The most that a request may ask for, and what a job has where nobody says otherwise. Empty: no maximum."
_BYTES_MAX = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsConfig(Section):
    """What a job may use, where the request does not say otherwise, and the most that a request may ask for."""

    memory_max_bytes: int | None = declare(
        "", MaybeBytes(MEMORY_MAX_FLOOR_BYTES, _BYTES_MAX), "Memory of a job as a whole. Empty: no limit."
    )
    memory_max_bytes_limit: int | None = declare("", MaybeBytes(MEMORY_MAX_FLOOR_BYTES, _BYTES_MAX), _LIMIT_DOC)
    swap_max_bytes: int | None = declare("", MaybeBytes(0, _BYTES_MAX), "Swap of a job as a whole. Empty: no limit.")
    swap_max_bytes_limit: int | None = declare("", MaybeBytes(0, _BYTES_MAX), _LIMIT_DOC)
    cpu_max_cores: float | None = declare(
        "",
        MaybeDecimal(CPU_CORES_FLOOR, CPU_CORES_CEILING),
        "CPU time per time that a job may take: 1.5 is one and a half cores. Empty: no limit.",
    )
    cpu_max_cores_limit: float | None = declare("", MaybeDecimal(CPU_CORES_FLOOR, CPU_CORES_CEILING), _LIMIT_DOC)
    cpu_weight: int | None = declare(
        "",
        MaybeWhole(1, WEIGHT_MAX),
        "A job's share of contended CPUs against other jobs. Empty: 100, the kernel's.",
    )
    cpu_weight_limit: int | None = declare(
        "", MaybeWhole(1, WEIGHT_MAX), "The most that a request may ask for. Empty: no maximum."
    )
    pids_max: int | None = declare(
        "", MaybeWhole(1, PIDS_CEILING), "Processes and threads of a job as a whole. Empty: no limit."
    )
    pids_max_limit: int | None = declare("", MaybeWhole(1, PIDS_CEILING), _LIMIT_DOC)
    io_weight: int | None = declare(
        "", MaybeWhole(1, WEIGHT_MAX), "A job's share of contended I/O against other jobs. Empty: 100, as the kernel's."
    )
    io_weight_limit: int | None = declare(
        "", MaybeWhole(1, WEIGHT_MAX), "The most that a request may ask for. Empty: no maximum."
    )
    rlimits: tuple[str, ...] = declare(
        [],
        rlimits(),
        'Limits of setrlimit(2) for each process, "NAME=SOFT", "NAME=SOFT:HARD", also "unlimited".',
    )
    rlimits_limit: tuple[str, ...] = declare(
        [],
        rlimit_maxima(),
        'The most that hard limits may be, "NAME=HARD", and what jobs have where nobody says otherwise.',
    )
    nice: int | None = declare("", MaybeWhole(-20, 19), "Nice value. Empty: the worker's own.")
    nice_min: int | None = declare(
        "", MaybeWhole(-20, 19), "The lowest, most favoured, that a request may ask for. Empty: any."
    )
    cpu_affinity: str = declare("", CpuNumbers(), "CPUs that jobs may run on. Empty: those that the worker may use.")
    umask: str = declare("", Umask(), "Permissions that new files do not get, in octal. Empty: the worker's own.")
    oom_score_adj: int | None = declare(
        "", MaybeWhole(-1000, 1000), "How willingly the kernel kills jobs when memory is out. Empty: as the worker."
    )
    oom_score_adj_min: int | None = declare(
        "", MaybeWhole(-1000, 1000), "The lowest that a request may ask for. Empty: any."
    )

    def conflicts(self) -> Iterator[Conflict]:
        for name, value, most in zip(CgroupLimits._fields, self._asked, self.cgroup_maxima, strict=True):
            if value is not None and most is not None and value > most:
                text = (
                    f"{name} {amount_text(name, value)} must not be more than {name}_limit, {amount_text(name, most)}"
                )
                yield (name, f"{name}_limit"), text
        for name in ("nice", "oom_score_adj"):
            value, least = getattr(self, name), getattr(self, f"{name}_min")
            if value is not None and least is not None and value < least:
                yield (name, f"{name}_min"), f"{name} {value} must not be less than {name}_min, {least}"
        maxima = self.rlimit_maxima
        for name, (_, hard) in map(parse_rlimit, self.rlimits):
            if name in maxima and not UNLIMITED < hard <= maxima[name]:
                yield ("rlimits", "rlimits_limit"), f"{name} must not be more than in rlimits_limit, {maxima[name]}"

    @property
    def _asked(self) -> CgroupLimits:
        return CgroupLimits(*(getattr(self, name) for name in CgroupLimits._fields))

    @property
    def cgroup_maxima(self) -> CgroupLimits:
        return CgroupLimits(*(getattr(self, f"{name}_limit") for name in CgroupLimits._fields))

    @property
    def cgroup_defaults(self) -> CgroupLimits:
        """Where nothing is asked for: the default, or else the maximum (no weight above the kernel's own)."""
        maxima = self.cgroup_maxima
        for name in ("cpu_weight", "io_weight"):
            if (getattr(maxima, name) or 0) >= WEIGHT_DEFAULT:
                maxima = maxima._replace(**{name: None})
        return self._asked.over(maxima)

    @property
    def rlimit_maxima(self) -> dict[str, int]:
        return {name: hard for name, (_, hard) in map(parse_rlimit, self.rlimits_limit)}

    @property
    def process_defaults(self) -> ProcessLimits:
        """Without the maxima."""
        return ProcessLimits(
            {**dict(map(parse_rlimit, self.rlimits))},
            self.nice,
            parse_cpus(self.cpu_affinity) if self.cpu_affinity else (),
            parse_umask(self.umask) if self.umask else None,
            self.oom_score_adj,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxConfig(Section):
    """What of the machine a job gets to see, where the request does not say otherwise."""

    read_only_paths: tuple[str, ...] = declare(
        [], absolute_paths(), "Paths that may be read and executed, with all beneath. With any path, nothing else may."
    )
    read_write_paths: tuple[str, ...] = declare([], absolute_paths(), "Paths that may be changed too.")
    private_tmp: bool = declare(False, Bool(), "Whether a job has an empty /tmp of its own.")
    no_network: bool = declare(False, Bool(), "Whether a job has no network but a loopback interface of its own.")

    @property
    def sandbox(self) -> Sandbox:
        return Sandbox(self.read_only_paths, self.read_write_paths, self.private_tmp, self.no_network)
