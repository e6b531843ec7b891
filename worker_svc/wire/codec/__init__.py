"""Between bytes and the generated dataclasses: strict when reading, exact when writing.

betterproto's own parser accepts what it should refuse (and is slow), so protobuf's runtime parses here and a
dataclass is filled from the result. That runtime keeps a known field with the wrong wire type as an unknown one and
cuts numbers to size silently: whatever is not in the one canonical form is therefore walked through once more, byte
by byte (`wire`). That takes a µs a field, and what protobuf makes of a field takes memory: what is large is walked
through first, in slices.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from google.protobuf.message import DecodeError
from grpclib.const import Status
from grpclib.encoding.base import CodecBase
from grpclib.exceptions import GRPCError

from worker_svc.job import InvalidArgument
from worker_svc.wire.codec import wire
from worker_svc.wire.codec.shapes import Shape, shape_of

__all__ = ["LARGE_BYTES", "Encoded", "MessageCodec", "decode", "encode"]

# So large a message may have some thousand fields.
LARGE_BYTES: Final = 4096


class Encoded(NamedTuple):
    """An answer whose parts were encoded one by one: bytes of the same type of message, one behind the other, are the
    bytes of all of them in one."""

    message_type: type[Any]
    data: bytes


class MessageCodec(CodecBase):
    """For `grpclib.server.Server(codec=…)`."""

    __content_subtype__: Final = "proto"

    def encode(self, message: Any, message_type: Any) -> bytes:
        """Raises GRPCError: what we cannot write is a fault of ours."""
        if type(message) is Encoded and message.message_type is message_type:
            return message.data
        if type(message) is not message_type:
            raise GRPCError(Status.INTERNAL, f"the answer is no {message_type.__name__}")
        try:
            return encode(message)
        except (TypeError, ValueError) as error:
            raise GRPCError(Status.INTERNAL, f"the answer cannot be encoded: {error}") from error

    def check(self, data: bytes, message_type: Any) -> Iterator[None]:
        """The walk that a large message needs, in slices. Raises InvalidArgument, naming the field."""
        return _check(shape_of(message_type), data)

    def decode(self, data: bytes, message_type: Any, *, is_checked: bool = False) -> Any:
        """Raises InvalidArgument, naming the field where there is one."""
        return decode(data, message_type, is_checked=is_checked)


def decode(data: bytes, message_type: type[Any], *, is_checked: bool = False) -> Any:
    """A message as its dataclass. Raises InvalidArgument, naming the field where there is one."""
    shape = shape_of(message_type)
    if len(data) > LARGE_BYTES and not is_checked:
        _check_at_once(shape, data)
        is_checked = True
    try:
        parsed = shape.parse(data)
    except DecodeError:
        # The runtime does not say what it met; our own walk does. It says nothing only if it is more lenient.
        _check_at_once(shape, data)
        raise InvalidArgument(f"the {message_type.__name__} is malformed") from None
    parsed.DiscardUnknownFields()
    # In the one form that every runtime writes, nothing can be wrong: most messages are, and this costs 0.3 µs.
    if not is_checked and parsed.SerializeToString() != data:
        _check_at_once(shape, data)
    return shape.fill(parsed)


def encode(message: Any) -> bytes:
    """Raises TypeError or ValueError when a value does not fit its field."""
    shape = shape_of(type(message))
    try:
        built = shape.build(message)
    except UnicodeEncodeError:
        built = shape.build(message, mended=True)
    # Maps in the order of their keys, so that equal messages are equal bytes.
    return built.SerializeToString(deterministic=True)  # type: ignore[no-any-return]


def _check(shape: Shape, data: bytes) -> Iterator[None]:
    try:
        yield from wire.check(shape.layout, data)
    except wire.Malformed as error:
        where = error.path or f"the {shape.name}"
        raise InvalidArgument(where, error.reason) from None


def _check_at_once(shape: Shape, data: bytes) -> None:
    for _ in _check(shape, data):
        pass
