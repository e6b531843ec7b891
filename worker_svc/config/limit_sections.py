"""The sections that say what a job may use and see; the keys of `[limits]` come from the table in `job/limits`."""

from collections.abc import Iterator
from dataclasses import dataclass, make_dataclass
from typing import TYPE_CHECKING, Any, Final

from worker_svc.config.declare import Conflict, Section, declare
from worker_svc.config.kinds import CPU_NUMBERS, UMASK, Bool, Bytes, Decimal, Kind, Listed, Maybe, Whole
from worker_svc.config.path_kinds import absolute_path
from worker_svc.config.values import quote
from worker_svc.job import Limits, Sandbox
from worker_svc.job.limit_texts import parse_cpus, parse_rlimit, parse_umask, rlimit_text
from worker_svc.job.limits import BY_NAME, LIMITS, RLIMITS, UNLIMITED, Limit, amount_text

_BOUND_DOCS: Final = {
    "max": "The most that a request may ask for, and what a job has where nobody says otherwise. Empty: no maximum.",
    "min": "The lowest that a request may ask for. Empty: any.",
}


def _rlimit(text: str) -> str:
    name, (soft, hard) = parse_rlimit(text)
    if hard >= 0 and not 0 <= soft <= hard:
        raise ValueError(f"has a soft limit above the hard one: {quote(text)}")
    return rlimit_text(name, soft, hard)


def _rlimit_maximum(text: str) -> str:
    name, (most, also) = parse_rlimit(text)
    if ":" in text or most < 0:
        raise ValueError(f"must be one number, the most that the hard limit may be, not {quote(text)}")
    return rlimit_text(name, most, also)


_RLIMITS: Final = Listed('limits such as "nofile=1024:4096"', _rlimit)
_RLIMIT_MAXIMA: Final = Listed('maxima such as "nofile=4096"', _rlimit_maximum)
_PATHS: Final = Listed("absolute paths", absolute_path)


def _kind_of(limit: Limit) -> Kind[Any]:
    match limit.kind:
        case "bytes":
            return Maybe(Bytes(int(limit.low), int(limit.high)))
        case "decimal":
            return Maybe(Decimal(limit.low, limit.high))
        case "octal":
            return UMASK
        case "cpus":
            return CPU_NUMBERS
        case "rlimits":
            return _RLIMITS
    return Maybe(Whole(int(limit.low), int(limit.high)))


def _fields() -> Iterator[tuple[str, Any, Any]]:
    for limit in LIMITS:
        is_list = limit.kind == RLIMITS
        yield limit.name, Any, declare([] if is_list else "", _kind_of(limit), limit.doc)
        if is_list:
            text = 'The most that hard limits may be, "NAME=HARD", and what jobs have where nobody says otherwise.'
            yield limit.bound_key, Any, declare([], _RLIMIT_MAXIMA, text)
        elif limit.bound:
            doc = "The most that a request may ask for. Empty: no maximum." if limit.usual else _BOUND_DOCS[limit.bound]
            yield limit.bound_key, Any, declare("", _kind_of(limit), doc)


class _Limits(Section):
    """What a job may use, where the request does not say otherwise, and the most that a request may ask for."""

    __slots__ = ()

    def conflicts(self) -> Iterator[Conflict]:
        defaults = self.defaults
        for name, bound in self.bounds.items():
            limit = BY_NAME[name]
            value, key = defaults.get(name), limit.bound_key
            if limit.kind == RLIMITS:
                for rlimit, (_, hard) in (value or {}).items():
                    if rlimit in bound and not UNLIMITED < hard <= bound[rlimit]:
                        yield (name, key), f"{rlimit} must not be more than in {key}, {bound[rlimit]}"
            elif value is not None and limit.is_beyond(value, bound):
                than = "less than" if limit.bound == "min" else "more than"
                text = f"{name} {amount_text(limit, value)} must not be {than} {key}, {amount_text(limit, bound)}"
                yield (name, key), text

    @property
    def defaults(self) -> Limits:
        """What a job has that asks for nothing, without what follows from the bounds."""
        values = {limit.name: _value_of(limit, getattr(self, limit.name)) for limit in LIMITS}
        return {name: value for name, value in values.items() if value not in (None, (), {})}

    @property
    def bounds(self) -> Limits:
        """By the limit's name; of `rlimits` the name of each → its hard limit."""
        values = {limit.name: getattr(self, limit.bound_key) for limit in LIMITS if limit.bound}
        values["rlimits"] = {name: hard for name, (_, hard) in map(parse_rlimit, values["rlimits"])}
        return {name: value for name, value in values.items() if value not in (None, {})}


def _value_of(limit: Limit, value: Any) -> Any:
    """As a spec has it; None, or empty, where nothing is set."""
    match limit.kind:
        case "octal":
            return parse_umask(value) if value else None
        case "cpus":
            return parse_cpus(value) if value else ()
        case "rlimits":
            return dict(map(parse_rlimit, value))
    return value


if TYPE_CHECKING:

    class LimitsConfig(_Limits):
        def __init__(self, **values: Any) -> None: ...

else:
    LimitsConfig = make_dataclass(
        "LimitsConfig", _fields(), bases=(_Limits,), frozen=True, slots=True, kw_only=True,
        namespace={"__doc__": _Limits.__doc__},
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxConfig(Section):
    """What of the machine a job gets to see, where the request does not say otherwise."""

    read_only_paths: tuple[str, ...] = declare(
        [], _PATHS, "Paths that may be read and executed, with all beneath. With any path, nothing else may."
    )
    read_write_paths: tuple[str, ...] = declare([], _PATHS, "Paths that may be changed too.")
    private_tmp: bool = declare(False, Bool(), "Whether a job has an empty /tmp of its own.")
    no_network: bool = declare(False, Bool(), "Whether a job has no network but a loopback interface of its own.")

    @property
    def sandbox(self) -> Sandbox:
        return Sandbox(self.read_only_paths, self.read_write_paths, self.private_tmp, self.no_network)
