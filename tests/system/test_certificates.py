"""Certificates, authorities and revocations that change while the worker runs."""

from __future__ import annotations

import ipaddress
import signal
import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509

from tests.support import programs
from tests.support.peers import Peer, Peers
from tests.support.secured import make_certs, tls_keys
from tests.support.waiting import eventually_sync
from tests.support.workers import Worker
from worker_svc.access.certs import Authority, make_directory, read_pair


@contextmanager
def served(tmp_path: Path) -> Iterator[tuple[Worker, Peers]]:
    certs = make_certs(tmp_path / "certs")
    with Worker(tmp_path, **tls_keys(certs)) as worker:
        yield worker, Peers(certs, tmp_path)


def follow(peer: Peer, go: Path) -> tuple[str, Any]:
    """A stream of a job that runs until the file is there, and that has sent something."""
    job_id = peer.start("sh", "-c", f"echo begun; until [ -e {go} ]; do sleep 0.02; done; echo done")
    stream = peer.stream("StreamJob", jobID=job_id, follow=True)
    assert next(stream).data == b"begun\n"
    return job_id, stream


def test_who_is_revoked_makes_no_new_calls_on_an_open_connection(tmp_path: Path) -> None:
    with (
        served(tmp_path) as (worker, peers),
        peers.connect(worker.address, "red") as red,
        peers.connect(worker.address, "blue") as idle,
        peers.connect(worker.address, "operator") as operator,
    ):
        idle.ok("GetWorker")
        _, theirs = follow(operator, tmp_path / "go")
        job_id, stream = follow(red, tmp_path / "go")
        make_directory(peers.certs, hosts=[], clients=[], revoke=["red", "blue"])
        assert worker.wait_log("tls.clients_refused")["connections"] == 2
        # Neither on this connection nor on another one.
        for _ in range(3):
            assert red.call("StopJob", jobID=job_id).name == "UNAVAILABLE"
            assert idle.call("GetWorker").name == "UNAVAILABLE"
        # What ran goes on until it ends, and others notice nothing.
        assert operator.ok("QueryJob", jobID=job_id).job.state == 3
        (tmp_path / "go").touch()
        assert [chunk.data for chunk in stream] == [chunk.data for chunk in theirs] == [b"done\n"]
        operator.ok("GetWorker")
        assert red.call("GetWorker").name == "UNAVAILABLE"


def test_who_expires_makes_no_new_calls_on_an_open_connection(tmp_path: Path) -> None:
    with served(tmp_path) as (worker, peers), peers.connect(worker.address, "operator") as operator:
        _, theirs = follow(operator, tmp_path / "go")
        authority = Authority(read_pair(peers.certs, "ca"))
        before = datetime.now(UTC) - timedelta(days=1)
        brief = authority.issue("red", [x509.DNSName("red")], starts=before, days=8 / 86400)
        brief.write(peers.certs, "brief")
        with peers.connect(worker.address, "brief") as red:
            _, stream = follow(red, tmp_path / "go")
            eventually_sync(lambda: red.call("GetWorker").name == "UNAVAILABLE")
            assert datetime.now(UTC) >= brief.certificate.not_valid_after_utc
            assert red.call("GetWorker").name == "UNAVAILABLE"
            # What ran goes on until it ends, and others notice nothing.
            (tmp_path / "go").touch()
            assert [chunk.data for chunk in stream] == [chunk.data for chunk in theirs] == [b"done\n"]
            operator.ok("GetWorker")


def is_served(peers: Peers, worker: Worker) -> bool:
    with peers.connect(worker.address, "red") as red:
        return red.call("GetWorker").name == "OK"


def test_who_shows_no_certificate_locks_nobody_out_who_has_one(tmp_path: Path) -> None:
    """Silent connections, and ones that stop within their handshake, from several addresses and that of the client."""
    certs = make_certs(tmp_path / "certs")
    keys = {**tls_keys(certs), "TRANSPORT_MAX_CONNECTIONS": "40", "TRANSPORT_MAX_CONNECTIONS_PER_PEER": "20"}
    peers = Peers(certs, tmp_path)
    with Worker(tmp_path, **keys) as worker, ExitStack() as stack:
        first = stack.enter_context(peers.connect(worker.address, "operator"))
        first.ok("GetWorker")
        host, _, port = worker.address.rpartition(":")
        for number in range(200):
            source = (f"127.0.0.{number % 5 + 1}", 0)
            silent = stack.enter_context(socket.create_connection((host, int(port)), source_address=source))
            with suppress(ConnectionError):
                silent.sendall(b"\x16\x03\x01\x02\x00\x01" if number % 2 else b"")
        for _ in range(5):
            eventually_sync(lambda: is_served(peers, worker))
        first.ok("GetWorker")
        assert "too many connections (transport.max_connections" in worker.log_path.read_text()


