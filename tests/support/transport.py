"""Calls by hand-made frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

from tests.support.raw_h2 import (
    RawClient,
    prefixed,
)

FOLLOW = b"\x78\x01"  # StreamJobReq.follow

PROTOCOL_ERROR = 1


def works(client: RawClient) -> bool:
    answer = client.answer(client.call())
    return (answer.status, answer.data) == (0, prefixed(b"\x0a\x02hi"))


def unary(channel: grpc.Channel, path: str) -> Callable[[bytes], bytes]:
    call: Any = channel.unary_unary(path)
    return call  # type: ignore[no-any-return]
