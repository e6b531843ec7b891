"""The headers of a request: read strictly, with a proper answer to whatever is wrong with them. Pure."""

from __future__ import annotations

import binascii
import re
from base64 import b64decode
from functools import lru_cache
from typing import Any, Final, NamedTuple

from grpclib.const import Status
from multidict import MultiDict

Pairs = tuple[tuple[bytes, bytes], ...]

_TIMEOUT: Final = re.compile(r"([0-9]{1,8})([HMSmun])", re.ASCII)
_UNITS: Final = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_TIMEOUT_MAX_S: Final = 10 * 365 * 86400.0

_PSEUDO: Final = frozenset({b":method", b":scheme", b":path", b":authority"})
_REQUIRED: Final = (b":method", b":scheme", b":path")
# Headers of HTTP/1 without meaning here: their presence makes a request malformed (RFC 9113, 8.2.2).
_OF_A_CONNECTION: Final = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"}
)
_NAME: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
_NOT_PRINTABLE: Final = re.compile(rb"[^ -~]")
_SPECIAL: Final = frozenset({"te", "content-type", "user-agent", "content-length", "host"})
# So many heads, each no larger than this, are kept.
_KNOWN_MAX: Final = 256
_KNOWN_MAX_BYTES: Final = 4096
# Headers of HTTP/2's and gRPC's own.
_NOT_METADATA_MAX: Final = 32
_OVERHEAD_BYTES: Final = 32  # of each header, as HPACK counts


class Malformed(Exception):
    """No HTTP/2 request at all: its stream is reset."""


class Refused(Exception):
    """A request that is answered without being looked at further."""

    def __init__(self, status: Status, message: str, http_status: int = 200) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.http_status = http_status


class Head(NamedTuple):
    path: str
    timeout_s: float | None
    metadata: MultiDict[Any]
    content_type: str
    user_agent: str | None
    encoding: str
    """How messages that are marked as compressed are encoded."""


@lru_cache(maxsize=256)
def read_head(headers: Pairs, *, max_bytes: int, max_metadata: int) -> Head:
    """Raises Malformed or Refused."""
    size = sum(len(name) + len(value) for name, value in headers) + _OVERHEAD_BYTES * len(headers)
    # Clients send the same headers with every call, but for the time that is left.
    asked = [value for name, value in headers if name == b"grpc-timeout"]
    if asked:
        headers = tuple(pair for pair in headers if pair[0] != b"grpc-timeout")
    read = _read if size > _KNOWN_MAX_BYTES else _read_or_known
    head = read(headers, size, max_bytes, max_metadata)
    if not asked:
        return head
    return head._replace(timeout_s=min(_timeout(_text("grpc-timeout", value)) for value in asked))


def _read(headers: Pairs, size: int, max_bytes: int, max_metadata: int) -> Head:
    # First: what is refused for its size is not looked through.
    if size > max_bytes:
        raise Refused(Status.RESOURCE_EXHAUSTED, f"the headers take {size} bytes: at most {max_bytes} are allowed")
    if len(headers) > max_metadata + _NOT_METADATA_MAX:
        text = f"there are {len(headers)} headers: at most {max_metadata} entries of metadata are allowed"
        raise Refused(Status.RESOURCE_EXHAUSTED, text)
    pseudo, regular = _sort(headers)
    if pseudo[b":method"] != b"POST":
        raise Refused(Status.UNIMPLEMENTED, "the method must be POST", 405)

    known: dict[str, str] = {}
    metadata: MultiDict[Any] = MultiDict()
    for raw_name, raw_value in regular:
        name = raw_name.decode()
        value = _text(name, raw_value)
        if name in _SPECIAL or name.startswith("grpc-"):
            known[name] = value
        elif name.endswith("-bin"):
            for part in value.split(","):
                metadata.add(name, _binary(name, part))
        else:
            metadata.add(name, value)
    if len(metadata) > max_metadata:
        text = f"there are {len(metadata)} entries of metadata: at most {max_metadata} are allowed"
        raise Refused(Status.RESOURCE_EXHAUSTED, text)

    content_type = known.get("content-type", "")
    if content_type.partition(";")[0].strip() not in ("application/grpc", "application/grpc+proto"):
        raise Refused(Status.UNKNOWN, f'content-type must be "application/grpc", not "{content_type}"', 415)
    if known.get("te") != "trailers":
        raise Refused(Status.UNKNOWN, 'the header "te: trailers" is missing', 400)
    return Head(
        _text(":path", pseudo[b":path"]),
        None,
        metadata,
        content_type,
        known.get("user-agent"),
        known.get("grpc-encoding", "identity"),
    )


_read_or_known: Final = lru_cache(maxsize=_KNOWN_MAX)(_read)


def _sort(headers: Pairs) -> tuple[dict[bytes, bytes], list[tuple[bytes, bytes]]]:
    """Raises Malformed, for all that HTTP/2 itself forbids."""
    pseudo: dict[bytes, bytes] = {}
    regular: list[tuple[bytes, bytes]] = []
    for name, value in headers:
        if b"\0" in value or b"\r" in value or b"\n" in value:
            raise Malformed(f"a control character in the value of {name!r}")
        if name[:1] == b":":
            if name not in _PSEUDO or name in pseudo or regular:
                raise Malformed(f"the pseudo header {name!r} is unknown, there twice, or after others")
            pseudo[name] = value
        elif name in _OF_A_CONNECTION or not _NAME.fullmatch(name):
            raise Malformed(f"the header {name!r} must not be there")
        else:
            regular.append((name, value))
    for name in _REQUIRED:
        if not pseudo.get(name):
            raise Malformed(f"{name!r} is missing")
    return pseudo, regular


def _text(name: str, value: bytes) -> str:
    found = _NOT_PRINTABLE.search(value)
    if found:
        text = f"{name}: must be printable ASCII, which byte {found[0][0]:#04x} is not (use a -bin header)"
        raise Refused(Status.INVALID_ARGUMENT, text)
    return value.decode()


def _binary(name: str, value: str) -> bytes:
    """Base64, padded or not."""
    bare = value.strip().rstrip("=")
    try:
        return b64decode(bare + "=" * (-len(bare) % 4), validate=True)
    except binascii.Error:
        raise Refused(Status.INVALID_ARGUMENT, f"{name}: is not base64, as -bin headers must be") from None


def _timeout(value: str) -> float:
    match = _TIMEOUT.fullmatch(value)
    if match is None:
        text = f'grpc-timeout: must be up to 8 digits and one of H, M, S, m, u, n, not "{value[:64]}"'
        raise Refused(Status.INVALID_ARGUMENT, text)
    return min(int(match[1]) * _UNITS[match[2]], _TIMEOUT_MAX_S)
