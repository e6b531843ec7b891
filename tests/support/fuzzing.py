"""Inputs that are nearly right, and what must hold for each: for the unit tests, and for hours of scripts/fuzz."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import betterproto
from google.protobuf.message import DecodeError

from worker_svc.ipc import frames, messages
from worker_svc.job import InvalidArgument
from worker_svc.pb import jobscheduler as pb
from worker_svc.server.heads import Malformed, Refused, read_head
from worker_svc.supervisor.settings import DEFAULTS
from worker_svc.wire import codec
from worker_svc.wire.codec.shapes import shape_of
from worker_svc.wire.pool import POOL
from worker_svc.wire.times import datetime_of, timedelta_of

MESSAGES: Final[tuple[type[Any], ...]] = tuple(
    kind
    for kind in vars(pb).values()
    if isinstance(kind, type) and issubclass(kind, betterproto.Message) and kind.__module__ == pb.__name__
)
REQUESTS: Final = tuple(kind for kind in MESSAGES if kind.__name__.endswith("Req"))

# Tags, lengths and varints at the edges, where parsers err.
TOKENS: Final = (
    b"\x00", b"\x01", b"\x7f", b"\x80", b"\x80\x00", b"\xff", b"\xff\x7f", b"\x80\x80\x80\x80\x08",
    b"\xff" * 9 + b"\x01",
    b"\xff" * 10, b"\xff" * 9 + b"\x7f", b"\x80" * 10 + b"\x01", b"\xff\xff\xff\xff\x0f", b"\x0b", b"\x0c", b"\x06",
    b"\x07", b"\x0a\x00", b"\x0a\x01\xff", b"\xfa\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\xed\xa0\x80", b"\xc0\xaf",
    b"\xf4\x90\x80\x80", b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
)  # fmt: skip


class Mutator:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def mutate(self, data: bytes, other: bytes) -> bytes:
        made = bytearray(data)
        for _ in range(self.random.choice((1, 1, 1, 2, 2, 4, 8))):
            self._mutate_once(made, other)
        return bytes(made)

    def _mutate_once(self, made: bytearray, other: bytes) -> None:
        chance = self.random
        at = chance.randrange(len(made) + 1)
        match chance.randrange(8):
            case 0 if made:
                made[at % len(made)] ^= 1 << chance.randrange(8)
            case 1 if made:
                made[at % len(made)] = chance.randrange(256)
            case 2:
                made[at:at] = chance.choice(TOKENS)
            case 3:
                del made[at : at + chance.randrange(1, 9)]
            case 4:
                del made[at:]
            case 5:
                made[at:at] = made[at : at + chance.randrange(1, 33)]
            case 6 if other:
                start = chance.randrange(len(other))
                made[at:at] = other[start : start + chance.randrange(1, 65)]
            case _:
                made[at:at] = chance.randbytes(chance.randrange(1, 5))

    def fields(self, message_type: type[Any]) -> bytes:
        """A run of fields as the contract has them, some with another wire type or a value at an edge."""
        numbers = [field.number for field in POOL.FindMessageTypeByName(f"jobscheduler.{message_type.__name__}").fields]
        chance, made = self.random, bytearray()
        for _ in range(chance.randrange(6)):
            number = chance.choice([*numbers, *numbers, 1, 99, 536_870_911])
            wire_type = chance.choice((0, 0, 1, 2, 2, 2, 3, 5))
            made += varint(number << 3 | wire_type)
            match wire_type:
                case 0:
                    made += varint(chance.choice((0, 1, 2, 127, 2**31 - 1, 2**31, 2**32, 2**63, 2**64 - 1, 2**64)))
                case 1:
                    made += chance.randbytes(8)
                case 5:
                    made += chance.randbytes(4)
                case 2:
                    inner = chance.choice(
                        (b"", b"abc", b"\x08\x05", b"\x08\x05\x10\x07", b"\xff", b"\x0a\x01a\x12\x01b")
                    )
                    made += varint(len(inner)) + inner
        return bytes(made)


def varint(value: int) -> bytes:
    made = bytearray()
    while value > 0x7F:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    made.append(value)
    return bytes(made)


def corpus(message_type: type[Any]) -> list[bytes]:
    """Some valid messages: empty, and with each field at values that are not its default."""
    whole = example(message_type)
    alone = [message_type(**{field.name: getattr(whole, field.name)}) for field in dataclasses.fields(message_type)]
    return [b"", codec.encode(whole), *(codec.encode(message) for message in alone)]


def example(message_type: type[Any]) -> Any:
    """With every field set, to nothing that is its default."""
    descriptor = POOL.FindMessageTypeByName(f"jobscheduler.{message_type.__name__}")
    names = {betterproto.FieldMetadata.get(item).number: item.name for item in dataclasses.fields(message_type)}
    return message_type(**{names[field.number]: _example_of(field, names) for field in descriptor.fields})


def _example_of(field: Any, names: dict[int, str]) -> Any:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return {"key": "value", "é": ""}
    one: Any
    if field.message_type is not None:
        match field.message_type.full_name:
            case "google.protobuf.Duration":
                one = timedelta(seconds=-3, microseconds=-5)
            case "google.protobuf.Timestamp":
                one = datetime(2026, 11, 24, 7, 30, 1, 5, tzinfo=UTC)
            case _:
                one = example(getattr(pb, field.message_type.name))
    elif field.enum_type is not None:
        one = 1
    else:
        one = _SCALARS.get(field.type, -7)
    return [one, one] if field.is_repeated else one


# FieldDescriptor.TYPE_*: double, uint64, bool, string, bytes, uint32; all others can be negative.
_SCALARS: Final[dict[int, Any]] = {1: -0.1, 4: 2**64 - 1, 8: True, 9: "text é", 12: b"\0\xff", 13: 2**32 - 1}


def check_codec(message_type: type[Any], data: bytes) -> bool:
    """Asserts that it is read as protobuf reads it, or refused for a reason; returns whether it was read."""
    shape = shape_of(message_type)
    try:
        reference = shape.parse(data)
    except DecodeError:
        reference = None
    try:
        message = codec.decode(data, message_type)
    except InvalidArgument as error:
        if reference is not None:
            reference.DiscardUnknownFields()
            is_plain = reference.SerializeToString(deterministic=True) == data
            if is_plain and not _has_bad_times(reference):
                raise AssertionError(f"{message_type.__name__} {data.hex()} was refused") from error
        return False
    assert reference is not None, f"{message_type.__name__} {data.hex()} is no message, but was read"
    reference.DiscardUnknownFields()
    sent = shape.parse(codec.encode(message))
    _normalise(reference)
    # As bytes: a NaN is not equal to itself.
    is_same = sent.SerializeToString(deterministic=True) == reference.SerializeToString(deterministic=True)
    assert is_same, f"{message_type.__name__} {data.hex()}: {sent} != {reference}"
    return True


def _times_in(parsed: Any) -> list[tuple[Any, Callable[[Any, str], Any]]]:
    found: list[tuple[Any, Callable[[Any, str], Any]]] = []
    for field, value in parsed.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        for one in value if field.is_repeated else [value]:
            match field.message_type.full_name:
                case "google.protobuf.Duration":
                    found.append((one, timedelta_of))
                case "google.protobuf.Timestamp":
                    found.append((one, datetime_of))
                case _:
                    found += _times_in(one)
    return found


def _has_bad_times(parsed: Any) -> bool:
    for value, read in _times_in(parsed):
        try:
            read(value, "")
        except InvalidArgument:
            return True
    return False


def _normalise(parsed: Any) -> None:
    """To microseconds, which is all that Python's types have."""
    for value, read in _times_in(parsed):
        whole = read(value, "")
        value.Clear()
        if isinstance(whole, timedelta):
            micros = whole // timedelta(microseconds=1)
            value.seconds = (
                int(micros / 1e6) if abs(micros) < 2**50 else (abs(micros) // 10**6) * (1 if micros > 0 else -1)
            )
            value.nanos = (micros - value.seconds * 10**6) * 1000
        else:
            since = whole - datetime(1970, 1, 1, tzinfo=UTC)
            value.seconds = since // timedelta(seconds=1)
            value.nanos = since.microseconds * 1000


FRAMES: Final = (
    messages.encode(1, messages.Hello(2, "x", "00", DEFAULTS, exclusive=False)),
    messages.encode(2, messages.Start("a", "", spec=b'{"command":"true"}', stdin=b"stdin")),
    messages.encode(3, messages.Started(3, existed=False)),
    messages.encode(0, messages.Doorbell(9)),
    messages.encode(4, messages.Stop("a", grace_s=1e9)),
)


def check_frames(data: bytes, cut: int) -> bool:
    """Decodes at once and in two pieces, and asserts that it comes to the same; returns whether all was well-formed."""
    at_once, whole = _decode([data])
    in_pieces, pieces = _decode([data[:cut], data[cut:]])
    assert at_once == in_pieces, data.hex()
    assert json.dumps(whole, default=repr) == json.dumps(pieces, default=repr), data.hex()
    return at_once


def _decode(pieces: list[bytes]) -> tuple[bool, list[frames.Frame]]:
    decoder, found = frames.Decoder(), []
    try:
        for piece in pieces:
            found += decoder.feed(piece)
    except frames.FrameError:
        return False, []
    return True, found


# The headers of a request, as lines of name, a colon and a space, value.
HEAD: Final = (
    b":method: POST\n:scheme: http\n:path: /jobscheduler.Worker/StartJob\n:authority: localhost\n"
    b"content-type: application/grpc\nte: trailers\ngrpc-timeout: 10S\nuser-agent: fuzz\n"
    b"x-trace-bin: AAEC,/w==\nx-mark: some text\ngrpc-encoding: gzip"
)


def check_head(data: bytes) -> bool:
    """Asserts that it is read or refused, and that what was read can be relied on."""
    pairs = []
    for line in data.split(b"\n"):
        name, _, value = line[1:].partition(b": ")
        pairs.append((line[:1] + name, value))
    try:
        head = read_head(tuple(pairs), max_bytes=8192, max_metadata=16)
    except (Malformed, Refused):
        return False
    assert head.path.isascii()
    assert head.timeout_s is None or head.timeout_s >= 0
    for key, entry in head.metadata.items():
        assert isinstance(entry, bytes if key.endswith("-bin") else str)
    return True
