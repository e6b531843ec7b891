"""One call: its request gathered within limits, its handler run in a task, its answer sent. A stream of grpclib's."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from grpclib.const import Handler as Method
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from grpclib.metadata import Deadline, encode_grpc_message
from grpclib.protocol import Peer
from grpclib.server import Stream as GrpclibStream

from worker_svc.job import InvalidArgument, error_message
from worker_svc.server import http2
from worker_svc.server.heads import Head
from worker_svc.server.sending import OVERHEAD_BYTES
from worker_svc.wire.codec import LARGE_BYTES

if TYPE_CHECKING:
    from worker_svc.server.connection import ServerConnection

log = logging.getLogger(__name__)

_PREFIX_BYTES: Final = 5
_SLOW_BYTES: Final = 128 * 1024
_DEADLINE_SLACK_S: Final = 0.1
# The most that may wait for the client to read it before a stream that sends is made to wait.
_UNSENT_MAX_BYTES: Final = 64 * 1024
_HEADERS: Final = ((b":status", b"200"), (b"content-type", b"application/grpc+proto"))
_OK: Final = ((b"grpc-status", b"0"),)


class Call(GrpclibStream[Any, Any]):
    """What handlers get. `receive` and `end_of_request` are the connection's to call; the rest is grpclib's interface.

    A handler of one request runs when that is whole, one of a stream of requests at once.
    """

    def __init__(self, connection: ServerConnection, stream_id: int, head: Head, method: Method) -> None:
        # Not grpclib's own __init__, which wants a stream of h2.
        self._connection = connection
        self._stream_id = stream_id
        self.head = head
        self.method = method
        self._cardinality = method.cardinality
        self.metadata = head.metadata  # type: ignore[assignment]
        self.user_agent = head.user_agent
        self.deadline = None if head.timeout_s is None else Deadline.from_timeout(head.timeout_s)
        self.since_s = time.monotonic()
        self.waits_since_s = 0.0 if method.cardinality.client_streaming else self.since_s
        """Since when a message is overdue that must come, or be taken; 0: none must."""
        self.task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        if head.timeout_s is not None:
            self._timer = connection.loop.call_later(
                head.timeout_s, self.stop, Status.DEADLINE_EXCEEDED, "the time is up"
            )
        self._buffer = bytearray()
        self._size = -1
        """The size of the message that is arriving; -1: its prefix is not whole."""
        self._requests: deque[bytes] = deque()
        self._has_ended = False
        self._fault: GRPCError | None = None
        """What is wrong with the request: told in place of the next message."""
        self._received = 0
        self._unread_bytes = 0
        """Bytes of requests that are held back from the client's window, since an earlier message is not taken."""
        self._more: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        """Resolved when the client takes more, for who waits for that."""
        self._held_bytes = 0
        """Its part of what may be under way to clients: room that was taken, then what is sent and has not left yet."""
        self._has_begun_answer = False
        self._has_sent = False
        self.is_answered = False
        self._stopped_by: tuple[Status, str] | None = None
        self._refuses_encoding = False

    @property
    def peer(self) -> Peer:  # type: ignore[override]
        return self._connection.peer_of_calls

    @property
    def is_overdue(self) -> bool:
        """Whether the time is up that its caller gave it: then clients reset it by themselves."""
        return self.deadline is not None and self.deadline.time_remaining() < _DEADLINE_SLACK_S

    # The request, as it comes

    def receive(self, data: bytes) -> None:
        if self._fault is not None:
            self._connection.http2.consumed(self._stream_id, len(data))
            return
        self._buffer += data
        if self._is_full:
            self._unread_bytes += len(data)
            return
        self._take_messages()
        # What is held is bounded by what was claimed, or by the client's window while nothing is.
        self._connection.http2.consumed(self._stream_id, len(data))

    @property
    def _is_full(self) -> bool:
        """Whether a request of a stream is held. One is at a time: who does not take it makes the client wait."""
        return self._cardinality.client_streaming and bool(self._requests)

    def _take_messages(self) -> None:
        try:
            while not self._is_full and self._take_message():
                pass
        except GRPCError as fault:
            self._fail(fault)

    def _read_on(self) -> None:
        """A request of a stream was taken."""
        self._connection.charge_message()
        self._take_messages()
        if self._unread_bytes:
            self._connection.http2.consumed(self._stream_id, self._unread_bytes)
            self._unread_bytes = 0
            self._connection.has_to_send()
        self._check_end()

    def _take_message(self) -> bool:
        """Raises GRPCError."""
        if self._size < 0:
            if len(self._buffer) < _PREFIX_BYTES:
                return False
            if (self._received or self._requests) and not self._cardinality.client_streaming:
                raise GRPCError(Status.INVALID_ARGUMENT, "the request has more than one message")
            size = int.from_bytes(self._buffer[1:_PREFIX_BYTES], "big")
            self._check_prefix(self._buffer[0], size)
            if not self._connection.budget.claim(size):
                text = "too much is arriving at once: try again when other requests have been sent"
                raise GRPCError(Status.RESOURCE_EXHAUSTED, text)
            self._size = size
            del self._buffer[:_PREFIX_BYTES]
            self.waits_since_s = self.waits_since_s or time.monotonic()
        if len(self._buffer) < self._size:
            return False
        size = self._size
        self._requests.append(bytes(self._buffer[:size]))
        del self._buffer[:size]
        self._release()
        self.waits_since_s = 0.0
        self._wake()
        return True

    def _check_prefix(self, flag: int, size: int) -> None:
        if flag == 1 and self.head.encoding != "identity":
            self._refuses_encoding = True
            raise GRPCError(Status.UNIMPLEMENTED, f'messages compressed with "{self.head.encoding}" cannot be read')
        if flag:
            raise GRPCError(Status.INVALID_ARGUMENT, "the message is marked as compressed, and no encoding is named")
        most = self._connection.limits.max_message_bytes
        if size > most:
            text = f"the message has {size} bytes: at most {most} are allowed (transport.max_message_bytes)"
            raise GRPCError(Status.RESOURCE_EXHAUSTED, text)

    def end_of_request(self) -> None:
        self._has_ended = True
        self._check_end()

    def _check_end(self) -> None:
        if not self._has_ended or self._is_full:
            return
        if self._size >= 0 or self._buffer:
            self._fail(GRPCError(Status.INVALID_ARGUMENT, "the message is cut off"))
        elif not self._received and not self._requests and not self._cardinality.client_streaming:
            self._fail(GRPCError(Status.INVALID_ARGUMENT, "the request has no message"))
        else:
            self._wake()

    def _fail(self, fault: GRPCError) -> None:
        self._fault = self._fault or fault
        self._buffer.clear()
        self._requests.clear()
        self._release()
        if self._received and not self._cardinality.client_streaming:
            self.stop(fault.status, str(fault.message))  # nobody asks for a next message
            return
        self.waits_since_s = 0.0
        self._wake()

    def _release(self) -> None:
        if self._size >= 0:
            self._connection.budget.release(self._size)
            self._size = -1

    def _wake(self) -> None:
        if self._more is not None and not self._more.done():
            self._more.set_result(None)
        elif self.task is None:
            self._connection.start(self)

    # The handler

    def begin(self) -> None:
        if self.task is None and not self.is_answered:
            self.task = self._connection.loop.create_task(self._serve())

    async def _serve(self) -> None:
        try:
            await self.method.func(self)
            if not self._has_sent and not self._cardinality.server_streaming:
                log.error("%s gave no answer", self.head.path)
                self.answer(Status.INTERNAL, _FAULT)
            else:
                self.answer(Status.OK)
        except GRPCError as error:
            self.answer(error.status, error.message)
        except asyncio.CancelledError:
            if self._stopped_by is not None:
                self.answer(*self._stopped_by)
        except Exception:
            log.exception("%s failed", self.head.path)
            self.answer(Status.INTERNAL, _FAULT)
        finally:
            self.close()

    def stop(self, status: Status, message: str) -> None:
        """Ends the call with this answer, unless it has another by then."""
        if self.is_answered:
            return
        if self.task is None:
            self.answer(status, message)
            self.close()
        else:
            self._stopped_by = (status, message)
            self.task.cancel()

    def end_overdue(self) -> None:
        if self.is_answered:  # and it is not read
            self._connection.http2.reset(self._stream_id, http2.CANCEL)
            self._connection.has_to_send()
        else:
            self.stop(Status.DEADLINE_EXCEEDED, "the request did not arrive in time")

    def drop(self) -> None:
        """The client has left, or the connection is gone."""
        self.is_answered = True
        self.close()
        self._hold(0)
        self._wake_sender()
        if self.task is not None:
            self.task.cancel()

    def close(self) -> None:
        """Lets go of what it needed to be answered; once is enough."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._release()
        self._connection.on_answered(self)

    # grpclib's interface

    async def recv_message(self) -> Any:
        """The next message, None at the end of a stream. Raises GRPCError."""
        if self._received and not self._cardinality.client_streaming:
            return None
        while not self._requests:
            if self._fault is not None:
                raise self._fault
            if self._has_ended:
                return None
            self._more = self._connection.loop.create_future()
            await self._more
        data = self._requests.popleft()
        self._received += 1
        if self._cardinality.client_streaming:
            self._read_on()
        codec = self._connection.codec
        is_large = len(data) > LARGE_BYTES
        try:
            if is_large:
                # A thousand fields in each of the client's turns; then parsing, which takes some 2 ms for each MB.
                for _ in codec.check(data, self.method.request_type):
                    await self._connection.wait_turn()
                if len(data) > _SLOW_BYTES:
                    await self._connection.wait_turn()
            return codec.decode(data, self.method.request_type, is_checked=is_large)
        except InvalidArgument as error:
            raise GRPCError(Status.INVALID_ARGUMENT, error.message) from None

    async def send_initial_metadata(self, *, metadata: Any = None) -> None:
        assert not metadata, "no handler of ours sends any"
        if not self._has_begun_answer:
            self._has_begun_answer = True
            self._connection.http2.respond(self._stream_id, _HEADERS)
            self._connection.has_to_send()

    async def send_message(self, message: Any) -> None:
        """Waits, if it is one of many, until the client has taken most of it."""
        data = self._connection.codec.encode(message, self.method.reply_type)
        del message
        if self.is_answered:  # there is nobody any more
            raise asyncio.CancelledError
        await self.send_initial_metadata()
        self._has_sent = True
        engine = self._connection.http2
        engine.send(self._stream_id, b"\0" + len(data).to_bytes(4, "big") + data)
        self._hold(engine.unsent(self._stream_id))
        self._connection.has_to_send()
        if self._cardinality.server_streaming:
            while self._held_bytes > _UNSENT_MAX_BYTES:
                await self._wait_for_room()

    async def take_room(self, most_bytes: int) -> int:
        """How much to make now, at most. Waits until the client takes more: until then there is nothing to be held."""
        engine, least_bytes = self._connection.http2, most_bytes
        self.give_room()
        if self._cardinality.server_streaming:
            least_bytes = 1
            while (window := engine.stream_window(self._stream_id)) <= 0 or self._held_bytes:
                await self._wait_for_room()
            most_bytes = max(least_bytes, min(most_bytes, window - OVERHEAD_BYTES))
        room_bytes = await self._connection.sending.take_room(most_bytes, least_bytes)
        self._held_bytes += room_bytes
        self._connection.charge_message()
        return room_bytes

    def give_room(self) -> None:
        """Nothing is to be sent for now."""
        self._hold(self._connection.http2.unsent(self._stream_id))

    def _hold(self, size: int) -> None:
        """So much of it is under way to the client now."""
        sending, change = self._connection.sending, size - self._held_bytes
        self._held_bytes = size
        if change > 0:
            sending.take(change)
        elif change:
            sending.give(-change)
        self._connection.is_holding(self, size > 0)

    async def _wait_for_room(self) -> None:
        self._connection.is_holding(self, True)
        self._room = self._connection.loop.create_future()
        await self._room

    def look(self) -> None:
        """Something was sent, or the client takes more."""
        self._hold(self._connection.http2.unsent(self._stream_id))
        if not self._held_bytes and self.is_answered:
            self.waits_since_s = 0.0
        self._wake_sender()

    def _wake_sender(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    async def send_trailing_metadata(
        self, *, status: Status = Status.OK, status_message: str | None = None, **named: Any
    ) -> None:
        self.answer(status, status_message)

    async def cancel(self) -> None:
        self.is_answered = True
        self._connection.http2.reset(self._stream_id, http2.CANCEL)
        self._connection.has_to_send()

    def answer(self, status: Status, message: str | None = None) -> None:
        """The end of the call; only the first one counts."""
        if self.is_answered:
            return
        self.is_answered = True
        trailers = _OK if status is Status.OK else _trailers(status, message)
        if self._refuses_encoding:
            trailers = (*trailers, (b"grpc-accept-encoding", b"identity"))
        engine = self._connection.http2
        if self._has_begun_answer:
            engine.end(self._stream_id, trailers)
        else:
            engine.respond(self._stream_id, (*_HEADERS, *trailers), end=True)
        self.waits_since_s = 0.0 if self._cardinality.server_streaming or not self._held_bytes else time.monotonic()
        if not self._has_ended:
            # The client may still be sending what nobody will read (RFC 9113, 8.1).
            self._connection.reset_after_answer(self._stream_id)
        self._connection.has_to_send()


_FAULT: Final = "internal error: see the worker's log"


def _trailers(status: Status, message: str | None) -> http2.Headers:
    code = (b"grpc-status", str(status.value).encode())
    return (code, (b"grpc-message", encode_grpc_message(error_message(message)).encode())) if message else (code,)


def refusal(status: Status, message: str, http_status: int) -> http2.Headers:
    """The whole answer to what is refused from its headers alone."""
    return ((b":status", str(http_status).encode()), _HEADERS[1], *_trailers(status, message))
