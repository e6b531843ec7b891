"""A worker over mTLS for the tests of a module, and its clients; modules with another kind of worker have their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.support.peers import Peer, Peers
from tests.support.secured import make_certs, tls_keys
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
        names = ("admin", "operator", "red", "blue", "viewer", "stranger", "uid0", "nameless")
        yield {name: stack.enter_context(peers.connect(worker.address, name)) for name in names}
