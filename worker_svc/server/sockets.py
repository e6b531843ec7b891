"""The sockets that are served on: bound before anything else is loaded or made."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from pathlib import Path
from typing import Final

from worker_svc.address import LOCALHOST, Address

_BACKLOG: Final = 1024


async def open_sockets(address: Address) -> list[socket.socket]:
    """All with one port. They listen: else two processes could have the same, and whoever finds nobody at a unix socket
    takes it. Raises OSError."""
    if address.is_unix:
        return [await _unix_socket(address.unix_path)]
    loop = asyncio.get_running_loop()
    # What this name leads to is not left to a resolver: it serves without TLS because nobody else can reach it.
    hosts = ("127.0.0.1", "::1") if address.host == LOCALHOST else (address.host or None,)
    found = [
        place
        for host in hosts
        for place in await loop.getaddrinfo(host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    ]
    sockets: list[socket.socket] = []
    port = address.port
    failure: OSError | None = None
    try:
        for family, kind, protocol, _, place in dict.fromkeys(found):
            try:
                bound = _bind(family, kind, protocol, (place[0], port, *place[2:]))
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                failure = error  # a machine without IPv6 still resolves names to it
                continue
            sockets.append(bound)
            port = bound.getsockname()[1]
        if not sockets:
            raise failure or OSError(errno.EADDRNOTAVAIL, f"{address} has no address here")
    except BaseException:
        for bound in sockets:
            bound.close()
        raise
    return sockets


def close_sockets(address: Address, sockets: list[socket.socket]) -> None:
    """Closes what `open_sockets` made and nobody came to serve on."""
    for bound in sockets:
        bound.close()
        if address.is_unix:
            Path(address.unix_path).unlink(missing_ok=True)


def _bind(family: int, kind: int, protocol: int, place: tuple[object, ...]) -> socket.socket:
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind(place)
        bound.listen(_BACKLOG)
        bound.setblocking(False)
    except OSError as error:
        bound.close()
        reason = (error.strerror or "").lower()
        raise OSError(error.errno, f"error while attempting to bind on address {place!r}: {reason}") from None
    return bound


async def _unix_socket(path: str) -> socket.socket:
    """A socket only its owner can connect to, in place of one that nobody listens on."""
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if Path(path).exists() and await _is_stale(path):
            Path(path).unlink()
        mask = os.umask(0o177)
        try:
            bound.bind(path)
        finally:
            os.umask(mask)
        bound.listen(_BACKLOG)
        bound.setblocking(False)
    except BaseException:
        bound.close()
        raise
    return bound


async def _is_stale(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(probe, path)
        except ConnectionRefusedError:
            return True
        except OSError:  # not a socket, or not ours: bind will say what is wrong
            return False
    return False
