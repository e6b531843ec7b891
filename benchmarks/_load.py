"""A client that costs next to nothing, so that it is not what is measured: HTTP/2 in C, messages as bytes.

As a program: `python -m benchmarks._load ADDRESS`, commands on standard input, one JSON object a line:
{"path", "messages" (hex), "count", "in_flight"}; answers likewise: {"seconds", "p50_ms", "p99_ms", "errors"}. Without
"in_flight" all messages go over one stream of RunJobs, and errors are the results that are missing or no success.
"""

from __future__ import annotations

import json
import select
import socket
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from ngh2 import Configuration, Connection, DataReceived, Role, StreamClosed, TrailersReceived

from worker_svc.wire.pool import message_class

_REPLY = message_class("RunJobsRes").FromString
_HEADERS = (
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":authority", b"bench"),
    (b"content-type", b"application/grpc"),
    (b"te", b"trailers"),
)


class Load:
    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setblocking(False)
        self._http2 = Connection(Role.CLIENT, Configuration(peer_max_concurrent_streams=1024))
        self._http2.initiate_connection()
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)

    def close(self) -> None:
        self._socket.close()

    def run(self, path: str, message: Callable[[int], bytes], count: int, in_flight: int) -> dict[str, Any]:
        """Makes `count` calls, so many at a time. Latencies in ms."""
        http2 = self._http2
        headers = (*_HEADERS, (b":path", path.encode()))
        headers = (*headers[:3], headers[-1], *headers[3:-1])
        begun: dict[int, float] = {}
        taken: list[float] = []
        answers: dict[int, bytes] = {}
        statuses: dict[int, bytes] = {}
        errors = sent = 0
        started = time.perf_counter()
        while len(taken) < count:
            while sent < count and len(begun) < in_flight:
                body = message(sent)
                stream = http2.send_request(headers)
                http2.send_data(stream, b"\0" + len(body).to_bytes(4, "big") + body, end_stream=True)
                begun[stream] = time.perf_counter()
                sent += 1
            while data := http2.data_to_send():
                self._send(data)
            self._poll.poll()
            try:
                http2.receive_data(self._socket.recv(262144) or self._gone())
            except BlockingIOError:
                continue
            now = time.perf_counter()
            for event in http2.events():
                if isinstance(event, StreamClosed):
                    taken.append(now - begun.pop(event.stream_id))
                    errors += statuses.pop(event.stream_id, b"") != b"0"
                elif isinstance(event, TrailersReceived):
                    statuses[event.stream_id] = dict(event.headers).get(b"grpc-status", b"")
                elif isinstance(event, DataReceived):
                    answers[event.stream_id] = event.data
        seconds = time.perf_counter() - started
        cuts = statistics.quantiles(taken, n=100) if len(taken) > 1 else taken * 99
        return {"seconds": seconds, "p50_ms": cuts[49] * 1e3, "p99_ms": cuts[98] * 1e3, "errors": errors}

    def run_jobs(self, path: str, messages: list[bytes], count: int) -> dict[str, Any]:
        http2, body, succeeded = self._http2, bytearray(), 0
        started = time.perf_counter()
        stream = http2.send_request((*_HEADERS[:3], (b":path", path.encode()), *_HEADERS[3:]))
        for message in messages:
            http2.send_data(stream, b"\0" + len(message).to_bytes(4, "big") + message)
        http2.end_stream(stream)
        is_over = False
        while not is_over:
            while data := http2.data_to_send():
                self._send(data)
            self._poll.poll()
            try:
                http2.receive_data(self._socket.recv(262144) or self._gone())
            except BlockingIOError:
                continue
            for event in http2.events():
                is_over |= isinstance(event, StreamClosed)
                if isinstance(event, DataReceived):
                    body += event.data
            while len(body) >= 5 and len(body) >= (end := 5 + int.from_bytes(body[1:5], "big")):
                succeeded += sum(result.job.outcome == 1 for result in _REPLY(bytes(body[5:end])).results)
                del body[:end]
        return {"seconds": time.perf_counter() - started, "errors": count - succeeded}

    def _send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[self._socket.send(view) :]
            except BlockingIOError:
                select.select([], [self._socket], [])

    def _gone(self) -> bytes:
        raise ConnectionError("the server hung up")


def main() -> None:
    load = Load(sys.argv[1])
    for line in sys.stdin:
        asked = json.loads(line)
        messages = [bytes.fromhex(message) for message in asked["messages"]]
        if asked["in_flight"]:
            found = load.run(asked["path"], lambda n: messages[n % len(messages)], asked["count"], asked["in_flight"])  # noqa: B023
        else:
            found = load.run_jobs(asked["path"], messages, asked["count"])
        print(json.dumps(found), flush=True)
    load.close()


if __name__ == "__main__":
    main()
