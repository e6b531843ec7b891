"""The audit: each change and each denial is a line, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.support.peers import Peer, Peers
from tests.support.secured import last_audit, make_certs, tls_keys
from tests.support.workers import Worker


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Peers:
    folder = tmp_path_factory.mktemp("certs")
    return Peers(make_certs(folder / "certs"), folder)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, peers: Peers) -> Iterator[Worker]:
    with Worker(tmp_path_factory.mktemp("worker"), **tls_keys(peers.certs)) as running:
        yield running


@pytest.fixture(scope="module")
def clients(worker: Worker, peers: Peers) -> Iterator[dict[str, Peer]]:
    with ExitStack() as stack:
        names = ("admin", "operator", "red", "blue", "viewer")
        yield {name: stack.enter_context(peers.connect(worker.address, name)) for name in names}


def test_a_line_of_the_audit(worker: Worker, clients: dict[str, Peer]) -> None:
    job_id = clients["red"].start("true")
    line = last_audit(worker, rpc="StartJob", job_id=job_id)
    assert line.pop("timestamp")
    assert line.pop("peer").startswith("127.0.0.1:")
    assert line == {
        "event": "audit",
        "level": "info",
        "identity": "dns:red",
        "role": "submitter",
        "rpc": "StartJob",
        "job_id": job_id,
        "decision": "allowed",
        "rule": "default: everything is allowed",
    }
    assert clients["red"].call("StartJob").name == "INVALID_ARGUMENT"
    failed = last_audit(worker, rpc="StartJob", decision="failed")
    assert (failed["identity"], failed["rule"], failed["job_id"]) == ("dns:red", "INVALID_ARGUMENT", "")
