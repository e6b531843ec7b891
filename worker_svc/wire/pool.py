"""The contract's messages in protobuf's runtime."""

from __future__ import annotations

from typing import Any, Final

from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

from worker_svc.pb.descriptors import FILES

PACKAGE: Final = "jobscheduler"


def _make_pool() -> Any:
    # Not the default pool: another version of the contract may be there, put in by code generated elsewhere.
    pool = DescriptorPool()
    for file in FILES.values():
        pool.AddSerializedFile(file)
    return pool


POOL: Final = _make_pool()


def message_class(name: str) -> Any:
    """By the name in the contract: "QueryJobReq"."""
    return GetMessageClass(POOL.FindMessageTypeByName(f"{PACKAGE}.{name}"))


def answer_class(method: str) -> Any:
    """What the worker's RPC `method` ("QueryJob") answers with."""
    return GetMessageClass(POOL.FindServiceByName(f"{PACKAGE}.Worker").FindMethodByName(method).output_type)
