"""One call: accepted or refused from its headers alone, then read, run and answered. After grpclib's `server.py`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final, cast

from grpclib.const import Handler as Method
from grpclib.const import Status
from grpclib.exceptions import GRPCError, StreamTerminatedError
from grpclib.metadata import Deadline, encode_grpc_message
from grpclib.protocol import Stream as H2Stream
from grpclib.server import Handler
from grpclib.server import Stream as GrpclibStream
from grpclib.utils import DeadlineWrapper, Wrapper
from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError as H2ProtocolError

from worker_svc.codec import LARGE_BYTES, MessageCodec
from worker_svc.job import InvalidArgument
from worker_svc.server.heads import Head, Malformed, Pairs, Refused, read_head
from worker_svc.server.sending import OVERHEAD_BYTES

if TYPE_CHECKING:
    from worker_svc.server.protocol import ServerProtocol

log = logging.getLogger(__name__)

DRAINING: Final = "the worker is shutting down: connect again, and go on from where you were"

_PREFIX_BYTES: Final = 5
_SLOW_BYTES: Final = 128 * 1024
_DEADLINE_SLACK_S: Final = 0.1
# Of the most streams, the part that calls which last may not take: there is always room for a StopJob.
_KEPT_FREE: Final = 8
_LASTING_UNARY: Final = frozenset({"/jobscheduler.Worker/WaitJob"})


class Call(GrpclibStream[Any, Any]):
    """grpclib's stream, which reads strictly and within limits, and holds little of what it has to send."""

    def __init__(self, *args: Any, protocol: ServerProtocol, encoding: str, **named: Any) -> None:
        super().__init__(*args, **named)
        limits = protocol.shared.limits
        self._budget = protocol.budget
        self._wait_turn = protocol.wait_turn
        self._sending = protocol.sending
        self._charge_message = protocol.charge_message
        self._room_bytes = 0
        """Taken of what may be under way to the client."""
        self._max_bytes = limits.max_message_bytes
        self._encoding = encoding
        self._refuses_encoding = False
        self.waits_since_s = 0.0 if self._cardinality.client_streaming else time.monotonic()
        """Since when a message is overdue that must come, or be taken; 0: none must."""

    async def recv_message(self) -> Any:
        """The next message, None at the end of a stream. Raises GRPCError."""
        if self._messages_received and not self._cardinality.client_streaming:
            return None
        data = await self._receive()
        if data is None:
            if self._cardinality.client_streaming:
                return None
            raise GRPCError(Status.INVALID_ARGUMENT, "the request has no message")
        codec = self._codec
        assert isinstance(codec, MessageCodec)
        is_large = len(data) > LARGE_BYTES
        try:
            if is_large:
                # A thousand fields in each of the client's turns; then parsing, which takes some 2 ms for each MB.
                for _ in codec.check(data, self._recv_type):
                    await self._wait_turn()
                if len(data) > _SLOW_BYTES:
                    await self._wait_turn()
            message = codec.decode(data, self._recv_type, is_checked=is_large)
        except InvalidArgument as error:
            raise GRPCError(Status.INVALID_ARGUMENT, error.message) from None
        (message,) = await self._dispatch.recv_message(message)
        connection = self._stream.connection
        self._messages_received += 1
        connection.messages_received += 1
        connection.last_message_received = time.monotonic()
        return message

    async def _receive(self) -> bytes | None:
        prefix = await self._read(_PREFIX_BYTES)
        if not prefix:
            return None
        size = int.from_bytes(prefix[1:], "big")
        self._check_prefix(prefix[0], size)
        if not self._budget.claim(size):
            text = "too much is arriving at once: try again when other requests have been sent"
            raise GRPCError(Status.RESOURCE_EXHAUSTED, text)
        self.waits_since_s = self.waits_since_s or time.monotonic()
        try:
            data = await self._read(size)
        finally:
            self._budget.release(size)
        if len(data) != size:
            raise GRPCError(Status.INVALID_ARGUMENT, f"the message is cut off: of {size} bytes none came")
        self.waits_since_s = 0.0
        return data

    def _check_prefix(self, flag: int, size: int) -> None:
        if flag == 1 and self._encoding != "identity":
            self._refuses_encoding = True
            raise GRPCError(Status.UNIMPLEMENTED, f'messages compressed with "{self._encoding}" cannot be read')
        if flag:
            raise GRPCError(Status.INVALID_ARGUMENT, "the message is marked as compressed, and no encoding is named")
        if size > self._max_bytes:
            text = f"the message has {size} bytes: at most {self._max_bytes} are allowed (transport.max_message_bytes)"
            raise GRPCError(Status.RESOURCE_EXHAUSTED, text)

    async def _read(self, size: int) -> bytes:
        try:
            return await self._stream.recv_data(size)
        except AssertionError:  # grpclib's way to say so
            raise GRPCError(Status.INVALID_ARGUMENT, "the message is cut off") from None

    async def take_room(self, most_bytes: int) -> int:
        """How much to make now, at most. Waits until the client takes more: until then there is nothing to be held."""
        self.give_room()
        least_bytes = most_bytes
        if self._cardinality.server_streaming:
            least_bytes = 1
            while (window := self._stream_window()) <= 0:
                self._stream.window_updated.clear()
                await self._stream.window_updated.wait()
            most_bytes = max(least_bytes, min(most_bytes, window - OVERHEAD_BYTES))
        self._room_bytes = await self._sending.take_room(most_bytes, least_bytes)
        self._charge_message()
        return self._room_bytes

    def _stream_window(self) -> int:
        stream = self._stream._h2_connection.streams.get(cast(int, self._stream.id))
        return stream.outbound_flow_control_window if stream else 1  # closed: whoever sends is told

    def give_room(self) -> None:
        """Nothing is to be sent for now."""
        size, self._room_bytes = self._room_bytes, 0
        if size:
            self._sending.give(size)

    async def send_message(self, message: Any) -> None:
        if not self._send_initial_metadata_done:
            await self.send_initial_metadata()
        (message,) = await self._dispatch.send_message(message)
        encoded = self._codec.encode(message, self._send_type)
        data = b"".join((b"\0", len(encoded).to_bytes(4, "big"), encoded))
        del message, encoded
        self.give_room()
        self._room_bytes = len(data)
        self._sending.take(len(data))
        self.waits_since_s = 0.0 if self._cardinality.server_streaming else time.monotonic()
        try:
            await self._stream.send_data(data)
        finally:
            self.waits_since_s = 0.0
            self.give_room()
        self._send_message_done = True
        connection = self._stream.connection
        self._messages_sent += 1
        connection.messages_sent += 1
        connection.last_message_sent = time.monotonic()

    async def send_trailing_metadata(self, **named: Any) -> None:
        if not self._refuses_encoding:
            await super().send_trailing_metadata(**named)
            return
        # Says which encodings there are instead; grpclib lets nobody set such a header.
        await self._stream.send_headers(
            [
                (":status", "200"),
                ("content-type", self._content_type),
                ("grpc-status", str(Status.UNIMPLEMENTED.value)),
                ("grpc-message", encode_grpc_message(named["status_message"])),
                ("grpc-accept-encoding", "identity"),
            ],
            end_stream=True,
        )
        self._send_trailing_metadata_done = True
        if self._stream.closable:
            self._stream.reset_nowait()


