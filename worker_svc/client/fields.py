"""What goes into a request, checked where betterproto does not."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, TypeVar

from worker_svc.job import InvalidArgument, check_duration
from worker_svc.pb.jobscheduler import JobState, LeaderExit, OutputPolicy, OutputStream, OutputVia

E = TypeVar("E", JobState, LeaderExit, OutputPolicy, OutputStream, OutputVia)


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
