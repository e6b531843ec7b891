"""Registrations, and schedulers that behave badly."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.support.fake_scheduler import FakeScheduler
from worker_svc.registration import Registration

ADVERTISED = "worker.example:50000"

# Longer than any test waits: what must come sooner cannot have come by it.
NEVER_S = 300.0


class Log:
    """Records lines as a structlog logger would write them."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, dict[str, Any]]] = []

    def debug(self, event: str, **fields: Any) -> None:
        self.lines.append(("debug", event, fields))

    def info(self, event: str, **fields: Any) -> None:
        self.lines.append(("info", event, fields))

    def warning(self, event: str, **fields: Any) -> None:
        self.lines.append(("warning", event, fields))

    def of(self, event: str, level: str | None = None) -> list[dict[str, Any]]:
        return [fields for lvl, name, fields in self.lines if name == event and level in (None, lvl)]


def registration(scheduler: FakeScheduler, log: Log, **options: Any) -> Registration:
    return Registration(
        ADVERTISED,
        log,
        **{
            "host": scheduler.host,
            "port": scheduler.port,
            "register_timeout_s": 20.0,
            "backoff_initial_s": 0.005,
            "backoff_max_s": 0.02,
            "keepalive_s": NEVER_S,
            **options,
        },
    )


@asynccontextmanager
async def running(subject: Registration) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(subject.run())
    try:
        yield task
    finally:
        assert not task.done() or task.cancelled(), "run() ended by itself"
        task.cancel()
        await asyncio.wait((task,))
        assert task.cancelled()


def tls_contexts(directory: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The server's and the client's, of a self-signed certificate for 127.0.0.1 and scheduler.example."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "scheduler.example")])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName(
        [x509.DNSName("scheduler.example"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    crt_file, key_file = directory / "crt.pem", directory / "key.pem"
    crt_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(crt_file, key_file)
    client = ssl.create_default_context(cafile=str(crt_file))
    for context in (server, client):
        context.set_alpn_protocols(["h2"])
    return server, client
