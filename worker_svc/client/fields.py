"""What goes into a request, checked where betterproto does not; and what an error says of it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import fields
from datetime import timedelta
from typing import Any, TypeVar

from betterproto import Message

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


def field_at_fault(request: Any) -> str:
    """The field with text that UTF-8 cannot carry: a lone surrogate, as Python makes of a stray byte in argv.
    Its value stays untold, since it may be secret."""
    for field in fields(request):
        try:
            "".join(_texts(getattr(request, field.name))).encode()
        except UnicodeEncodeError:
            return field.name
    return "request"


def _texts(value: Any) -> Iterable[str]:
    match value:
        case str():
            return (value,)
        case dict():
            return (*value.keys(), *value.values())
        case list():
            return (text for item in value for text in _texts(item))
        case Message():
            # betterproto's messages are dataclasses, though mypy cannot see it.
            names = [field.name for field in fields(value)]  # type: ignore[arg-type]
            return (text for name in names for text in _texts(getattr(value, name)))
    return ()


def reason(error: OSError) -> str:
    # asyncio puts the address, or the failures of several addresses, in the place of the system's words.
    if failed := re.search(r"\[Errno (\d+)\] Connect call failed", str(error)):
        return os.strerror(int(failed[1]))
    return error.strerror or str(error) or type(error).__name__
