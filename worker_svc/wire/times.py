"""Durations and Timestamps ↔ timedelta and datetime, with the ranges and signs that protobuf gives them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Final

from worker_svc.job import InvalidArgument

DURATION_MAX_S: Final = 315_576_000_000
"""Ten thousand years."""
_TIMESTAMP_MIN_S: Final = -62_135_596_800
_TIMESTAMP_MAX_S: Final = 253_402_300_799
_NANOS_MAX: Final = 999_999_999
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def timedelta_of(duration: Any, path: str) -> timedelta:
    """Rounded to microseconds, but what is not zero stays so: a zero may mean "no limit". Raises InvalidArgument."""
    seconds, nanos = duration.seconds, duration.nanos
    if not -DURATION_MAX_S <= seconds <= DURATION_MAX_S:
        raise InvalidArgument(path, f"must be from -{DURATION_MAX_S} to {DURATION_MAX_S} seconds, not {seconds}")
    if not -_NANOS_MAX <= nanos <= _NANOS_MAX:
        raise InvalidArgument(path, f"nanos must be from -{_NANOS_MAX} to {_NANOS_MAX}, not {nanos}")
    if seconds * nanos < 0:
        raise InvalidArgument(path, f"seconds and nanos must have the same sign, not {seconds} and {nanos}")
    micros = round(nanos / 1000)
    if not micros and nanos and not seconds:
        micros = 1 if nanos > 0 else -1
    return timedelta(seconds=seconds, microseconds=micros)


def datetime_of(timestamp: Any, path: str) -> datetime:
    """Microseconds, rounded down. Raises InvalidArgument."""
    seconds, nanos = timestamp.seconds, timestamp.nanos
    if not _TIMESTAMP_MIN_S <= seconds <= _TIMESTAMP_MAX_S:
        raise InvalidArgument(path, f"must be from year 1 to 9999, not {seconds} seconds from 1970")
    if not 0 <= nanos <= _NANOS_MAX:
        raise InvalidArgument(path, f"nanos must be from 0 to {_NANOS_MAX}, not {nanos}")
    return _EPOCH + timedelta(seconds=seconds, microseconds=nanos // 1000)


def duration_fields(value: timedelta) -> dict[str, int]:
    """Both with the sign of the whole. Raises ValueError."""
    micros = (value.days * 86_400 + value.seconds) * 1_000_000 + value.microseconds
    if abs(micros) > DURATION_MAX_S * 1_000_000:
        raise ValueError(f"{value} is too long for a Duration")
    seconds, micros_left = divmod(abs(micros), 1_000_000)
    if micros < 0:
        return {"seconds": -seconds, "nanos": -micros_left * 1000}
    return {"seconds": seconds, "nanos": micros_left * 1000}


def timestamp_fields(value: datetime) -> dict[str, int]:
    """A datetime without a zone is taken for UTC, as betterproto does."""
    since = (value if value.tzinfo else value.replace(tzinfo=UTC)) - _EPOCH
    return {"seconds": since.days * 86_400 + since.seconds, "nanos": since.microseconds * 1000}
