"""One connection: what comes is counted and portioned, what is too much ends it, and it ends with a GOAWAY."""

from __future__ import annotations

import asyncio
import logging
import math
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, cast

from grpclib.config import Configuration
from grpclib.protocol import H2Protocol, _set_nodelay
from h2.config import H2Configuration
from h2.connection import ConnectionState
from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError

from worker_svc.config import TransportConfig
from worker_svc.server import gate
from worker_svc.server.admission import Place
from worker_svc.server.calls import CallHandler
from worker_svc.server.gate import Abuse, FrameGate
from worker_svc.server.h2_connection import (
    CONNECTION_WINDOW_BYTES,
    HEADER_HARD_FACTOR,
    CountedConnection,
    LenientProcessor,
    ServerH2Connection,
)
from worker_svc.server.rates import ReceiveBudget, RequestRates, TokenBucket
from worker_svc.server.sending import SendBudget, Sending
from worker_svc.server.turns import Turns

log = logging.getLogger(__name__)

# A call dropped this soon after it was made is no change of mind.
_EARLY_RESET_S: Final = 1.0
_RESET_BURST_S: Final = 2
_CONTROL_BURST_S: Final = 10
_SETTINGS_COST: Final = 4
_SMALL_DATA_BYTES: Final = 64
# Whose connection was ended for abuse begins the next one with so much less, for so long.
_PROBATION_S: Final = 10.0
_PROBATION_PART: Final = 20
# A client that goes on after a request was refused for its rate is read from no faster than this.
_THROTTLE_S: Final = 0.02
# How long a connection that ends waits for the client to read why, and to hang up.
_LINGER_S: Final = 0.5
# A client of grpclib's drops an answer that it reads together with a GOAWAY.
_ANSWER_FIRST_S: Final = 0.1
_LINGER_MAX_BYTES: Final = 1024 * 1024
# Unsent, beyond which a client is not read from: what it asks for is what it does not read.
_UNSENT_MAX_BYTES: Final = 1024 * 1024
READ_BYTES: Final = 64 * 1024
# Of the loop's time, what answering a call takes at the least, besides reading it.
_CALL_S: Final = 0.0003
_MESSAGE_S: Final = 0.0001
_LOOK_S: Final = 0.000005


@dataclass
class Shared:
    """What all connections of a server have in common."""

    limits: TransportConfig
    mapping: dict[str, Any]
    codec: Any
    status_details_codec: Any
    dispatch: Any
    grpclib_config: Configuration
    h2_config: H2Configuration
    rates: RequestRates
    receiving: ReceiveBudget
    sending: SendBudget
    turns: Turns
    identify: Callable[[asyncio.BaseTransport, str], str]
    expiry_s: Callable[[ssl.SSLObject], float]
    # One for all: it is filled and emptied within one turn of the loop.
    read_buffer: memoryview
    probation: dict[str, float] = field(default_factory=dict)
    """Until when, by peer."""


