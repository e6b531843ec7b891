"""What is wrong with a connection to a worker, and what the end of one says of TLS."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Final

from worker_svc.job import Unavailable

if TYPE_CHECKING:
    from ssl import SSLError


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


def why_refused(error: SSLError) -> str:
    """What to do about a handshake that failed."""
    verify_code = getattr(error, "verify_code", None)
    if verify_code is not None:  # an SSLCertVerificationError; `ssl` may not be loaded
        text: str = getattr(error, "verify_message", "")
        if verify_code in _NAME_IS_WRONG:
            return f"use a name that the certificate has (--server-name): {text}"
        if verify_code in _IS_NOT_IN_TIME:
            return f"the worker has no good certificate: {text}"
        return f"name the authority with --ca: {text}"
    reason = error.reason or ""
    return next((text for alert, text in _ALERTS.items() if alert in reason), f"TLS: {reason or error}")


def why_silent(heard: bytes, *, with_tls: bool) -> str:
    """What it says of TLS that a connection ended after `heard`, the first bytes that came; empty: nothing."""
    if heard and not heard.startswith(_TLS_ALERT):
        return ""
    # asyncio's servers, ours too, close without an alert.
    return f"{_REFUSED}; or it wants one: give --crt and --key" if with_tls else _PLAIN_TO_TLS


def reason(error: OSError) -> str:
    """The system's words for it, or others if it has none."""
    # asyncio puts the address, or the failures of several addresses, in their place.
    if failed := re.search(r"\[Errno (\d+)\] Connect call failed", str(error)):
        return os.strerror(int(failed[1]))
    return error.strerror or str(error) or type(error).__name__


def lost(address: str, why: str) -> Unavailable:
    return Unavailable(f"the connection to the worker at {address} was lost{why and f': {why}'}")


def not_reached(address: str, error: OSError) -> Unreachable:
    return Unreachable(f"no connection to a worker at {address}: {reason(error)}")


def not_trusted(address: str, error: SSLError) -> Untrusted:
    return Untrusted(f"no connection to the worker at {address}: {why_refused(error)}")


def too_late(address: str) -> str:
    return f"no answer from the worker at {address} in time"
