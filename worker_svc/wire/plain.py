"""Answers as plain objects, with the names and values that the generated dataclasses have: betterproto takes longer to
import than a short command takes in all."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any, Final

from worker_svc.wire.times import datetime_of, timedelta_of

_HUMP: Final = re.compile("(?<=[a-z])(?=[A-Z])")


class Member(int):
    """A value of an enum: its number, and `name`, which is None if the contract has none for it."""

    name: str | None

    @classmethod
    def of(cls, number: int, enum: Any) -> Member:
        member = cls(number)
        known = enum.values_by_number.get(number)
        prefix = enum.values_by_number[0].name.removesuffix("UNSPECIFIED")
        member.name = known and known.name.removeprefix(prefix)
        return member


def plain(message: Any) -> Any:
    """A message of protobuf's runtime as an object with an attribute a field. Raises InvalidArgument for a time that
    nothing in Python can hold."""
    return SimpleNamespace(
        **{_HUMP.sub("_", field.name).lower(): _value(message, field) for field in message.DESCRIPTOR.fields}
    )


def _value(message: Any, field: Any) -> Any:
    value = getattr(message, field.name)
    if hasattr(value, "items"):  # a map; to ask the descriptor would load a module for its options
        return dict(value)
    if field.is_repeated:
        return [_one(item, field) for item in value]
    # `optional` in the contract is a oneof of one field.
    if field.containing_oneof is not None and not message.HasField(field.name):
        return None
    return _one(value, field)


def _one(value: Any, field: Any) -> Any:
    if field.enum_type is not None:
        return Member.of(value, field.enum_type)
    match field.message_type and field.message_type.full_name:
        case None:
            return value
        case "google.protobuf.Duration":
            return timedelta_of(value, field.name)
        case "google.protobuf.Timestamp":
            return datetime_of(value, field.name)
    return plain(value)
