"""Who is let in: TLS contexts, made anew whenever the files change."""

from __future__ import annotations

import asyncio
import base64
import math
import os
import re
import ssl
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from structlog.typing import FilteringBoundLogger

from worker_svc.config import GrpcServerConfig, SchedulerConfig
from worker_svc.linux.syscalls import IN_CREATE, IN_MOVED_TO, inotify_add_watch, inotify_init

_IN_CLOSE_WRITE: Final = 0x0008
# Certificate and key are two files: whoever replaces both gets this long before they are read.
_SETTLE_S: Final = 0.25
# How often files are looked at that cannot be watched.
_LOOK_EVERY_S: Final = 2.0
_VERSIONS: Final = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


_CRL_PEM: Final = re.compile(rb"-----BEGIN X509 CRL-----(.*?)-----END X509 CRL-----", re.DOTALL)
_DER_INTEGER: Final = 2
_DER_TIMES: Final = (b"\x17\x0d", b"\x18\x0f")
_ENCODING_DER: Final = 2


class SecurityError(Exception):
    """Keys or certificates cannot be used; the text names the file and the key of the configuration."""


def server_context(config: GrpcServerConfig) -> ssl.SSLContext | None:
    """The context to serve with, None without TLS. Raises SecurityError."""
    if not config.use_tls:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _harden(context, config.tls_min_version)
    # No tickets: a client's certificate is looked at again for each connection, also when it has expired meanwhile.
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET
    assert config.crt_file is not None  # config.py refuses TLS without them
    assert config.key_file is not None
    _load_chain(context, config.crt_file, config.key_file, "grpc_server")
    if config.client_ca_file is not None:
        _load_ca(context, config.client_ca_file, "grpc_server.client_ca_file")
        context.verify_mode = ssl.CERT_REQUIRED
    if config.crl_file is not None:
        _load_crl(context, config.crl_file)
    return context


def scheduler_context(config: SchedulerConfig) -> ssl.SSLContext | None:
    """The context to call the scheduler with, None without TLS. Raises SecurityError."""
    if not config.use_tls:
        return None
    return _client_context(
        config.ca_file, config.crt_file, config.key_file, config.tls_min_version, "scheduler.ca_file", "scheduler"
    )


def client_context(ca: Path | None, crt: Path | None, key: Path | None) -> ssl.SSLContext:
    """The context to call a worker with. Raises SecurityError."""
    return _client_context(ca, crt, key, "1.3", "--ca", "")


def _client_context(
    ca: Path | None, crt: Path | None, key: Path | None, version: str, ca_name: str, section: str
) -> ssl.SSLContext:
    if ca is None:
        context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH)
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        _load_ca(context, ca, ca_name)
    _harden(context, version)
    if crt is not None and key is not None:
        _load_chain(context, crt, key, section)
    return context


def _harden(context: ssl.SSLContext, version: str) -> None:
    context.minimum_version = _VERSIONS[version]
    context.set_alpn_protocols(["h2"])


def _load_chain(context: ssl.SSLContext, crt_file: Path, key_file: Path, section: str) -> None:
    names = ("crt_file", "key_file") if section else ("--crt", "--key")
    prefix = f"{section}." if section else ""
    for name, path in zip(names, (crt_file, key_file), strict=True):
        if not path.is_file():
            raise SecurityError(f"{prefix}{name}: {path}: no such file")
    try:
        # A key with a passphrase would make OpenSSL ask on the terminal.
        context.load_cert_chain(crt_file, key_file, password=_refuse_passphrase)
    except (OSError, ssl.SSLError) as error:
        raise SecurityError(
            f"{prefix}{names[0]} and {names[1]}: {crt_file} and {key_file} cannot be used together: {error}"
        ) from error


def _refuse_passphrase() -> str:
    raise SecurityError("the private key has a passphrase: openssl pkey -in KEY -out NEW_KEY takes it away")


def _load_ca(context: ssl.SSLContext, ca_file: Path, key: str) -> None:
    if not _load(context, ca_file, key)["x509_ca"]:
        raise SecurityError(f"{key}: {ca_file}: has no certificate of an authority")


def _load_crl(context: ssl.SSLContext, crl_file: Path) -> None:
    if not _load(context, crl_file, "grpc_server.crl_file")["crl"]:
        raise SecurityError(f"grpc_server.crl_file: {crl_file}: has no list of revoked certificates")
    context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF


def _load(context: ssl.SSLContext, path: Path, key: str) -> dict[str, int]:
    """How many there are of each kind in the context then."""
    try:
        context.load_verify_locations(path)
    except (OSError, ssl.SSLError) as error:
        raise SecurityError(f"{key}: {path}: {error}") from error
    return context.cert_store_stats()


