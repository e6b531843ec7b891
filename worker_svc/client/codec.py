"""The messages on their way: protobuf's runtime at both ends, betterproto's dataclasses for whoever calls."""

from __future__ import annotations

from typing import Any, Final

from google.protobuf.message import DecodeError
from grpclib.const import Status
from grpclib.encoding.base import CodecBase
from grpclib.exceptions import GRPCError

from worker_svc.job import InvalidArgument
from worker_svc.wire.codec import Encoded
from worker_svc.wire.codec.shapes import shape_of


class ClientCodec(CodecBase):
    """For `grpclib.client.Channel(codec=…)`. Unlike the worker's, it does not walk through what it reads: an answer is
    as long as it is, and a newer worker may tell more than we know."""

    __content_subtype__: Final = "proto"

    def encode(self, message: Any, message_type: Any) -> bytes:
        """Raises InvalidArgument, naming the field, for text that is no Unicode (a lone surrogate, as Python makes of a
        stray byte in argv) and for numbers that their field cannot carry; TypeError for what is of the wrong type."""
        if type(message) is Encoded:
            return message.data
        shape = shape_of(message_type)
        try:
            return shape.build(message).SerializeToString()  # type: ignore[no-any-return]
        except UnicodeEncodeError as error:
            # The value stays untold, since it may be secret.
            raise InvalidArgument(shape.field_at_fault(message), "is not valid Unicode") from error
        except ValueError as error:
            raise InvalidArgument(shape.field_at_fault(message), str(error)) from error

    def decode(self, data: bytes, message_type: Any) -> Any:
        """Raises GRPCError with INTERNAL."""
        shape = shape_of(message_type)
        try:
            return shape.fill(shape.parse(data))
        except (DecodeError, InvalidArgument) as error:
            raise GRPCError(Status.INTERNAL, f"the answer is no {message_type.__name__}: {error}") from error
