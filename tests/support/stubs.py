"""Messages and stubs of a .proto file for grpcio, made while the tests run: the peer that is not our own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_tools import protoc

from tests.support.workers import ROOT

OUR_PROTO = ROOT / "protos" / "jobscheduler.proto"
_WELL_KNOWN = str(Path(protoc.__file__).parent / "_proto")


def generate(proto: Path, folder: Path) -> tuple[Any, Any]:
    """The generated modules of messages and of stubs, imported. Only one file of a package can be had this way."""
    _run(["--python_out", str(folder), "--grpc_python_out", str(folder)], proto)
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(f"{proto.stem}_pb2"), importlib.import_module(f"{proto.stem}_pb2_grpc")
    finally:
        sys.path.remove(str(folder))


class Messages:
    """The messages of a .proto file, in a pool of their own: `messages.StartJobReq(command="true")`."""

    def __init__(self, proto: Path, folder: Path) -> None:
        described = folder / f"{proto.stem}.descriptors"
        _run(["--include_imports", "--descriptor_set_out", str(described)], proto)
        self._pool = descriptor_pool.DescriptorPool()
        for file in descriptor_pb2.FileDescriptorSet.FromString(described.read_bytes()).file:
            self._pool.Add(file)

    def __getattr__(self, name: str) -> Any:
        return message_factory.GetMessageClass(self._pool.FindMessageTypeByName(f"jobscheduler.{name}"))

    def call(self, channel: grpc.Channel, method: str) -> Callable[..., Any]:
        """A unary call of the Worker service."""
        request, response = getattr(self, f"{method}Req"), getattr(self, f"{method}Res")
        return channel.unary_unary(
            f"/jobscheduler.Worker/{method}",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )


def raw_call(channel: grpc.Channel, method: str) -> Callable[..., bytes]:
    """As it is on the wire."""
    call: Callable[..., bytes] = channel.unary_unary(f"/jobscheduler.Worker/{method}")
    return call


def _run(arguments: list[str], proto: Path) -> None:
    status = protoc.main(["protoc", f"-I{proto.parent}", f"-I{_WELL_KNOWN}", *arguments, str(proto)])
    assert status == 0, f"protoc failed on {proto}"
