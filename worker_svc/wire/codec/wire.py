"""The strict walk over a message's bytes: every byte accounted for, every value in the range of its field.

Field numbers that the contract does not have are skipped (a newer client may send them); groups are not, since no
version of it has any. Stricter than protobuf, which reads on in each of these cases: a known field with another wire
type, a number too large for its field, a boolean that is neither 0 nor 1, an entry of a map with more than a key and
a value. And bounded, which protobuf is not: two bytes can be one more element of a list.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

VARINT: Final = 0
FIXED64: Final = 1
BYTES: Final = 2
FIXED32: Final = 5
_GROUPS: Final = (3, 4)
_NAMES: Final = {VARINT: "a varint", FIXED64: "8 bytes", BYTES: "bytes of a given length", FIXED32: "4 bytes"}
_SIZES: Final = {FIXED64: 8, FIXED32: 4}

_UINT64_END: Final = 1 << 64
_TAG_END: Final = 1 << 32
_VARINT_MAX_BYTES: Final = 10
# How many fields one message may have in all, nested ones and those that the contract does not know included. Every
# list and map may be as long as it can, and the largest, `args` and `env`, have 4,096 entries of 1 and 3.
FIELDS_MAX: Final = 20_000
# Some millisecond's work.
_SLICE: Final = 1000
_NOT_LAST: Final = bytes(range(0x80, 0x100))
"""What only a varint that goes on has."""


class Malformed(Exception):
    """`path` names the field, empty: the message as a whole."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}" if path else reason)
        self.path = path
        self.reason = reason


@dataclass(slots=True)
class Field:
    name: str
    wire_type: int
    low: int = 0
    """The least value of a varint."""
    high: int = _UINT64_END - 1
    is_packable: bool = False
    is_text: bool = False
    most: int = FIELDS_MAX
    """How often it may be there."""
    layout: Layout | None = None
    """The fields of a submessage."""


@dataclass(slots=True)
class Layout:
    """What a message has of fields, by number."""

    fields: dict[int, Field] = field(default_factory=dict)
    is_map_entry: bool = False


def check(layout: Layout, data: bytes) -> Iterator[None]:
    """A millisecond's work at a time. Raises Malformed. It goes no deeper than the contract does: what is inside
    unknown fields is not looked at.
    """
    return _walk(layout, data, "", [0])


def _walk(layout: Layout, data: bytes, path: str, seen: list[int]) -> Iterator[None]:
    at, end = 0, len(data)
    counts: dict[int, int] = {}
    while at < end:
        seen[0] += 1
        if not seen[0] % _SLICE:
            yield
        tag, at = _varint(data, at, end, path)
        number, wire_type = tag >> 3, tag & 7
        if not number or tag >= _TAG_END:
            raise Malformed(path, f"there is no field number {number}")
        known = layout.fields.get(number)
        where = f"{path}.{known.name}" if known and path else known.name if known else path
        if seen[0] > FIELDS_MAX:
            raise Malformed(where, f"there are more than {FIELDS_MAX} fields in this message")
        if wire_type in _GROUPS:
            raise Malformed(where, f"field {number} is a group, which this contract has none of")
        if wire_type == VARINT:
            value, at = _varint(data, at, end, where)
            if known and known.wire_type == VARINT:
                _check_range(known, value, where)
                _count(known, counts, number, 1, where)
        elif wire_type == BYTES:
            size, at = _varint(data, at, end, where)
            if size > end - at:
                raise Malformed(where, f"is cut off: {size} bytes are announced, {end - at} left")
            if known:
                inner = data[at : at + size]
                _count(known, counts, number, len(inner.translate(None, _NOT_LAST)) if known.is_packable else 1, where)
                if known.layout is not None:
                    yield from _walk(known.layout, inner, where, seen)
                else:
                    _check_bytes(known, inner, where)
            at += size
        elif wire_type in _SIZES:
            at += _SIZES[wire_type]
            if at > end:
                raise Malformed(where, "is cut off")
        else:
            raise Malformed(where, f"field {number} has wire type {wire_type}, which there is not")
        if known is None:
            if layout.is_map_entry:
                raise Malformed(path, f"an entry has a field {number}")
        elif wire_type != known.wire_type and not (wire_type == BYTES and known.is_packable):
            raise Malformed(where, f"must be sent as {_NAMES[known.wire_type]}, not {_NAMES[wire_type]}")


def _count(known: Field, counts: dict[int, int], number: int, more: int, path: str) -> None:
    count = counts[number] = counts.get(number, 0) + more
    if count > known.most:
        raise Malformed(path, f"must be at most {known.most}, and there are more")


def _varint(data: bytes, at: int, end: int, path: str) -> tuple[int, int]:
    if at < end and data[at] < 0x80:  # most are one byte
        return data[at], at + 1
    value = shift = 0
    for position in range(at, min(end, at + _VARINT_MAX_BYTES)):
        byte = data[position]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >= _UINT64_END:
                raise Malformed(path, "a varint is larger than 64 bits")
            return value, position + 1
        shift += 7
    if end - at >= _VARINT_MAX_BYTES:
        raise Malformed(path, f"a varint is longer than {_VARINT_MAX_BYTES} bytes")
    raise Malformed(path, "is cut off")


def _check_range(known: Field, value: int, path: str) -> None:
    # Negative numbers travel as their 64-bit two's complement, whatever the size of the field.
    if known.low < 0 and value >= 1 << 63:
        value -= _UINT64_END
    if not known.low <= value <= known.high:
        raise Malformed(path, f"must be from {known.low} to {known.high}, not {value}")


def _check_bytes(known: Field, data: bytes, path: str) -> None:
    if known.is_packable:
        at, end = 0, len(data)
        while at < end:
            value, at = _varint(data, at, end, path)
            _check_range(known, value, path)
    elif known.is_text:
        try:
            data.decode()
        except UnicodeDecodeError as error:
            raise Malformed(path, f"is not valid UTF-8: {error.reason} at byte {error.start}") from None
