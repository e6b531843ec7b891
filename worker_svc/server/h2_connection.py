"""The connections of h2 and grpclib, with what a server under abuse needs of them otherwise."""

from __future__ import annotations

from typing import Any, Final

from grpclib.protocol import Connection, EventsProcessor
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import DataReceived, Event, StreamReset
from h2.exceptions import InvalidBodyLengthError
from h2.settings import SettingCodes, Settings

from worker_svc.server.rates import TokenBucket

# Of one stream and of a connection: what may be under way unread. Requests are read at once, so little is enough.
STREAM_WINDOW_BYTES: Final = 256 * 1024
CONNECTION_WINDOW_BYTES: Final = 1024 * 1024
# HPACK can make much of little, and its state is lost when it is stopped half-way: above our limit a request is
# refused, above this multiple of it the connection ends.
HEADER_HARD_FACTOR: Final = 4
# What a frame of ours may bring about of the client's: WINDOW_UPDATEs, a PING to measure the round trip, a reset if it
# was under way when the client closed its stream. For as many as a window of 64 MiB has room for.
_CREDIT_PER_FRAME: Final = 4
_CREDIT_MAX: Final = 16_384


class ServerH2Connection(H2Connection):
    # Which streams were reset by whom, so that frames still under way are not taken for errors. 65,536 would be 6 MB.
    MAX_CLOSED_STREAMS = 4096

    def __init__(self, config: H2Configuration, *, max_header_bytes: int, max_streams: int) -> None:
        super().__init__(config)
        self.local_settings = Settings(
            client=False,
            initial_values={
                SettingCodes.MAX_CONCURRENT_STREAMS: max_streams,
                SettingCodes.MAX_HEADER_LIST_SIZE: max_header_bytes,
                SettingCodes.INITIAL_WINDOW_SIZE: STREAM_WINDOW_BYTES,
            },
        )
        self.decoder.max_header_list_size = HEADER_HARD_FACTOR * max_header_bytes
        self._swept_at = 64

    def _open_streams(self, remainder: int) -> int:
        # h2 counts all streams for each new one, which a thousand followers make slow. How many there may be is
        # checked where calls are accepted; here closed ones are swept out, each time there are twice as many.
        if len(self.streams) >= self._swept_at:
            super()._open_streams(remainder)
            self._swept_at = max(64, 2 * len(self.streams))
        return 0

    def _receive_frame(self, frame: Any) -> list[Event]:
        try:
            return super()._receive_frame(frame)
        except InvalidBodyLengthError:
            # More or less than its content-length: the fault of one stream (RFC 9113, 8.1.1), which h2 makes one of
            # the whole connection.
            size = getattr(frame, "flow_controlled_length", 0)
            if size:
                self.acknowledge_received_data(size, frame.stream_id)
            self.reset_stream(frame.stream_id, ErrorCodes.PROTOCOL_ERROR)
            return [StreamReset(stream_id=frame.stream_id, error_code=ErrorCodes.PROTOCOL_ERROR, remote_reset=False)]


class CountedConnection(Connection):
    """grpclib's, which does not fail on what is to be sent after it was closed, and counts what is sent."""

    control: TokenBucket

    def flush(self) -> None:
        data = self._connection.data_to_send()
        if data and not self.is_closing():
            self._transport.write(data)

    def headers_send_process(self) -> None:
        self.control.give(_CREDIT_PER_FRAME, _CREDIT_MAX)

    def data_send_process(self) -> None:
        self.control.give(_CREDIT_PER_FRAME, _CREDIT_MAX)


class LenientProcessor(EventsProcessor):
    def process(self, event: Event) -> None:
        """Frames that HTTP/2 does not know of are ignored (RFC 9113, 5.5)."""
        processors = getattr(self, "processors", None)  # grpclib deletes it when the connection is closed
        process = processors and processors.get(event.__class__)
        if process:
            process(event)

    def process_data_received(self, event: DataReceived) -> None:
        # An empty frame means nothing, and would be taken for the end of the stream.
        if event.flow_controlled_length:
            super().process_data_received(event)