def acceptance(context: ssl.SSLContext | None, crl_file: Path | None) -> Callable[[ssl.SSLObject], bool]:
    """Whether a client that was let in before would still be: its certificate neither revoked nor expired, and of an
    authority that is still trusted. Raises SecurityError.

    OpenSSL looks at certificates in handshakes only. Whom this turns away without need has to connect again, no more.
    """
    authorities = set() if context is None else set(context.get_ca_certs(binary_form=True))
    revoked = b"" if crl_file is None else _crl_bytes(crl_file)

    def accepts(connection: ssl.SSLObject) -> bool:
        certificate = connection.getpeercert()
        if not certificate:
            return not authorities  # nobody was asked for one
        serial = int(str(certificate["serialNumber"]), 16)
        expires_s = ssl.cert_time_to_seconds(str(certificate["notAfter"]))
        return expires_s > time.time() and not _is_listed(serial, revoked) and _anchor(connection) in authorities

    return accepts


def expiry_s(connection: ssl.SSLObject) -> float:
    """When, in seconds since the epoch, the certificate that the client showed expires, or one of those above it."""
    ends = [ssl.cert_time_to_seconds(str(certificate.get_info()["notAfter"])) for certificate in _chain(connection)]
    return min(ends, default=math.inf)


def _chain(connection: ssl.SSLObject) -> Sequence[Any]:
    """From the client's certificate up to the authority; what Python 3.13 has for it in public gives bytes only."""
    return connection._sslobj.get_verified_chain() or ()  # type: ignore[attr-defined]


def _crl_bytes(crl_file: Path) -> bytes:
    try:
        text = crl_file.read_bytes()
    except OSError as error:
        raise SecurityError(f"grpc_server.crl_file: {crl_file}: {error}") from error
    return b"".join(base64.b64decode(body) for body in _CRL_PEM.findall(text))


def _is_listed(serial: int, crl: bytes) -> bool:
    """An entry is a serial number and a time, UTCTime or GeneralizedTime (RFC 5280, 5.1); nothing else in it is."""
    number = serial.to_bytes(serial.bit_length() // 8 + 1, "big", signed=True)
    entry = bytes([_DER_INTEGER, len(number)]) + number
    return any(entry + time_head in crl for time_head in _DER_TIMES)


def _anchor(connection: ssl.SSLObject) -> bytes:
    """The authority that the handshake ended at."""
    chain = _chain(connection)
    return bytes(chain[-1].public_bytes(_ENCODING_DER)) if chain else b""


class Reloader:
    """Has contexts made anew when their files change, or when it is told to. What is there stays if that fails."""

    def __init__(self, files: Sequence[Path | None], reload: Callable[[], None], log: FilteringBoundLogger) -> None:
        """`reload` raises SecurityError."""
        self._files = [path for path in files if path is not None]
        self._reload = reload
        self._log = log
        self._seen = self._look()
        self._inotify = -1
        self._settling: asyncio.TimerHandle | None = None

    def watch(self) -> None:
        if not self._files:
            return
        # Their folders, not the files: most ways to replace a file make another one of the name.
        folders = {path.parent for path in self._files} | {path.resolve().parent for path in self._files}
        try:
            self._inotify = inotify_init()
            for folder in folders:
                inotify_add_watch(self._inotify, os.fsencode(folder), IN_CREATE | IN_MOVED_TO | _IN_CLOSE_WRITE)
        except OSError as error:
            reason = f"inotify: {error.strerror}: files are looked at every {_LOOK_EVERY_S:g} s"
            self._log.warning("tls.not_watched", reason=reason)
            self._look_later()
        if self._inotify >= 0:
            asyncio.get_running_loop().add_reader(self._inotify, self._on_change)

    def _on_change(self) -> None:
        try:
            os.read(self._inotify, 65536)
        except BlockingIOError:
            return
        if self._settling is None:
            self._settling = asyncio.get_running_loop().call_later(_SETTLE_S, self._on_settled)

    def _look_later(self) -> None:
        self._settling = asyncio.get_running_loop().call_later(_LOOK_EVERY_S, self._on_time)

    def _on_time(self) -> None:
        self._on_settled()
        self._look_later()

    def _on_settled(self) -> None:
        self._settling = None
        if self._look() != self._seen:
            self.reload()

    def reload(self) -> None:
        if not self._files:
            self._log.info("tls.nothing_to_reload")
            return
        self._seen = self._look()
        try:
            self._reload()
        except SecurityError as error:
            self._log.error("tls.not_reloaded", reason=f"{error}: what was read before stays in use")
        else:
            self._log.info("tls.reloaded", files=[str(path) for path in self._files])

    def _look(self) -> list[tuple[int, ...] | None]:
        return [_stamp(path) for path in self._files]

    def close(self) -> None:
        if self._settling is not None:
            self._settling.cancel()
        if self._inotify >= 0:
            asyncio.get_running_loop().remove_reader(self._inotify)
            os.close(self._inotify)
            self._inotify = -1


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
