"""Which clients that were let in would still be."""

from __future__ import annotations

import errno
import math
import os
import ssl
import time
from pathlib import Path

import pytest
import structlog
from structlog.testing import capture_logs

from tests.support.waiting import eventually
from worker_svc.access import tls
from worker_svc.access.certs import Authority, make_directory, read_pair
from worker_svc.access.tls import Reloader, SecurityError, acceptance, expiry_s, server_context
from worker_svc.config import GrpcServerConfig


@pytest.fixture
def few_certs(tmp_path: Path) -> Path:
    make_directory(tmp_path / "certs", hosts=["localhost"], clients=["red", "blue"])
    return tmp_path / "certs"


def config(certs: Path, ca: str = "ca.pem") -> GrpcServerConfig:
    return GrpcServerConfig(
        use_tls=True, crt_file=certs / "server.pem", key_file=certs / "server.key",
        client_ca_file=certs / ca, crl_file=certs / "crl.pem",
    )  # fmt: skip


def connected(served: ssl.SSLContext, certs: Path, name: str) -> ssl.SSLObject:
    """The worker's end of a connection."""
    context = ssl.create_default_context(cafile=certs / "ca.pem")
    if name:
        context.load_cert_chain(certs / f"{name}.pem", certs / f"{name}.key")
    inwards, outwards = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(outwards, inwards, server_hostname="localhost")
    server = served.wrap_bio(inwards, outwards, server_side=True)
    for end in (client, server, client, server):
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            continue
    return server


def accepts(certs: Path, connection: ssl.SSLObject, ca: str = "ca.pem") -> bool:
    return acceptance(server_context(config(certs, ca)), certs / "crl.pem")(connection)


def test_revoked_or_expired(few_certs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = server_context(config(few_certs))
    assert served is not None
    red, blue = connected(served, few_certs, "red"), connected(served, few_certs, "blue")
    assert accepts(few_certs, red)
    make_directory(few_certs, hosts=[], clients=[], revoke=["red"])
    assert not accepts(few_certs, red)
    assert accepts(few_certs, blue)
    later_s = time.time() + 826 * 86_400
    monkeypatch.setattr("worker_svc.access.tls.time.time", lambda: later_s)
    assert not accepts(few_certs, blue)


def test_when_it_expires(few_certs: Path) -> None:
    served = server_context(config(few_certs))
    assert served is not None
    red, ca = connected(served, few_certs, "red"), read_pair(few_certs, "ca")
    until = [pair.certificate.not_valid_after_utc.timestamp() for pair in (read_pair(few_certs, "red"), ca)]
    assert expiry_s(red) == min(until)
    brief = Authority(ca).issue("red", [], days=0.5)
    brief.write(few_certs, "brief")
    assert expiry_s(connected(served, few_certs, "brief")) == brief.certificate.not_valid_after_utc.timestamp()


def test_of_another_authority(few_certs: Path) -> None:
    served = server_context(config(few_certs))
    assert served is not None
    red = connected(served, few_certs, "red")
    Authority.create("another").pair.write(few_certs, "other")
    assert not accepts(few_certs, red, "other.pem")
    (few_certs / "both.pem").write_bytes((few_certs / "other.pem").read_bytes() + (few_certs / "ca.pem").read_bytes())
    assert accepts(few_certs, red, "both.pem")


def test_who_was_asked_for_no_certificate(few_certs: Path) -> None:
    plain = server_context(
        GrpcServerConfig(use_tls=True, crt_file=few_certs / "server.pem", key_file=few_certs / "server.key")
    )
    assert plain is not None
    nobody = connected(plain, few_certs, "")
    assert acceptance(plain, None)(nobody)
    assert expiry_s(nobody) == math.inf
    assert not accepts(few_certs, nobody)


@pytest.mark.parametrize("serial", [1, 127, 128, 255, 2**64, 2**150 - 1])
def test_serial_numbers(serial: int, few_certs: Path) -> None:
    """One is also the version of every CRL."""
    authority = Authority(read_pair(few_certs, "ca"))
    for listed in ([], [serial], [5, serial, 2**100], [serial + 1, serial << 8]):
        (few_certs / "crl.pem").write_bytes(b"# ours\n" + authority.revocation_list(listed))
        assert tls._is_listed(serial, tls._crl_bytes(few_certs / "crl.pem")) == (serial in listed)


def test_a_list_that_is_not_there(few_certs: Path) -> None:
    with pytest.raises(SecurityError, match=r"grpc_server\.crl_file: .*gone"):
        acceptance(None, few_certs / "gone")


async def test_files_are_looked_at_where_they_cannot_be_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No inotify instance is left, as when other programs have them all."""

    def refuse() -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(tls, "inotify_init", refuse)
    monkeypatch.setattr(tls, "_LOOK_EVERY_S", 0.01)
    file = tmp_path / "server.pem"
    file.touch()
    reloaded: list[int] = []
    with capture_logs() as said:
        reloader = Reloader([file], lambda: reloaded.append(1), structlog.get_logger())
        reloader.watch()
        file.write_text("another")
        await eventually(lambda: reloaded)
        reloader.close()
    assert [line["event"] for line in said] == ["tls.not_watched", "tls.reloaded"]
