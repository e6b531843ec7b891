"""A small certificate authority for trying out and for tests: `worker-svc gen-certs`. Needs the extra `certs`.

Keys are P-256; certificates have what OpenSSL's strict checks ask for (key identifiers, key usage).
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CA_NAME: Final = "ca"
SERVER_NAME: Final = "server"
CRL_NAME: Final = "crl.pem"
_ONE_DAY: Final = datetime.timedelta(days=1)


class Pair(NamedTuple):
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def write(self, directory: Path, name: str) -> None:
        """`NAME.pem`, and `NAME.key` that only its owner may read."""
        key = self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        _write_new(directory / f"{name}.key", key, 0o600)
        _write_new(directory / f"{name}.pem", self.certificate.public_bytes(serialization.Encoding.PEM), 0o644)


def read_pair(directory: Path, name: str) -> Pair:
    """Raises OSError, or ValueError for what is no certificate or key of ours."""
    certificate = x509.load_pem_x509_certificate((directory / f"{name}.pem").read_bytes())
    key = serialization.load_pem_private_key((directory / f"{name}.key").read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{name}.key is not an EC key")
    return Pair(certificate, key)


class Authority:
    def __init__(self, pair: Pair) -> None:
        self.pair = pair

    @classmethod
    def create(cls, name: str = "worker-svc CA", days: int = 3650) -> Authority:
        key = _new_key()
        builder = _builder(name, key.public_key(), days).issuer_name(_subject(name))
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
        return cls(Pair(builder.sign(key, hashes.SHA256()), key))

    def issue(
        self,
        name: str,
        names: Sequence[x509.GeneralName],
        *,
        is_server: bool = False,
        days: float = 825,
        starts: datetime.datetime | None = None,
    ) -> Pair:
        """`names`: its alternative names; without any, only its common name says whose it is."""
        key = _new_key()
        issuer = self.pair.certificate
        builder = _builder(name, key.public_key(), days, starts).issuer_name(issuer.subject)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
        purpose = ExtendedKeyUsageOID.SERVER_AUTH if is_server else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.pair.key.public_key())
        builder = builder.add_extension(authority, critical=False)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return Pair(builder.sign(self.pair.key, hashes.SHA256()), key)

    def revocation_list(self, serials: Iterable[int], days: int = 3650) -> bytes:
        """A CRL (PEM). Once its time is up, no client is let in: make it anew before."""
        now = _now()
        builder = x509.CertificateRevocationListBuilder().issuer_name(self.pair.certificate.subject)
        builder = builder.last_update(now - _ONE_DAY).next_update(now + datetime.timedelta(days=days))
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.pair.key.public_key())
        builder = builder.add_extension(identifier, critical=False)
        builder = builder.add_extension(x509.CRLNumber(int(now.timestamp())), critical=False)
        for serial in sorted(serials):
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now)
            builder = builder.add_revoked_certificate(entry.build())
        return builder.sign(self.pair.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def make_directory(
    directory: Path, *, hosts: Sequence[str], clients: Sequence[str], revoke: Sequence[str] = (), days: int = 825
) -> list[str]:
    """An authority, a server's and clients' certificates, a CRL. What is there already stays; returns what was made.

    `revoke`: clients of the directory whose certificates are to be refused from now on.

    Raises OSError, or ValueError for what is there and cannot be used.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    made: list[str] = []
    if (directory / f"{CA_NAME}.pem").exists():
        authority = Authority(read_pair(directory, CA_NAME))
    else:
        authority = Authority.create()
        authority.pair.write(directory, CA_NAME)
        made.append(CA_NAME)
    if not (directory / f"{SERVER_NAME}.pem").exists():
        names = [general_name(host) for host in hosts]
        authority.issue(hosts[0], names, is_server=True, days=days).write(directory, SERVER_NAME)
        made.append(SERVER_NAME)
    for client in clients:
        if not (directory / f"{client}.pem").exists():
            authority.issue(client, [x509.DNSName(client)], days=days).write(directory, client)
            made.append(client)
    crl = directory / CRL_NAME
    if revoke or not crl.exists():
        fresh = {read_pair(directory, name).certificate.serial_number for name in revoke}
        _replace(crl, authority.revocation_list(fresh | _revoked_before(crl)))
        made.append(CRL_NAME)
    return made


def default_hosts() -> list[str]:
    return list(dict.fromkeys(("localhost", socket.gethostname(), "127.0.0.1", "::1")))


def general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _revoked_before(crl: Path) -> set[int]:
    if not crl.exists():
        return set()
    return {entry.serial_number for entry in x509.load_pem_x509_crl(crl.read_bytes())}


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    name: str, key: ec.EllipticCurvePublicKey, days: float, starts: datetime.datetime | None = None
) -> x509.CertificateBuilder:
    starts = starts or _now() - _ONE_DAY
    return (
        x509.CertificateBuilder()
        .subject_name(_subject(name))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(starts)
        .not_valid_after(starts + _ONE_DAY + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


def _write_new(path: Path, content: bytes, mode: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with open(fd, "wb") as file:
        file.write(content)


def _replace(path: Path, content: bytes) -> None:
    """At once: whoever reads it meanwhile has the old or the new one, whole."""
    draft = path.with_name(f".{path.name}.new")
    draft.unlink(missing_ok=True)
    _write_new(draft, content, 0o644)
    draft.replace(path)
