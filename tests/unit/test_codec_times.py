"""Durations and timestamps on the wire."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.support.codec import refusal
from tests.support.fuzzing import (
    varint,
)
from worker_svc.pb import jobscheduler as pb
from worker_svc.wire.codec import decode, encode
from worker_svc.wire.codec.shapes import shape_of

# Times


DURATIONS = [
    (b"", timedelta(0)),
    (b"\x08\x05", timedelta(seconds=5)),
    (b"\x08\x05\x10\x80\xca\xb5\xee\x01", timedelta(seconds=5, microseconds=500_000)),
    (b"\x08" + varint(2**64 - 1), timedelta(seconds=-1)),
    (b"\x10" + varint(2**64 - 500_000_000), timedelta(microseconds=-500_000)),
    (b"\x08" + varint(2**64 - 1) + b"\x10" + varint(2**64 - 500_000_000), timedelta(seconds=-1, microseconds=-500_000)),
    (b"\x08" + varint(315_576_000_000), timedelta(seconds=315_576_000_000)),
    (b"\x08" + varint(2**64 - 315_576_000_000), timedelta(seconds=-315_576_000_000)),
]


@pytest.mark.parametrize("wire,value", DURATIONS)
def test_durations_both_ways(wire: bytes, value: timedelta) -> None:
    data = b"\x5a" + varint(len(wire)) + wire
    assert decode(data, pb.WaitJobReq).timeout == value
    assert encode(pb.WaitJobReq(timeout=value)) == data


@pytest.mark.parametrize(
    "nanos,micros",
    [(1, 1), (499, 1), (500, 1), (999, 1), (1499, 1), (1501, 2), (-1, -1), (-499, -1), (999_999_999, 1_000_000)],
)
def test_nanoseconds_never_round_to_nothing(nanos: int, micros: int) -> None:
    """A timeout of zero means none."""
    wire = b"\x10" + varint(nanos % 2**64)
    assert decode(b"\x5a" + varint(len(wire)) + wire, pb.WaitJobReq).timeout == timedelta(microseconds=micros)


@pytest.mark.parametrize(
    "seconds,nanos,words",
    [
        (315_576_000_001, 0, "timeout: must be from -315576000000"),
        (-315_576_000_001, 0, "timeout: must be from -315576000000"),
        (0, 1_000_000_000, "timeout: nanos must be from"),
        (0, -1_000_000_000, "timeout: nanos must be from"),
        (1, -1, "timeout: seconds and nanos must have the same sign"),
        (-1, 1, "timeout: seconds and nanos must have the same sign"),
    ],
)
def test_durations_out_of_range(seconds: int, nanos: int, words: str) -> None:
    wire = b"\x08" + varint(seconds % 2**64) + b"\x10" + varint(nanos % 2**64)
    assert words in refusal(b"\x5a" + varint(len(wire)) + wire, pb.WaitJobReq)


@pytest.mark.parametrize(
    "value",
    [
        datetime(1970, 1, 1, tzinfo=UTC),
        datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
        datetime(1, 1, 1, tzinfo=UTC),
        datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
        datetime(2026, 11, 24, 1, 2, 3, 4, tzinfo=UTC),
    ],
)
def test_timestamps_both_ways(value: datetime) -> None:
    message = decode(encode(pb.ListJobsReq(accepted_since=value)), pb.ListJobsReq)
    assert message.accepted_since == value
    reference: Any = shape_of(pb.ListJobsReq).parse(encode(message))
    assert reference.accepted_since.ToDatetime(UTC) == value


@pytest.mark.parametrize("seconds,nanos", [(253_402_300_800, 0), (-62_135_596_801, 0), (0, -1), (0, 1_000_000_000)])
def test_timestamps_out_of_range(seconds: int, nanos: int) -> None:
    wire = b"\x08" + varint(seconds % 2**64) + b"\x10" + varint(nanos % 2**64)
    assert refusal(b"\x62" + varint(len(wire)) + wire, pb.ListJobsReq).startswith("accepted_since: ")
