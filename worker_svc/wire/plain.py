"""Answers as plain objects, with the names and values that the generated dataclasses have: betterproto takes longer to
import than a short command takes in all."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
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
    found = SimpleNamespace()
    values = found.__dict__
    for name, field, is_optional, is_repeated, convert in _fields(message.DESCRIPTOR):
        # `optional` in the contract is a oneof of one field.
        if is_optional and not message.HasField(field):
            values[name] = None
            continue
        value = getattr(message, field)
        if not is_repeated:
            values[name] = value if convert is None else convert(value)
        elif hasattr(value, "items"):  # a map; to ask the descriptor would load a module for its options
            values[name] = dict(value)
        else:
            values[name] = list(value) if convert is None else [convert(item) for item in value]
    return found


@cache
def _fields(message: Any) -> list[tuple[str, str, bool, bool, Callable[[Any], Any] | None]]:
    """What a message's descriptor says: each field's name here and in the contract, whether it is optional or repeated,
    and what makes of its value, or of one of them, what it is here; None: it is that."""
    return [
        (
            _HUMP.sub("_", field.name).lower(),
            field.name,
            field.containing_oneof is not None,
            field.is_repeated,
            _converter(field),
        )
        for field in message.fields
    ]


def _converter(field: Any) -> Callable[[Any], Any] | None:
    if field.enum_type is not None:
        members = {number: Member.of(number, field.enum_type) for number in field.enum_type.values_by_number}
        return lambda number: members.get(number) or Member.of(number, field.enum_type)
    match field.message_type and field.message_type.full_name:
        case None:
            return None
        case "google.protobuf.Duration":
            return lambda value: timedelta_of(value, field.name)
        case "google.protobuf.Timestamp":
            return lambda value: datetime_of(value, field.name)
    return plain