class CallHandler(Handler):
    """The calls of one connection."""

    def __init__(self, protocol: ServerProtocol, *args: Any) -> None:
        super().__init__(*args)
        self._protocol = protocol
        self._limits = protocol.shared.limits
        self._lasting: set[H2Stream] = set()
        self.running: dict[H2Stream, Call | None] = {}

    def accept(self, stream: H2Stream, headers: Any, release_stream: Callable[[], Any]) -> None:
        """Starts the call, or answers at once: whatever is refused here costs no task."""
        protocol = self._protocol
        protocol.leave_if_expired()
        if protocol.is_leaving or len(self.running) >= self._limits.max_streams:
            # Nothing was processed: the client may repeat the call elsewhere (RFC 9113, 8.7).
            self._reset(stream, ErrorCodes.REFUSED_STREAM, release_stream)
            return
        try:
            head = read_head(
                cast(Pairs, headers),
                max_bytes=self._limits.max_header_bytes,
                max_metadata=self._limits.max_metadata,
            )
            method = self.mapping.get(head.path)
            is_lasting = self._admit(head, method)
        except Malformed as malformed:
            log.debug("malformed request: %s", malformed)
            self._reset(stream, ErrorCodes.PROTOCOL_ERROR, release_stream)
            protocol.count_reset()
            return
        except Refused as refused:
            protocol.count_refusal()
            self._refuse(stream, refused, release_stream)
            return
        assert method is not None
        self.__gc_step__()
        self.running[stream] = None
        if is_lasting:
            self._lasting.add(stream)
        self._tasks[stream] = self.loop.create_task(self._serve(stream, head, method, release_stream))

    def is_overdue(self, stream: H2Stream) -> bool:
        """Whether the time is up that its caller gave it: then clients reset it by themselves."""
        call = self.running.get(stream)
        return call is not None and call.deadline is not None and call.deadline.time_remaining() < _DEADLINE_SLACK_S

    def cancel(self, stream: H2Stream) -> None:
        # Its place is free at once: the client may have sent the next call right behind the reset.
        self._forget(stream)
        super().cancel(stream)

    def let_go(self) -> None:
        """When the connection is gone. Otherwise what it took would stay until Python looks for cycles, and a search
        through what thousands of connections left behind holds up everybody.
        """
        del self._protocol

    def _forget(self, stream: H2Stream) -> None:
        self.running.pop(stream, None)
        self._lasting.discard(stream)

    def _admit(self, head: Head, method: Method | None) -> bool:
        """Whether the call may last. Raises Refused."""
        if not self._protocol.may_request():
            text = "too many requests from this client: slow down (transport.requests_per_s)"
            raise Refused(Status.RESOURCE_EXHAUSTED, text)
        if method is None:
            raise Refused(Status.UNIMPLEMENTED, f"there is no method {head.path}")
        if head.timeout_s == 0:
            raise Refused(Status.DEADLINE_EXCEEDED, "the time was up before the call began")
        is_lasting = method.cardinality.server_streaming or head.path in _LASTING_UNARY
        most = self._limits.max_streams - self._limits.max_streams // _KEPT_FREE
        if is_lasting and len(self._lasting) >= most:
            text = f"this connection has {most} streams and waits already: use another one"
            raise Refused(Status.RESOURCE_EXHAUSTED, text)
        return is_lasting

    def _reset(self, stream: H2Stream, code: ErrorCodes, release_stream: Callable[[], Any]) -> None:
        if stream.closable:
            stream.reset_nowait(code)
        release_stream()

    def _refuse(self, stream: H2Stream, refused: Refused, release_stream: Callable[[], Any]) -> None:
        headers = [
            (":status", str(refused.http_status)),
            ("content-type", "application/grpc+proto"),
            ("grpc-status", str(refused.status.value)),
            ("grpc-message", encode_grpc_message(refused.message)),
        ]
        if stream.closable:
            stream._h2_connection.send_headers(cast(int, stream.id), headers, end_stream=True)
            if stream.closable:
                stream.reset_nowait()
            stream.connection.flush()
        release_stream()

    async def _serve(self, stream: H2Stream, head: Head, method: Method, release_stream: Callable[[], Any]) -> None:
        protocol = self._protocol
        deadline = None if head.timeout_s is None else Deadline.from_timeout(head.timeout_s)
        try:
            call = Call(
                stream, head.path, method.cardinality, method.request_type, method.reply_type,
                codec=self.codec, status_details_codec=self.status_details_codec, dispatch=self.dispatch,
                deadline=deadline, user_agent=head.user_agent, protocol=protocol, encoding=head.encoding,
            )  # fmt: skip
            if stream in self.running:
                self.running[stream] = call
            try:
                async with call:
                    await self._run(call, stream, head, method, deadline)
            finally:
                call.give_room()
        except (H2ProtocolError, StreamTerminatedError) as error:
            log.debug("the client went away before it was answered: %s", error)
        except Exception:
            # Nobody awaits this task: the last chance to say what a fault of ours was.
            log.exception("the answer to %s could not be sent", head.path)
        finally:
            self._forget(stream)
            release_stream()
            protocol.on_call_end()

    async def _run(self, call: Call, stream: H2Stream, head: Head, method: Method, deadline: Deadline | None) -> None:
        wrapper: Wrapper
        if deadline is None:
            wrapper = stream.wrapper = Wrapper()
            in_time: Any = nullcontext()
        else:
            timed = wrapper = stream.wrapper = DeadlineWrapper()
            in_time = timed.start(deadline)
        try:
            with in_time, wrapper:
                call.metadata, function = await self.dispatch.recv_request(
                    cast(Any, head.metadata),
                    method.func,
                    method_name=head.path,
                    deadline=deadline,
                    content_type=head.content_type,
                    user_agent=head.user_agent,
                    peer=call.peer,
                )
                await function(call)
        except GRPCError:
            raise
        except StreamTerminatedError as error:
            call._cancel_done = True  # the client has left: there is nobody to answer
            # grpclib's wrapper keeps the error, which keeps the frames, which keep the wrapper.
            error.__traceback__ = error.__cause__ = error.__context__ = None
        except H2ProtocolError:
            if stream.closable:
                raise
            call._cancel_done = True
        except TimeoutError:
            if wrapper.cancelled or wrapper.cancel_failed or (deadline and not deadline.time_remaining()):
                raise GRPCError(Status.DEADLINE_EXCEEDED, "the time is up") from None
            log.exception("%s failed", head.path)
            raise GRPCError(Status.INTERNAL, "internal error: see the worker's log") from None
        except Exception:
            log.exception("%s failed", head.path)
            raise GRPCError(Status.INTERNAL, "internal error: see the worker's log") from None

    def end_overdue(self, before_s: float) -> None:
        """Ends the calls whose request is still not whole, or whose answer is not taken."""
        for stream, call in list(self.running.items()):
            if call is not None and 0 < call.waits_since_s < before_s:
                what = "the answer was not read" if call._send_initial_metadata_done else "the request did not arrive"
                self._end(stream, Status.DEADLINE_EXCEEDED, f"{what} in time")

    def end_all(self) -> None:
        for stream in list(self.running):
            self._end(stream, Status.UNAVAILABLE, DRAINING)

    def _end(self, stream: H2Stream, status: Status, message: str) -> None:
        if stream.wrapper is not None:
            stream.wrapper.cancel(GRPCError(status, message))
