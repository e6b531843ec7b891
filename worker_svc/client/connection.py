"""A connection that remembers how it ended, and what that says of TLS: there, the first sign of trouble is a lost
connection.
"""

from __future__ import annotations

import ssl
from typing import Final

from grpclib.client import Channel, Handler
from grpclib.protocol import H2Protocol

from worker_svc.job import Unavailable


class Unreachable(Unavailable):
    """No connection to the worker could be made: nothing was asked of it."""


class Untrusted(Unreachable):
    """There is somebody, but TLS came to nothing; the text says what to do."""


_REFUSED: Final = "the certificate was refused: revoked, expired or of another authority"
# As OpenSSL names what the other side, or our own, complained of: the first that is part of it.
_ALERTS: Final = {
    "CERTIFICATE_REQUIRED": "it wants a certificate: give --crt and --key",
    "CERTIFICATE": _REFUSED,
    "UNKNOWN_CA": _REFUSED,
    "WRONG_VERSION_NUMBER": "it does not speak TLS: leave out --ca, --crt, --key and --server-name",
    "PROTOCOL": "it speaks another version of TLS",
}
_NAME_IS_WRONG: Final = (62, 64)
"""X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH."""
_IS_NOT_IN_TIME: Final = (9, 10)
_PLAIN_TO_TLS: Final = "it may want TLS: give --ca, --crt, --key"
# An alert; as the head of an HTTP/2 frame it would be longer than any may be.
_TLS_ALERT: Final = b"\x15\x03"


class ClientProtocol(H2Protocol):
    has_heard = False
    is_tls_alert = False
    lost_by: BaseException | None = None

    def data_received(self, data: bytes) -> None:
        if not self.has_heard:
            self.has_heard = True
            self.is_tls_alert = data.startswith(_TLS_ALERT)
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
        if isinstance(protocol.lost_by, ssl.SSLError):
            return why_refused(protocol.lost_by)
        if protocol.has_heard and not protocol.is_tls_alert:
            return ""
        # asyncio's servers, ours too, close without an alert.
        return _PLAIN_TO_TLS if self._ssl is None else f"{_REFUSED}; or it wants one: give --crt and --key"


def why_refused(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in _NAME_IS_WRONG:
            return f"use a name that the certificate has (--server-name): {error.verify_message}"
        if error.verify_code in _IS_NOT_IN_TIME:
            return f"the worker has no good certificate: {error.verify_message}"
        return f"name the authority with --ca: {error.verify_message}"
    reason = error.reason or ""
    return next((text for alert, text in _ALERTS.items() if alert in reason), f"TLS: {reason or error}")
