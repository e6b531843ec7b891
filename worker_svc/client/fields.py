"""What goes into a request, checked where betterproto does not."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final, TypeVar

from worker_svc.job import InvalidArgument, check_duration
from worker_svc.pb.jobscheduler import (
    JobState,
    JobView,
    LeaderExit,
    OutputPolicy,
    OutputStream,
    OutputVia,
    StartJobReq,
)

E = TypeVar("E", JobState, JobView, LeaderExit, OutputPolicy, OutputStream, OutputVia)

UINT64_MAX: Final = 2**64 - 1
_CONTAINERS: Final[dict[str, Callable[[Any], Any]]] = {"args": list, "env": dict, "labels": dict, "secret_env": dict}
_ENUMS: Final[dict[str, Any]] = {"output_policy": OutputPolicy, "output_via": OutputVia, "leader_exit": LeaderExit}


def start_request(command: str, path: str = "", **given: Any) -> StartJobReq:
    """From the arguments of `WorkerClient.start`. Raises InvalidArgument."""
    for name in ("timeout", "stop_grace"):
        given[name] = duration(name, given.pop(f"{name}_s", None))
    for name, make in _CONTAINERS.items():
        given[name] = make(given.get(name) or ())
    for name, enum in _ENUMS.items():
        given[name] = member(enum, name, given.get(name, 0))
    count("output_max_bytes", given.get("output_max_bytes"), UINT64_MAX)
    return StartJobReq(command=command, path=path, **given)


def duration(field: str, seconds: float | None) -> timedelta | None:
    """Checked here because betterproto encodes a negative Duration wrongly."""
    if seconds is None:
        return None
    check_duration(field, seconds)
    try:
        return timedelta(seconds=seconds)
    except ValueError:
        raise InvalidArgument(field, f"must be a number of seconds, not {seconds}") from None


def count(field: str, number: Any, maximum: int) -> Any:
    """Checked here because betterproto wraps what is out of range silently."""
    if number is not None and not 0 <= number <= maximum:
        raise InvalidArgument(field, f"must be from 0 to {maximum}, not {number}")
    return number


def member(enum: type[E], field: str, number: int) -> E:
    """The member itself: type checkers take the members of betterproto's enums for plain integers."""
    try:
        return enum(number)
    except ValueError:
        raise InvalidArgument(field, f"must be a {enum.__name__}, not {number}") from None
