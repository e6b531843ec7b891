"""A connection that remembers how it ended: with TLS, the first sign of trouble is a lost connection."""

from __future__ import annotations

from ssl import SSLError

from grpclib.client import Channel, Handler
from grpclib.protocol import H2Protocol

from worker_svc.client.errors import why_refused, why_silent


class ClientProtocol(H2Protocol):
    heard = b""
    """The first bytes that came."""
    lost_by: BaseException | None = None

    def data_received(self, data: bytes) -> None:
        self.heard = self.heard or data[:2]
        super().data_received(data)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.lost_by = exc
        super().connection_lost(exc)


class ClientChannel(Channel):
    def _protocol_factory(self) -> H2Protocol:
        return ClientProtocol(Handler(), self._config, self._h2_config)

    def why_lost(self) -> str:
        """What the end of the connection says of TLS; empty: nothing."""
        protocol = self._protocol
        if not isinstance(protocol, ClientProtocol):
            return ""
        if isinstance(protocol.lost_by, SSLError):
            return why_refused(protocol.lost_by)
        return why_silent(protocol.heard, with_tls=self._ssl is not None)
