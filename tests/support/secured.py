"""A worker over mTLS: certificates good and bad, its configuration, and its audit."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any, Final

from cryptography import x509

from tests.support.workers import Worker
from worker_svc.access.certs import Authority, make_directory, read_pair

CLIENTS: Final = ("admin", "operator", "red", "blue", "viewer", "stranger", "revoked")


def make_certs(folder: Path) -> Path:
    """All sorts of clients, good and bad."""
    make_directory(folder, hosts=["localhost", "127.0.0.1"], clients=CLIENTS, revoke=["revoked"])
    authority = Authority.create("somebody else's CA")
    authority.issue("foreign", [x509.DNSName("admin")]).write(folder, "foreign")
    ours = Authority(read_pair(folder, "ca"))
    before = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=10)
    ours.issue("expired", [x509.DNSName("admin")], starts=before, days=5).write(folder, "expired")
    ours.issue("nameless", [x509.RFC822Name("x" * 300 + "@example")]).write(folder, "nameless")
    # The name says uid:0; it is a certificate's all the same.
    ours.issue("uid:0", []).write(folder, "uid0")
    ours.issue("server", [x509.DNSName("admin")], is_server=True).write(folder, "server-as-client")
    return folder


def tls_keys(certs: Path) -> dict[str, Any]:
    return {
        "GRPC_SERVER_USE_TLS": "true",
        "GRPC_SERVER_CRT_FILE": str(certs / "server.pem"),
        "GRPC_SERVER_KEY_FILE": str(certs / "server.key"),
        "GRPC_SERVER_CLIENT_CA_FILE": str(certs / "ca.pem"),
        "GRPC_SERVER_CRL_FILE": str(certs / "crl.pem"),
        "ACCESS_ADMINS": "dns:admin,uid:0",
        "ACCESS_OPERATORS": "dns:operator",
        "ACCESS_SUBMITTERS": "dns:red,dns:blue",
        "ACCESS_VIEWERS": "dns:viewer",
        "JOBS_SLOTS": "100",
    }


def last_audit(worker: Worker, **fields: str) -> dict[str, Any]:
    lines = [line for line in worker.log_events("audit") if all(line[key] == fields[key] for key in fields)]
    assert lines, f"no line of the audit has {fields}"
    return lines[-1]
