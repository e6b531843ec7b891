"""Who gets in, and what each role may do: a worker over mTLS."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support import programs
from tests.support.peers import Peer, Peers
from tests.support.secured import last_audit, tls_keys
from tests.support.workers import PATIENCE_S, Worker
from worker_svc.access.roles import RPCS, Role, Scope, Verdict

ROLE_OF = {"admin": Role.ADMIN, "operator": Role.OPERATOR, "red": Role.SUBMITTER, "viewer": Role.VIEWER}


# Who gets in


REASONS = {
    "": "PEER_DID_NOT_RETURN_A_CERTIFICATE",
    "expired": "certificate has expired",
    "foreign": "unable to get local issuer certificate",
    "revoked": "certificate revoked",
    "server-as-client": "certificate",
}


@pytest.mark.parametrize("name", list(REASONS))
def test_no_connection_with_a_bad_certificate(secured: Worker, peers: Peers, name: str) -> None:
    before = len(secured.log_events("audit"))
    with peers.connect(secured.address, name) as peer:
        assert peer.call("GetWorker").name == "UNAVAILABLE"
    line = secured.wait_log("audit", before + 1)
    assert (line["decision"], line["identity"], line["peer"]) == ("denied", "", "127.0.0.1")
    assert line["rule"].startswith("TLS handshake: ")
    assert REASONS[name] in line["rule"]


def test_no_connection_in_plain(secured: Worker, peers: Peers) -> None:
    import grpc

    with grpc.insecure_channel(secured.address) as channel:
        assert Peer(channel, peers.messages).call("GetWorker").name == "UNAVAILABLE"


def test_no_older_tls(secured: Worker, peers: Peers) -> None:
    import socket
    import ssl

    host, _, port = secured.address.rpartition(":")
    context = ssl.create_default_context(cafile=peers.certs / "ca.pem")
    context.load_cert_chain(peers.certs / "admin.pem", peers.certs / "admin.key")
    context.set_alpn_protocols(["http/1.1", "h2"])
    with socket.create_connection((host, int(port))) as plain, context.wrap_socket(plain, server_hostname=host) as tls:
        assert (tls.version(), tls.selected_alpn_protocol()) == ("TLSv1.3", "h2")
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection((host, int(port))) as plain, pytest.raises(ssl.SSLError):
        context.wrap_socket(plain, server_hostname=host)


@pytest.mark.parametrize("name", ["stranger", "uid0", "nameless"])
@pytest.mark.parametrize("rpc", sorted(RPCS))
def test_a_name_without_a_role_may_do_nothing(secured: Worker, clients: dict[str, Peer], name: str, rpc: str) -> None:
    identity = {"stranger": "dns:stranger", "uid0": "cn:uid:0", "nameless": "nameless"}[name]
    answer = clients[name].call(rpc)
    assert answer.name == "PERMISSION_DENIED"
    assert answer.details == f"{identity} has no role on this worker (its [access] section gives roles)"
    line = last_audit(secured, identity=identity, rpc=rpc)
    assert (line["decision"], line["role"], line["rule"], line["level"]) == (
        "denied", "none", f"role none: {rpc} denied", "warning",
    )  # fmt: skip
    assert line["peer"].startswith("127.0.0.1:")


# Each role against each RPC


def prepared(rpc: str, owner: Peer) -> dict[str, Any]:
    """What to ask with, such that it must work for who may."""
    match rpc:
        case "StartJob":
            return {"command": "true"}
        case "DeleteJob" | "WaitJob" | "StreamJob" | "QueryJob":
            job_id = owner.start("true")
            owner.wait(job_id)
            return {"jobID": job_id}
        case "SignalJob":
            return {"jobID": owner.start(*programs.SLEEP), "signal": "TERM"}
        case "StopJob" | "PauseJob":
            return {"jobID": owner.start(*programs.SLEEP)}
        case "ResumeJob":
            job_id = owner.start(*programs.SLEEP)
            owner.ok("PauseJob", jobID=job_id)
            return {"jobID": job_id}
        case "PruneJobs":
            return {"max_count": 1_000_000}
        case "StartJobs" | "RunJobs":
            return {"starts": [{"command": "true", "job_id": f"many-{time.monotonic_ns()}"}]}
        case "QueryJobs":
            return {"job_ids": [owner.start("true")]}
        case "StopJobs":
            return {"stops": [{"jobID": owner.start(*programs.SLEEP)}]}
    return {}


@pytest.mark.parametrize("role", list(ROLE_OF))
@pytest.mark.parametrize("rpc", sorted(RPCS))
def test_each_role_against_each_rpc(secured: Worker, clients: dict[str, Peer], rpc: str, role: str) -> None:
    verdict = RPCS[rpc].verdict(ROLE_OF[role])
    if rpc == "ShutdownWorker" and verdict is not Verdict.DENIED:
        pytest.skip("it ends the worker: test_only_an_admin_ends_the_worker")
    fields = prepared(rpc, clients["red"])
    if rpc == "WatchJobs":
        stream = clients[role].stream("WatchJobs", from_sequence=1)
        if verdict is Verdict.DENIED:
            pytest.fail("every role may watch")
        clients["red"].start("true")
        assert next(stream).sequence >= 1
        stream.cancel()
        return
    answer = clients[role].call(rpc, **fields)
    if verdict is Verdict.DENIED:
        assert answer.name == "PERMISSION_DENIED"
        label = ROLE_OF[role].label
        assert answer.details == f"{rpc} is not for role {label}, which dns:{role} has"
    else:
        assert answer.name == "OK", answer
    if RPCS[rpc].scope is Scope.MANY and verdict is not Verdict.DENIED:
        assert [result.code for result in answer.message.results] == [0]
        if RPCS[rpc].mutates:  # as a call for that job alone
            (one,) = fields.get("starts") or fields["stops"]
            line = last_audit(secured, identity=f"dns:{role}", rpc="StopJob" if rpc == "StopJobs" else "StartJob")
            assert (line["decision"], line["job_id"]) == ("allowed", one.get("jobID") or one["job_id"])
    elif RPCS[rpc].mutates:
        line = last_audit(secured, identity=f"dns:{role}", rpc=rpc)
        assert line["decision"] == ("denied" if verdict is Verdict.DENIED else "allowed")
        started = answer.message.jobID if rpc == "StartJob" and answer.message else ""
        is_read = verdict is not Verdict.DENIED
        assert line["job_id"] == (fields.get("jobID", started) if is_read else "")


def test_looking_is_not_audited(secured: Worker, clients: dict[str, Peer]) -> None:
    before = len(secured.log_events("audit"))
    clients["viewer"].ok("ListJobs")
    clients["viewer"].ok("GetWorker")
    assert len(secured.log_events("audit")) == before


# Who may end it all


def test_only_an_admin_ends_the_worker(tmp_path: Path, peers: Peers) -> None:
    with Worker(tmp_path, **tls_keys(peers.certs)) as worker, ExitStack() as stack:
        for name in ("operator", "red", "viewer"):
            peer = stack.enter_context(peers.connect(worker.address, name))
            assert peer.call("ShutdownWorker", stop_jobs=True).name == "PERMISSION_DENIED"
        admin = stack.enter_context(peers.connect(worker.address, "admin"))
        admin.ok("ShutdownWorker")
        assert worker.process is not None
        assert worker.process.wait(PATIENCE_S) == 0
