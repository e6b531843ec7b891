"""Refusals of the codec."""

from __future__ import annotations

from typing import Any

import pytest

from worker_svc.job import InvalidArgument
from worker_svc.pb import jobscheduler as pb
from worker_svc.wire.codec import decode


def refusal(data: bytes, kind: type[Any] = pb.StartJobReq) -> str:
    with pytest.raises(InvalidArgument) as caught:
        decode(data, kind)
    return caught.value.message