class ServerProtocol(H2Protocol, asyncio.BufferedProtocol):
    connection: CountedConnection
    processor: LenientProcessor
    sending: Sending

    def __init__(
        self,
        shared: Shared,
        place: Place,
        on_made: Callable[[ServerProtocol], None],
        on_lost: Callable[[ServerProtocol], None],
    ) -> None:
        self.shared = shared
        self.peer = peer = place.peer
        self._place = place
        self.budget = shared.receiving.share()
        self.is_leaving = False
        """Whether new calls are refused."""
        self.calls = CallHandler(self, shared.mapping, shared.codec, shared.status_details_codec, shared.dispatch)
        super().__init__(self.calls, shared.grpclib_config, shared.h2_config)
        limits, now_s = shared.limits, time.monotonic()
        self._on_made = on_made
        self._on_lost = on_lost
        self.is_made = False
        self._transport: asyncio.Transport | None = None
        self.identity = peer
        self._gate = FrameGate()
        part = 1 / _PROBATION_PART if now_s < shared.probation.get(peer, 0.0) else 1.0
        control, resets = limits.control_frames_per_s, limits.resets_per_s
        self._control = TokenBucket(control, part * _CONTROL_BURST_S * control, now_s)
        self._refusals = TokenBucket(resets, _RESET_BURST_S * resets, now_s)
        self._resets = TokenBucket(resets, part * _RESET_BURST_S * resets, now_s)
        self._pending = b""
        """Read, and not yet passed on."""
        self._is_queued = False
        """Whether what is pending will be gone on with without more being read."""
        self._later: asyncio.TimerHandle | None = None
        self._must_slow_down = False
        self._is_ending = False
        self._discarded = 0
        self._goodbye: asyncio.TimerHandle | None = None
        self._lingering: asyncio.TimerHandle | None = None
        self._now_s = self._opened_s = self._heard_s = self._idle_since_s = now_s
        self._has_begun = False
        self._expires_s = math.inf
        """By the wall clock."""
        self._partial_since_s = 0.0
        self._header_bytes = 0
        """Of the header block that is arriving."""
        self._header_since_s = 0.0
        self._pinged_s = 0.0

    @property
    def tls(self) -> ssl.SSLObject | None:
        return None if self._transport is None else self._transport.get_extra_info("ssl_object")

    # Reading

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.identity = self.shared.identify(transport, self.peer)
        self._expires_s = math.inf if self.tls is None else self.shared.expiry_s(self.tls)
        self._place.drop = self._transport.abort
        if self.identity != self.peer:
            self._place.keep()  # by its certificate
        sock = transport.get_extra_info("socket")
        if sock is not None:
            _set_nodelay(sock)
        limits = self.shared.limits
        h2 = ServerH2Connection(
            self.h2_config, max_header_bytes=limits.max_header_bytes, max_streams=limits.max_streams
        )
        h2.initiate_connection()
        h2.increment_flow_control_window(CONNECTION_WINDOW_BYTES - h2.inbound_flow_control_window)
        self.connection = CountedConnection(h2, self._transport, config=self.config)
        self.connection.control = self._control
        self.connection.flush()
        self.processor = LenientProcessor(self.handler, self.connection)
        self.sending = Sending(self.shared.sending, self.identity, self.connection)
        self.is_made = True
        self._on_made(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.shared.read_buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._heard_s = time.monotonic()
        self._pinged_s = 0.0
        if self._is_ending:
            self._discarded += nbytes
            if self._discarded > _LINGER_MAX_BYTES:
                self._close_now()
            return
        self._pending += bytes(self.shared.read_buffer[:nbytes])
        self._queue()

    def _queue(self) -> None:
        if self._is_queued or self._transport is None:
            return
        self._is_queued = True
        self._later = None
        self.shared.turns.submit(self.identity, self._work)
        if self._is_queued:
            self._transport.pause_reading()

    def _work(self) -> None:
        """Passes on one portion; what is left waits for the client's next turn, and nothing more is read meanwhile."""
        self._is_queued = False
        transport = self._transport
        if self._is_ending or transport is None or transport.is_closing():
            return
        self._now_s = time.monotonic()
        try:
            end = self._gate.portion(self._pending, self._on_frame)
        except Abuse as abuse:
            self._end_abuse(abuse)
            return
        portion, self._pending = self._pending[:end], self._pending[end:]
        if not self._feed(portion):
            return
        is_partial = self._gate.is_within_frame or bool(self._pending)
        self._partial_since_s = (self._partial_since_s or self._now_s) if is_partial else 0.0
        delay_s = _THROTTLE_S if self._must_slow_down else 0.0
        self._must_slow_down = False
        if transport.get_write_buffer_size() > _UNSENT_MAX_BYTES:
            transport.pause_reading()  # resume_writing goes on
        elif delay_s:
            transport.pause_reading()
            self._later = self.calls.loop.call_later(delay_s, self._queue)
        elif gate.has_head(self._pending):
            self._queue()
        else:
            transport.resume_reading()

    def _feed(self, portion: bytes) -> bool:
        """Returns whether the connection lives on."""
        try:
            events = self.connection.feed(portion)
            self.connection.flush()
            for event in events:
                self.processor.process(event)
            self.sending.let_on()
            self.connection.flush()
        except Abuse as abuse:
            self._end_abuse(abuse)
        except ProtocolError as error:
            log.info("connection of %s ended: %s", self.peer, error)
            self.end(ErrorCodes.PROTOCOL_ERROR, str(error))  # h2 has mostly said so by itself
        except Exception:
            # A fault of ours or of h2's must end this connection only.
            log.exception("connection of %s failed", self.peer)
            self.end(ErrorCodes.INTERNAL_ERROR, "internal error")
        return not self._is_ending

    def _end_abuse(self, abuse: Abuse) -> None:
        log.info("connection of %s ended: %s", self.peer, abuse.reason)
        self.shared.probation[self.peer] = self._now_s + _PROBATION_S
        self.end(abuse.code, abuse.reason)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.sending.let_on()
        if self._later is None:
            self._queue()

    # Counting

    def _on_frame(self, kind: int, length: int, flags: int, stream_id: int) -> None:
        """Raises Abuse."""
        if not self._has_begun:
            self._has_begun = True
            self._place.keep()
        self._partial_since_s = 0.0
        match kind:
            case gate.DATA:
                if length < _SMALL_DATA_BYTES and not flags & gate.END_STREAM:
                    self._count_control()
            case gate.HEADERS | gate.CONTINUATION:
                self._on_header_frame(kind, length, flags)
            case gate.RST_STREAM:
                self._on_reset_frame(stream_id)
            case gate.WINDOW_UPDATE:
                self._count_control()
                if not stream_id:  # all streams look whether it is for them
                    self.shared.turns.charge(self.identity, _LOOK_S * len(self.calls.running))
            case gate.SETTINGS:
                self._count_control(1 if flags & gate.ACK else _SETTINGS_COST)
            case _:
                self._count_control()

    def _on_reset_frame(self, stream_id: int) -> None:
        """A stream is charged once. Of one that is closed, a client has to answer each frame that was under way."""
        stream = self.processor.streams.get(stream_id)
        if stream is None or stream.created is None:
            self._count_control()  # for which it has credit
            return
        if self._now_s - stream.created < _EARLY_RESET_S and not self.calls.is_overdue(stream):
            self.count_reset()
        stream.created = None  # charged: more of them may follow before h2 sees this one

    def _on_header_frame(self, kind: int, length: int, flags: int) -> None:
        if kind == gate.HEADERS:
            self._header_bytes = 0
            self._header_since_s = self._now_s
        else:
            self._count_control()
        self._header_bytes += length
        if self._header_bytes > HEADER_HARD_FACTOR * self.shared.limits.max_header_bytes:
            raise Abuse(ErrorCodes.ENHANCE_YOUR_CALM, "too large a header block")
        if flags & gate.END_HEADERS:
            self._header_since_s = 0.0

    def _count_control(self, cost: int = 1) -> None:
        if not self._control.take(self._now_s, cost):
            raise Abuse(ErrorCodes.ENHANCE_YOUR_CALM, "too many control frames")

    def count_reset(self) -> None:
        """A stream that was for nothing: reset by the client at once, or by us as malformed. Raises Abuse."""
        if not self._resets.take(self._now_s):
            raise Abuse(ErrorCodes.ENHANCE_YOUR_CALM, "too many resets")

    def count_refusal(self) -> None:
        """Who goes on to ask for what is refused is read from slowly: each costs nearly what a call does."""
        if not self._refusals.take(self._now_s):
            self._must_slow_down = True

    def may_request(self) -> bool:
        self.shared.turns.charge(self.identity, _CALL_S)
        if self.shared.rates.take(self.identity, self._now_s):
            return True
        self._must_slow_down = True
        return False

    def charge_message(self) -> None:
        self.shared.turns.charge(self.identity, _MESSAGE_S)

    async def wait_turn(self) -> None:
        await self.shared.turns.wait(self.identity)

    # Time

    @property
    def _is_held(self) -> bool:
        """Whether it is us for whom what came has to wait."""
        return self._is_queued or self._later is not None

    def sweep(self, now_s: float) -> None:
        """Ends what has been quiet for too long. Called about once a second."""
        limits = self.shared.limits
        transport = self._transport
        if self._is_ending or transport is None:
            return
        if not self._has_begun and now_s - self._opened_s > limits.connect_timeout_s:
            transport.abort()
            return
        for since_s in (self._partial_since_s, self._header_since_s):
            if since_s and now_s - since_s > limits.request_timeout_s and not self._is_held:
                self.end(ErrorCodes.ENHANCE_YOUR_CALM, "a frame did not arrive in time")
                return
        self.leave_if_expired()
        self.calls.end_overdue(now_s - limits.request_timeout_s)
        if limits.idle_timeout_s and not self.calls.running and now_s - self._idle_since_s > limits.idle_timeout_s:
            self.end(ErrorCodes.NO_ERROR, "idle")
            return
        if limits.keepalive_s and now_s - self._heard_s > limits.keepalive_s:
            if not self._pinged_s:
                self._pinged_s = now_s
                self.connection._connection.ping(b"worker?!")
                self.connection.flush()
            elif now_s - self._pinged_s > limits.keepalive_timeout_s:
                transport.abort()

    def on_call_end(self) -> None:
        self._idle_since_s = time.monotonic()
        if self.is_leaving:
            self._leave_soon()

    # Ending

    def leave_if_expired(self) -> None:
        """OpenSSL looks at certificates in handshakes only."""
        if not self.is_leaving and time.time() >= self._expires_s:
            log.info("connection of %s takes no new calls: its certificate has expired", self.identity)
            self.leave()

    def leave(self) -> None:
        """No new calls from now on; GOAWAY once those that run have ended."""
        self.is_leaving = True
        self._leave_soon()

    def _leave_soon(self) -> None:
        if self._goodbye is not None:
            self._goodbye.cancel()
        if not self.calls.running:
            wait_s = max(0.0, self._idle_since_s + _ANSWER_FIRST_S - time.monotonic())
            self._goodbye = self.calls.loop.call_later(wait_s, self.say_goodbye)

    def say_goodbye(self) -> None:
        self.end(ErrorCodes.NO_ERROR, "shutting down")

    def end(self, code: ErrorCodes, reason: str) -> None:
        """GOAWAY, and soon the end of the connection; calls that run are cancelled."""
        transport = self._transport
        if self._is_ending or transport is None or transport.is_closing():
            return
        self._is_ending = True
        self._pending = b""
        h2 = self.connection._connection
        if h2.state_machine.state is not ConnectionState.CLOSED:
            h2.close_connection(code, additional_data=reason.encode())
        self.connection.flush()
        self.calls.close()
        for stream in self.processor.streams.values():
            stream.__terminated__(reason)
        # To close at once, with bytes of the client unread, would be a TCP reset: it could lose the GOAWAY.
        self._lingering = self.calls.loop.call_later(_LINGER_S, self._close_now)
        transport.resume_reading()

    def _close_now(self) -> None:
        assert self._transport is not None
        if self._transport.get_write_buffer_size():
            self._transport.abort()  # it does not read what we say either
        else:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._is_ending = True
        for handle in (self._later, self._goodbye, self._lingering):
            if handle is not None:
                handle.cancel()
        super().connection_lost(exc)
        self._transport = None
        self._place.leave()
        self.calls.let_go()
        self._on_lost(self)
