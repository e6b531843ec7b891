"""One connection: what it reads goes to the engine when its client has a turn, its calls are admitted and started, and
what there is to say goes out in one write a turn of the loop. What is too much ends it, and it ends with a GOAWAY."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, cast

from grpclib.const import Handler as Method
from grpclib.const import Status
from grpclib.protocol import Peer

from worker_svc.config import TransportConfig
from worker_svc.server import http2
from worker_svc.server.admission import Place
from worker_svc.server.call import Call, refusal
from worker_svc.server.heads import Head, Malformed, Refused, read_head
from worker_svc.server.http2 import Http2, Http2Error
from worker_svc.server.rates import ReceiveBudget, RequestRates
from worker_svc.server.sending import SendBudget, Sending
from worker_svc.server.turns import Turns
from worker_svc.token_bucket import TokenBucket
from worker_svc.wire.statuses import DRAINING

if TYPE_CHECKING:
    from collections.abc import Mapping

log = logging.getLogger(__name__)


# A call dropped this soon after it was made is no change of mind.
_EARLY_RESET_S: Final = 1.0
_RESET_BURST_S: Final = 2
_CONTROL_BURST_S: Final = 10
_CONTROL_COSTS: Final = {
    http2.PingReceived: 1,
    http2.PingAcknowledged: 1,
    http2.SettingsReceived: 4,
    http2.WindowUpdated: 1,
}
# What a write of ours may bring about of the client's: WINDOW_UPDATEs, a PING to measure the round trip.
_CREDIT: Final = 4
_CREDIT_EVERY_BYTES: Final = 4096
_CREDIT_MAX: Final = 16_384
# Whose connection was ended for abuse begins the next one with so much less, for so long.
_PROBATION_S: Final = 10.0
_PROBATION_PART: Final = 20
# A client that goes on after a request was refused for its rate is read from no faster than this.
_THROTTLE_S: Final = 0.02
# How long a connection that ends waits for the client to read why, and to hang up.
_LINGER_S: Final = 0.5
_LINGER_MAX_BYTES: Final = 1024 * 1024
# A client of grpclib's drops an answer that it reads together with a GOAWAY.
_ANSWER_FIRST_S: Final = 0.1
# In one write, and unsent beyond which no more is made ready: the client does not read.
_WRITE_BYTES: Final = 256 * 1024
_UNSENT_MAX_BYTES: Final = 256 * 1024
READ_BYTES: Final = 64 * 1024
# This much of what was read is dealt with in one turn, for about as long as this; the rest waits for the next.
_PORTION_BYTES: Final = 16 * 1024
_PORTION_S: Final = 0.001
# So much goes to the engine at once. HPACK makes 4 kB of headers of one byte, so even little can become megabytes.
_PIECE_BYTES: Final = 1024
# Calls that wait for a turn, beyond which their connection is not read from.
_BACKLOG: Final = 64
# The least time of the loop that answering a call takes, besides reading it.
_CALL_S: Final = 0.0002
_MESSAGE_S: Final = 0.0001
# The part of the most streams that calls which last may not take: there is always room for a StopJob.
_KEPT_FREE: Final = 8
# What these do not take must leave room in the connection's window for the other calls.
_REQUEST_STREAMS_MAX: Final = 3
_LASTING_UNARY: Final = frozenset({"/jobscheduler.Worker/WaitJob"})


@dataclass
class Shared:
    """What all connections of a server have in common."""

    limits: TransportConfig
    mapping: Mapping[str, Method]
    codec: Any
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


class ServerConnection(asyncio.BufferedProtocol):
    def __init__(
        self,
        shared: Shared,
        place: Place,
        on_made: Callable[[ServerConnection], None],
        on_lost: Callable[[ServerConnection], None],
    ) -> None:
        self._shared = shared
        self.limits, self.codec = shared.limits, shared.codec
        self.loop = asyncio.get_running_loop()
        self.peer = peer = place.peer
        self._place = place
        self.budget = shared.receiving.share()
        self.http2 = Http2(max_streams=self.limits.max_streams, max_header_bytes=self.limits.max_header_bytes)
        self.is_leaving = False
        """Whether new calls are refused."""
        self.is_made = False
        self._on_made, self._on_lost = on_made, on_lost
        self._transport: asyncio.Transport | None = None
        self.identity = peer
        self.sending = Sending(shared.sending, peer, self.http2)
        self.calls: dict[int, Call] = {}
        """By their streams, until these are closed."""
        self._lasting: set[Call] = set()
        self._holding: dict[Call, None] = {}
        """Those that hold what they have sent until it leaves, or wait for the client to take more."""
        self._to_reset: list[int] = []
        now_s = time.monotonic()
        part = 1 / _PROBATION_PART if now_s < shared.probation.get(peer, 0.0) else 1.0
        resets = self.limits.resets_per_s
        control = self.limits.control_frames_per_s
        self._resets = TokenBucket(resets, part * _RESET_BURST_S * resets, now_s)
        self._refusals = TokenBucket(resets, _RESET_BURST_S * resets, now_s)
        self._control = TokenBucket(control, part * _CONTROL_BURST_S * control, now_s)
        self._pending = bytearray()
        """Read, and not yet dealt with."""
        self._is_queued = False
        self._backlog = 0
        """Calls that wait for a turn."""
        self._later: asyncio.TimerHandle | None = None
        self._must_slow_down = False
        self._flushing: asyncio.Handle | None = None
        self._is_ending = False
        self._discarded = 0
        self._goodbye: asyncio.TimerHandle | None = None
        self._lingering: asyncio.TimerHandle | None = None
        self._now_s = self._opened_s = self._heard_s = self._idle_since_s = now_s
        self._has_begun = False
        self._expires_s = math.inf
        """By the wall clock."""
        self._pinged_s = 0.0

    @property
    def tls(self) -> ssl.SSLObject | None:
        return None if self._transport is None else self._transport.get_extra_info("ssl_object")

    # Reading

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.identity = self._shared.identify(transport, self.peer)
        self.sending = Sending(self._shared.sending, self.identity, self.http2)
        self._expires_s = math.inf if self.tls is None else self._shared.expiry_s(self.tls)
        self._place.drop = self._transport.abort
        if self.identity != self.peer:
            self._place.keep()  # by its certificate
        self.peer_of_calls = Peer(self._transport)
        self._transport.set_write_buffer_limits(high=_UNSENT_MAX_BYTES)
        connected = transport.get_extra_info("socket")
        if connected is not None and connected.family != socket.AF_UNIX:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.has_to_send()
        self.is_made = True
        self._on_made(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._shared.read_buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._heard_s = time.monotonic()
        self._pinged_s = 0.0
        if self._is_ending:
            self._discarded += nbytes
            if self._discarded > _LINGER_MAX_BYTES:
                self._close_now()
            return
        self._pending += self._shared.read_buffer[:nbytes]
        self._queue()

    def _queue(self) -> None:
        self._later = None
        if self._is_queued or self._transport is None:
            return
        self._is_queued = True
        self._shared.turns.submit(self.identity, self._work)
        self._read_or_wait()

    def _work(self) -> None:
        """Some of what was read goes to the engine; the calls in it wait for turns of their own."""
        self._is_queued = False
        if self._is_ending or self._transport is None or self._transport.is_closing() or not self._pending:
            return
        begun_s = self._now_s = time.monotonic()
        portion, taken = bytes(self._pending[:_PORTION_BYTES]), 0
        while taken < len(portion) and time.monotonic() - begun_s < _PORTION_S:
            if not self._take(portion[taken : taken + _PIECE_BYTES]):
                return
            taken += _PIECE_BYTES
        del self._pending[:taken]
        self.sending.let_on()
        if self.http2.wants_to_send or self._holding:  # which may go on, if the client takes more now
            self.has_to_send()
        if self._must_slow_down:
            self._must_slow_down = False
            self._later = self.loop.call_later(_THROTTLE_S, self._queue if self._pending else self._read_or_wait)
        elif self._pending:
            self._queue()
        self._read_or_wait()

    def _take(self, data: bytes) -> bool:
        """Whether the connection goes on."""
        try:
            events = self.http2.feed(data)
        except Http2Error as error:
            assert self._transport is not None
            self._transport.write(http2.goaway(http2.ENHANCE_YOUR_CALM, str(error)))
            self._end_abuse(f"no HTTP/2: {error}")
            return False
        if events and not self._has_begun:
            self._has_begun = True
            self._place.keep()
        for event in events:
            self._on_event(event)
        return not self._is_ending

    def _read_or_wait(self) -> None:
        """Nothing more is read while what was read waits, or while the client does not read its answers."""
        transport = self._transport
        if transport is None or self._is_ending:
            return
        if self._later is not None and self._later.when() <= self.loop.time():
            self._later = None
        if self._is_queued or self._later is not None or self._backlog > _BACKLOG or self.sending.is_choked:
            transport.pause_reading()
        else:
            transport.resume_reading()

    def _on_event(self, event: Any) -> None:
        if self._is_ending:
            return
        kind = type(event)
        if kind is http2.RequestReceived:
            self._on_request(event)
        elif kind is http2.DataReceived:
            self._on_data(event)
        elif kind is http2.StreamClosed:
            self._on_closed(event)
        elif kind is http2.ConnectionClosed:
            self._linger()
        elif not self._control.take(self._now_s, _CONTROL_COSTS.get(kind, 0)):
            self._end_abuse("too many control frames")

    def _on_data(self, event: http2.DataReceived) -> None:
        size = len(event.data)
        call = self.calls.get(event.stream_id)
        if call is None:
            self.http2.consumed(event.stream_id, size)
            return
        if size:
            call.receive(event.data)
        if event.end_stream:
            call.end_of_request()

    def _on_closed(self, event: http2.StreamClosed) -> None:
        """Once for each stream, whoever ended it and however."""
        call = self.calls.pop(event.stream_id, None)
        # To a stream without a call these are what we say; a client can say them of any.
        is_answered = event.error_code in (http2.NO_ERROR, http2.REFUSED_STREAM) and (call is None or call.is_answered)
        is_early = call is None or (self._now_s - call.since_s < _EARLY_RESET_S and not call.is_overdue)
        if is_early and not is_answered:
            self._count_reset()
        if call is None:
            return
        call.drop()
        self._idle_since_s = time.monotonic()
        if self.is_leaving:
            self._leave_soon()

    def _count_reset(self) -> None:
        """A stream that was for nothing: reset by the client at once, or by us as malformed."""
        if not self._resets.take(self._now_s):
            self._end_abuse("too many resets")

    # Calls

    def _on_request(self, event: http2.RequestReceived) -> None:
        """Admits the call, or answers at once: whatever is refused here costs no task."""
        stream_id, headers = event.stream_id, event.headers
        self.leave_if_expired()
        if self.is_leaving or len(self.calls) >= self.limits.max_streams:
            # Nothing was processed: the client may repeat the call elsewhere (RFC 9113, 8.7).
            self.http2.reset(stream_id, http2.REFUSED_STREAM)
            return
        try:
            head = read_head(headers, max_bytes=self.limits.max_header_bytes, max_metadata=self.limits.max_metadata)
            method = self._admit(head)
        except Malformed as malformed:
            log.debug("malformed request: %s", malformed)
            self.http2.reset(stream_id, http2.PROTOCOL_ERROR)
            return
        except Refused as refused:
            # Who goes on to ask for what is refused is read from slowly: each costs nearly what a call does.
            if not self._refusals.take(self._now_s):
                self._must_slow_down = True
            self.http2.respond(stream_id, refusal(refused.status, refused.message, refused.http_status), end=True)
            if not event.end_stream:
                self.reset_after_answer(stream_id)
            return
        call = self.calls[stream_id] = Call(self, stream_id, head, method)
        if _is_lasting(head.path, method):
            self._lasting.add(call)
        if method.cardinality.client_streaming:
            self.start(call)
        if event.end_stream:
            call.end_of_request()

    def _admit(self, head: Head) -> Method:
        """Raises Refused."""
        self._shared.turns.charge(self.identity, _CALL_S)
        if not self._shared.rates.take(self.identity, self._now_s):
            self._must_slow_down = True
            text = "too many requests from this client: slow down (transport.requests_per_s)"
            raise Refused(Status.RESOURCE_EXHAUSTED, text)
        method = self._shared.mapping.get(head.path)
        if method is None:
            raise Refused(Status.UNIMPLEMENTED, f"there is no method {head.path}")
        if head.timeout_s == 0:
            raise Refused(Status.DEADLINE_EXCEEDED, "the time was up before the call began")
        most = self.limits.max_streams - self.limits.max_streams // _KEPT_FREE
        if len(self._lasting) >= most and _is_lasting(head.path, method):
            text = f"this connection has {most} streams and waits already: use another one"
            raise Refused(Status.RESOURCE_EXHAUSTED, text)
        if method.cardinality.client_streaming:
            streams = sum(call.method.cardinality.client_streaming for call in self._lasting)
            if streams >= _REQUEST_STREAMS_MAX:
                text = f"this connection has {streams} streams of requests already: use another one"
                raise Refused(Status.RESOURCE_EXHAUSTED, text)
        return method

    def start(self, call: Call) -> None:
        """Its request is whole, or what is wrong with it is known."""
        self._backlog += 1

        def begin() -> None:
            self._backlog -= 1
            if self._backlog == _BACKLOG:
                self._read_or_wait()
            call.begin()

        self._shared.turns.submit(self.identity, begin)

    def on_answered(self, call: Call) -> None:
        self._lasting.discard(call)

    def charge_message(self) -> None:
        self._shared.turns.charge(self.identity, _MESSAGE_S)

    async def wait_turn(self) -> None:
        await self._shared.turns.wait(self.identity)

    def end_calls(self) -> None:
        for call in list(self.calls.values()):
            call.stop(Status.UNAVAILABLE, DRAINING)

    # Writing

    def is_holding(self, call: Call, it_is: bool) -> None:
        if it_is:
            self._holding[call] = None
        else:
            self._holding.pop(call, None)

    def has_to_send(self) -> None:
        """Once in this turn of the loop, after whatever else there is to say."""
        if self._flushing is None and not self.sending.is_choked:
            self._flushing = self.loop.call_soon(self._flush)

    def reset_after_answer(self, stream_id: int) -> None:
        """The client may still be sending what nobody will read (RFC 9113, 8.1)."""
        self._to_reset.append(stream_id)
        self.has_to_send()

    def _flush(self) -> None:
        self._flushing = None
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        try:
            data, events = self.http2.take(_WRITE_BYTES)
            if self._to_reset and len(data) < _WRITE_BYTES:
                answered, self._to_reset = self._to_reset, []
                for stream_id in answered:
                    if self.http2.unsent(stream_id):  # its client has not read the answer yet
                        self._to_reset.append(stream_id)
                    else:
                        self.http2.reset(stream_id, http2.NO_ERROR)
                more, others = self.http2.take(_WRITE_BYTES)
                data, events = data + more, [*events, *others]
        except Http2Error as error:
            log.info("connection of %s ended: %s", self.peer, error)
            transport.abort()
            return
        if data:
            self._control.give(_CREDIT + len(data) // _CREDIT_EVERY_BYTES, _CREDIT_MAX)
            transport.write(data)
        for event in events:
            self._on_event(event)
        for call in list(self._holding):
            call.look()
        if self.http2.wants_to_send and data:
            self.has_to_send()

    def pause_writing(self) -> None:
        self.sending.is_choked = True
        self._read_or_wait()

    def resume_writing(self) -> None:
        self.sending.is_choked = False
        self._read_or_wait()
        self.sending.let_on()
        self.has_to_send()

    # Time

    def sweep(self, now_s: float) -> None:
        """Ends what has been quiet for too long. Called about once a second."""
        limits, transport = self.limits, self._transport
        if self._is_ending or transport is None:
            return
        if not self._has_begun and now_s - self._opened_s > limits.connect_timeout_s:
            transport.abort()
            return
        self.leave_if_expired()
        for call in list(self.calls.values()):
            if 0 < call.waits_since_s < now_s - limits.request_timeout_s:
                call.end_overdue()
        if limits.idle_timeout_s and not self.calls and now_s - self._idle_since_s > limits.idle_timeout_s:
            self.end(http2.NO_ERROR, "idle")
        elif limits.keepalive_s and now_s - self._heard_s > limits.keepalive_s:
            if not self._pinged_s:
                self._pinged_s = now_s
                self.http2.ping()
                self.has_to_send()
            elif now_s - self._pinged_s > limits.keepalive_timeout_s:
                transport.abort()

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
        if not self.calls:
            wait_s = max(0.0, self._idle_since_s + _ANSWER_FIRST_S - time.monotonic())
            self._goodbye = self.loop.call_later(wait_s, self.say_goodbye)

    def say_goodbye(self) -> None:
        self.end(http2.NO_ERROR, "shutting down")

    def _end_abuse(self, reason: str) -> None:
        log.info("connection of %s ended: %s", self.peer, reason)
        self._shared.probation[self.peer] = self._now_s + _PROBATION_S
        self.end(http2.ENHANCE_YOUR_CALM, reason)

    def end(self, code: int, reason: str) -> None:
        """GOAWAY, and soon the end of the connection; calls that run are cancelled."""
        if self._is_ending or self._transport is None or self._transport.is_closing():
            return
        self.http2.goodbye(code, reason)
        self._linger()

    def _linger(self) -> None:
        """To close at once, with bytes of the client unread, would be a TCP reset: it could lose the GOAWAY."""
        if self._is_ending or self._transport is None:
            return
        self._is_ending = True
        self._drop_calls()
        self._pending.clear()
        if self._flushing is not None:
            self._flushing.cancel()
        self._flush()
        self._lingering = self.loop.call_later(_LINGER_S, self._close_now)
        self._transport.resume_reading()

    def _drop_calls(self) -> None:
        while self.calls:
            self.calls.popitem()[1].drop()

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
        for handle in (self._later, self._goodbye, self._lingering, self._flushing):
            if handle is not None:
                handle.cancel()
        self._drop_calls()
        self._transport = None
        self._place.leave()
        self._on_lost(self)


def _is_lasting(path: str, method: Method) -> bool:
    return method.cardinality.server_streaming or path in _LASTING_UNARY
