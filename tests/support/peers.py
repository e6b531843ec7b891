"""Clients with certificates, by grpcio: the peer that is not our own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from tests.support.stubs import OUR_PROTO, Messages
from tests.support.workers import PATIENCE_S

STREAMS = {"WatchJobs": "JobTransition", "StreamJob": "OutputChunk"}


class Answer(NamedTuple):
    code: grpc.StatusCode
    details: str
    message: Any = None

    @property
    def name(self) -> str:
        return str(self.code.name)


class Peer:
    """One client's connection."""

    def __init__(self, channel: grpc.Channel, messages: Messages) -> None:
        self.channel = channel
        self.messages = messages

    def call(self, method: str, *, deadline_s: float = PATIENCE_S, **fields: Any) -> Answer:
        """The answer; that of a stream has all its messages."""
        return self.call_with(method, getattr(self.messages, f"{method}Req")(**fields), deadline_s=deadline_s)

    def call_with(self, method: str, request: Any, *, deadline_s: float = PATIENCE_S) -> Answer:
        try:
            if method in STREAMS:
                return Answer(grpc.StatusCode.OK, "", list(self._stream(method, request, deadline_s)))
            return Answer(grpc.StatusCode.OK, "", self.messages.call(self.channel, method)(request, timeout=deadline_s))
        except grpc.RpcError as error:
            call: Any = error
            return Answer(call.code(), call.details() or "")

    def ok(self, method: str, **fields: Any) -> Any:
        answer = self.call(method, **fields)
        assert answer.code is grpc.StatusCode.OK, answer
        return answer.message

    def stream(self, method: str, *, deadline_s: float = PATIENCE_S, **fields: Any) -> Any:
        return self._stream(method, getattr(self.messages, f"{method}Req")(**fields), deadline_s)

    def _stream(self, method: str, request: Any, deadline_s: float) -> Any:
        call = self.channel.unary_stream(
            f"/jobscheduler.Worker/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=getattr(self.messages, STREAMS[method]).FromString,
        )
        return call(request, timeout=deadline_s)

    def start(self, *argv: str, **fields: Any) -> str:
        return str(self.ok("StartJob", command=argv[0], args=argv[1:], **fields).jobID)

    def wait(self, job_id: str) -> Any:
        return self.ok("WaitJob", jobID=job_id).job


class Peers:
    """The peers of one worker: each by the name of a certificate in `certs`, or by none."""

    def __init__(self, certs: Path, folder: Path) -> None:
        self.certs = certs
        self.messages = Messages(OUR_PROTO, folder)

    def credentials(self, name: str = "", ca: str = "ca") -> grpc.ChannelCredentials:
        def read(file: str) -> bytes:
            return (self.certs / file).read_bytes()

        own = (read(f"{name}.key"), read(f"{name}.pem")) if name else (None, None)
        return grpc.ssl_channel_credentials(read(f"{ca}.pem"), *own)

    @contextmanager
    def connect(self, address: str, name: str = "") -> Iterator[Peer]:
        # A subchannel of another test's would else be taken up again.
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        with grpc.secure_channel(address, self.credentials(name), options) as channel:
            yield Peer(channel, self.messages)
