"""The addresses that gRPC is served on and dialled at. Light: each command of the command line needs them."""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple, Self

MAX_UNIX_PATH_BYTES = 107
"""What Linux's `sockaddr_un` holds, its final NUL not counted."""

LOCALHOST = "localhost"
_LOOPBACK_BROADCAST = "127.255.255.255"
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.?", re.ASCII)
_LOOKS_LIKE_IPV4 = re.compile(r"[0-9.]+", re.ASCII)


class Address(NamedTuple):
    """A TCP address (`host`, `port`) or, when `unix_path` is not empty, a unix socket.

    `host` is a name, an IPv4 or a bare IPv6 address (no brackets); empty means every interface. `str()` gives
    what `parse` reads and gRPC understands: `127.0.0.1:50000`, `[::1]:50000`, `unix:/run/worker.sock`.
    """

    host: str = ""
    port: int = 0
    unix_path: str = ""

    @classmethod
    def unix(cls, path: str) -> Self:
        return cls(unix_path=path)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `host:port`, `[ipv6]:port`, `:port` or `unix:path`.

        Raises:
            ValueError: saying what is wrong with it, in words that follow "must be …, not …:".
        """
        if text.startswith("unix:"):
            path = text.removeprefix("unix:")
            if not path or "\0" in path:
                raise ValueError("the socket's path is missing" if not path else "the path contains NUL")
            # gRPC also writes unix:///path for an absolute path.
            return cls.unix("/" + path.lstrip("/") if path.startswith("/") else path)
        host, colon, port_text = text.rpartition(":")
        if not colon:
            raise ValueError("the port is missing")
        if not re.fullmatch(r"[0-9]{1,5}", port_text, re.ASCII) or int(port_text) > 65535:
            raise ValueError("the port is not a number from 0 to 65535")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
            if not _is_ip(host, 6):
                raise ValueError("what is in the brackets is not an IPv6 address")
            if "%" in host and not ipaddress.ip_address(host).is_link_local:
                raise ValueError("only a link-local address (fe80::…) has a zone")
            host = _without_mapping(host)
        elif ":" in host:
            raise ValueError("an IPv6 address goes in brackets, as in [::1]:50000")
        elif _LOOKS_LIKE_IPV4.fullmatch(host):
            if not _is_ip(host, 4):
                raise ValueError("the host is not an IPv4 address")
        elif host and (len(host) > 253 or not _HOST_NAME.fullmatch(host)):
            raise ValueError("the host is not a host name")
        if host == _LOOPBACK_BROADCAST:
            raise ValueError("a broadcast address cannot be connected to")
        return cls(LOCALHOST if host.lower().rstrip(".") == LOCALHOST else host, int(port_text))

    @property
    def is_unix(self) -> bool:
        return self.unix_path != ""

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it: `localhost`, 127.0.0.0/8, ::1, and any unix socket."""
        if self.is_unix or self.host == LOCALHOST:
            return True
        ip = _ip(self.host)
        return ip is not None and ip.is_loopback

    @property
    def is_unspecified(self) -> bool:
        """Whether it stands for every interface (empty host, 0.0.0.0, ::): to serve on, not to hand out."""
        if self.is_unix:
            return False
        ip = _ip(self.host)
        return not self.host or (ip is not None and ip.is_unspecified)

    def __str__(self) -> str:
        if self.is_unix:
            return f"unix:{self.unix_path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _without_mapping(host: str) -> str:
    """::ffff:127.0.0.1 is 127.0.0.1 to all that ask what it is, and to a socket that is to serve IPv6 alone."""
    mapped = ipaddress.IPv6Address(host).ipv4_mapped
    return host if mapped is None else str(mapped)


def _is_ip(host: str, version: int) -> bool:
    try:
        return ipaddress.ip_address(host).version == version
    except ValueError:
        return False
