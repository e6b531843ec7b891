"""What holds for each process of a job: limits, identity, sandbox. What holds for its whole tree is the cgroup's."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from worker_svc.job.errors import InvalidArgument
from worker_svc.job.texts import name_of

# The RLIMIT_ names of getrlimit(2), in lower case.
RLIMIT_NAMES: Final = (
    "as", "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc", "rss", "rtprio",
    "rttime", "sigpending", "stack",
)  # fmt: skip
UNLIMITED: Final = -1
RLIMIT_MAX: Final = 2**63 - 1
CPU_NUMBER_MAX: Final = 8191
PATHS_MAX: Final = 256
GROUPS_MAX: Final = 1024
_NAME_MAX_BYTES: Final = 256
# PATH_MAX of limits.h without its NUL: the kernel takes no longer path.
PATH_MAX_BYTES: Final = 4095


class ProcessLimits(NamedTuple):
    """Limits of each single process; None, like an absent name, is what the supervisor itself has."""

    rlimits: dict[str, tuple[int, int | None]] = {}  # noqa: RUF012 - never mutated; NamedTuple has no default_factory
    """Name (`nofile`, `as` …) → soft and hard limit, -1 for unlimited. Hard None: only the soft one is set, which the
    job may raise up to the hard one it inherits."""
    nice: int | None = None
    cpu_affinity: tuple[int, ...] = ()
    """CPU numbers; empty: all that the supervisor may use."""
    umask: int | None = None
    oom_score_adj: int | None = None

    def validate(self, prefix: str = "limits") -> None:
        """Raises InvalidArgument for the first field that is malformed, whatever the machine."""
        for name, (soft, hard) in self.rlimits.items():
            field = f"{prefix}.rlimits.{name_of(name)}"
            if name not in RLIMIT_NAMES:
                raise InvalidArgument(field, f"there is no such limit: use one of {', '.join(RLIMIT_NAMES)}")
            _check_range(field, soft, UNLIMITED, RLIMIT_MAX)
            if hard is None:
                continue
            _check_range(field, hard, UNLIMITED, RLIMIT_MAX)
            if hard != UNLIMITED and (soft == UNLIMITED or soft > hard):
                raise InvalidArgument(field, f"the soft limit {_limit(soft)} must not exceed the hard limit {hard}")
        if self.nice is not None:
            _check_range(f"{prefix}.nice", self.nice, -20, 19)
        for number in self.cpu_affinity:
            _check_range(f"{prefix}.cpu_affinity", number, 0, CPU_NUMBER_MAX)
        if self.umask is not None and not 0 <= self.umask <= 0o777:
            raise InvalidArgument(f"{prefix}.umask", f"must be from 0 to 0777, not {self.umask:#o}")
        if self.oom_score_adj is not None:
            _check_range(f"{prefix}.oom_score_adj", self.oom_score_adj, -1000, 1000)

    def to_json(self) -> dict[str, Any]:
        """A JSON object of the fields that are not at their defaults."""
        return {name: value for name, value in self._asdict().items() if value != self._field_defaults[name]}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> ProcessLimits:
        """The inverse of `to_json`; fields of a newer version are an error, TypeError."""
        fields = _with_tuples(fields, "cpu_affinity")
        if "rlimits" in fields:
            fields["rlimits"] = {name: (soft, hard) for name, (soft, hard) in fields["rlimits"].items()}
        return cls(**fields)


class Identity(NamedTuple):
    """As whom a job runs; names or ids, empty for the supervisor's own."""

    user: str = ""
    group: str = ""
    """Empty: the user's primary group."""
    groups: tuple[str, ...] | None = None
    """Supplementary groups. None: those that the user has in the group database (initgroups(3)); empty: none."""
    no_new_privs: bool = True
    """Whether no program that the job runs can gain privileges: setuid and setgid bits and file capabilities are
    ignored (PR_SET_NO_NEW_PRIVS)."""

    def validate(self, prefix: str = "identity") -> None:
        """Raises InvalidArgument for the first field that is malformed, whatever the machine."""
        _check_name(f"{prefix}.user", self.user, may_be_empty=True)
        _check_name(f"{prefix}.group", self.group, may_be_empty=True)
        if self.groups is None:
            return
        if len(self.groups) > GROUPS_MAX:
            raise InvalidArgument(f"{prefix}.groups", f"must be at most {GROUPS_MAX}, not {len(self.groups)}")
        for name in self.groups:
            _check_name(f"{prefix}.groups", name)

    def to_json(self) -> dict[str, Any]:
        """A JSON object of the fields that are not at their defaults."""
        return {name: value for name, value in self._asdict().items() if value != self._field_defaults[name]}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Identity:
        """The inverse of `to_json`; fields of a newer version are an error, TypeError."""
        return cls(**_with_tuples(fields, "groups"))


class Sandbox(NamedTuple):
    """What of the machine a job gets to see. With any path given, nothing but the paths given can be reached (and
    /dev/null, zero, full, random, urandom); `read_only_paths=("/",)` keeps all readable and runnable."""

    read_only_paths: tuple[str, ...] = ()
    """May be read, listed and executed, with all beneath."""
    read_write_paths: tuple[str, ...] = ()
    """May be changed too."""
    private_tmp: bool = False
    """An empty /tmp of its own, gone with the job's last process."""
    no_network: bool = False
    """A network namespace of its own that has only a loopback interface."""

    def validate(self, prefix: str = "sandbox") -> None:
        """Raises InvalidArgument for the first field that is malformed, whatever the machine."""
        for name, paths in (("read_only_paths", self.read_only_paths), ("read_write_paths", self.read_write_paths)):
            field = f"{prefix}.{name}"
            if len(paths) > PATHS_MAX:
                raise InvalidArgument(field, f"must be at most {PATHS_MAX}, not {len(paths)}")
            for index, path in enumerate(paths):
                if not path.startswith("/"):
                    raise InvalidArgument(field, f"must be absolute paths, which entry {index} is not")
                if "\0" in path:
                    raise InvalidArgument(field, "must not contain a NUL character")
                if len(path.encode("utf-8", "surrogateescape")) > PATH_MAX_BYTES:
                    raise InvalidArgument(field, f"must be at most {PATH_MAX_BYTES} bytes each")

    def to_json(self) -> dict[str, Any]:
        """A JSON object of the fields that are not at their defaults."""
        return {name: value for name, value in self._asdict().items() if value != self._field_defaults[name]}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Sandbox:
        """The inverse of `to_json`; fields of a newer version are an error, TypeError."""
        return cls(**_with_tuples(fields, "read_only_paths", "read_write_paths"))


def _with_tuples(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    """What JSON has made lists of; a copy."""
    return {name: tuple(value) if name in names and value is not None else value for name, value in fields.items()}


def _check_range(field: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise InvalidArgument(field, f"must be from {least} to {most}, not {value}")


def _check_name(field: str, name: str, *, may_be_empty: bool = False) -> None:
    if not name and not may_be_empty:
        raise InvalidArgument(field, "must not be empty")
    if not name.isprintable() or ":" in name:
        raise InvalidArgument(field, f"is no name and no id: {name_of(name)!r}")
    if len(name.encode()) > _NAME_MAX_BYTES:
        raise InvalidArgument(field, f"must be at most {_NAME_MAX_BYTES} bytes")


def _limit(value: int) -> str:
    return "unlimited" if value == UNLIMITED else str(value)