def test_an_authority_that_is_not_trusted_any_more(tmp_path: Path) -> None:
    certs = make_certs(tmp_path / "certs")
    peers, keys = Peers(certs, tmp_path), {**tls_keys(certs), "GRPC_SERVER_CRL_FILE": ""}
    with Worker(tmp_path, **keys) as worker, peers.connect(worker.address, "red") as red:
        job_id, stream = follow(red, tmp_path / "go")
        ours, other = (certs / "ca.pem").read_bytes(), Authority.create("another CA")
        other.pair.write(certs, "other-ca")
        theirs = (certs / "other-ca.pem").read_bytes()
        (certs / "ca.pem").write_bytes(ours + theirs)
        worker.wait_log("tls.reloaded")
        assert red.ok("QueryJob", jobID=job_id).job.state == 3
        (certs / "ca.pem").write_bytes(theirs)
        worker.wait_log("tls.clients_refused")
        assert red.call("QueryJob", jobID=job_id).name == "UNAVAILABLE"
        (tmp_path / "go").touch()
        assert [chunk.data for chunk in stream] == [b"done\n"]


def test_certificates_are_read_again_and_streams_live_on(tmp_path: Path) -> None:
    certs = make_certs(tmp_path / "certs")
    own = Peers(certs, tmp_path)
    with Worker(tmp_path, **tls_keys(certs)) as worker, own.connect(worker.address, "red") as red:

        def served() -> int:
            host, _, port = worker.address.rpartition(":")
            context = ssl.create_default_context(cafile=certs / "ca.pem")
            context.load_cert_chain(certs / "red.pem", certs / "red.key")
            with (
                socket.create_connection((host, int(port))) as plain,
                context.wrap_socket(plain, server_hostname=host) as tls,
            ):
                return x509.load_der_x509_certificate(tls.getpeercert(binary_form=True) or b"").serial_number

        go = tmp_path / "go"
        job_id = red.start(*programs.until_exists(go))
        stream = red.stream("StreamJob", jobID=job_id, follow=True)
        first = served()
        authority = Authority(read_pair(certs, "ca"))

        # New files: they are noticed by themselves, both of them.
        fresh = authority.issue("localhost", [x509.DNSName("localhost"), x509.IPAddress(_loopback())], is_server=True)
        fresh.write(tmp_path, "new")
        (tmp_path / "new.key").rename(certs / "server.key")
        (tmp_path / "new.pem").rename(certs / "server.pem")
        worker.wait_log("tls.reloaded")
        assert served() == fresh.certificate.serial_number != first

        # A broken one is told of, and the one before stays.
        (certs / "server.pem").write_text("nonsense")
        told = worker.wait_log("tls.not_reloaded")
        assert told["level"] == "error"
        assert "grpc_server.crt_file" in told["reason"]
        assert served() == fresh.certificate.serial_number

        # On SIGHUP too; it is still no good.
        count = len(worker.log_events("tls.not_reloaded"))
        assert worker.process is not None
        worker.process.send_signal(signal.SIGHUP)
        worker.wait_log("tls.not_reloaded", count + 1)
        (certs / "server.pem").unlink()
        (certs / "server.key").unlink()
        make_directory(certs, hosts=["localhost", "127.0.0.1"], clients=[])
        worker.wait_log("tls.reloaded", 2)
        assert served() not in (first, fresh.certificate.serial_number)

        # Revoked from now on; who is connected stays so.
        make_directory(certs, hosts=["localhost"], clients=[], revoke=["blue"])
        worker.wait_log("tls.reloaded", 3)
        with own.connect(worker.address, "blue") as blue, own.connect(worker.address, "revoked") as revoked:
            assert blue.call("GetWorker").name == revoked.call("GetWorker").name == "UNAVAILABLE"
        go.touch()
        assert list(stream) == []
        assert red.wait(job_id).outcome == 1


def _loopback() -> Any:
    return ipaddress.ip_address("127.0.0.1")
