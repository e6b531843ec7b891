"""The audit: each change and each denial is a line, and what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.support.peers import Peer, Peers
from tests.support.secured import last_audit, tls_keys
from tests.support.waiting import eventually_sync
from tests.support.workers import PATIENCE_S, Worker


def test_a_line_of_the_audit(secured: Worker, clients: dict[str, Peer]) -> None:
    job_id = clients["red"].start("true")
    line = last_audit(secured, rpc="StartJob", job_id=job_id)
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
        "command": "true",
    }


def lines_of(worker: Worker, job_id: str) -> list[tuple[str, str, str]]:
    lines = [line for line in worker.log_events("audit") if line["job_id"] == job_id]
    return [(line["rpc"], line["decision"], line["rule"]) for line in lines]


def test_what_fails_names_its_job(secured: Worker, clients: dict[str, Peer]) -> None:
    """Malformed, denied, and allowed but not possible: the last with a second line."""
    red, operator, viewer = clients["red"], clients["operator"], clients["viewer"]
    assert red.call("StartJob", job_id="malformed").name == "INVALID_ARGUMENT"
    assert lines_of(secured, "malformed") == [("StartJob", "failed", "INVALID_ARGUMENT")]
    # Nothing is read of what a role may not call at all: not the job's id either, nor what is wrong with it.
    start: Any = viewer.channel.unary_unary("/jobscheduler.Worker/StartJob")
    with pytest.raises(grpc.RpcError) as caught:
        start(b"\xff" * 4_000_000)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert lines_of(secured, "")[-1] == ("StartJob", "denied", "role viewer: StartJob denied")
    assert operator.call("StopJob", jobID="a/b" * 100).name == "INVALID_ARGUMENT"
    assert lines_of(secured, "(malformed)")[-1] == ("StopJob", "failed", "INVALID_ARGUMENT")

    allowed = "role operator: allowed"
    assert operator.call("DeleteJob", jobID="not-there").name == "NOT_FOUND"
    assert lines_of(secured, "not-there") == [("DeleteJob", "allowed", allowed), ("DeleteJob", "failed", "NOT_FOUND")]
    job_id = red.start("sleep", "999")
    assert operator.call("DeleteJob", jobID=job_id).name == "FAILED_PRECONDITION"
    assert lines_of(secured, job_id)[1:] == [
        ("DeleteJob", "allowed", allowed),
        ("DeleteJob", "failed", "FAILED_PRECONDITION"),
    ]
    red.ok("StopJob", jobID=job_id, wait=True)
    assert red.call("StartJob", command="/no/such", job_id="no-such").name == "FAILED_PRECONDITION"
    assert [decision for _, decision, _ in lines_of(secured, "no-such")] == ["allowed", "failed"]
    # A job that the worker had to name has that name in both lines.
    assert red.call("StartJob", command="/no/such").name == "FAILED_PRECONDITION"
    failed = last_audit(secured, rpc="StartJob", decision="failed")
    assert [decision for _, decision, _ in lines_of(secured, failed["job_id"])] == ["allowed", "failed"]
    assert (failed["identity"], failed["rule"], failed["level"]) == ("dns:red", "FAILED_PRECONDITION", "warning")


def test_no_room_for_a_job(tmp_path: Path, peers: Peers) -> None:
    keys = {**tls_keys(peers.certs), "JOBS_SLOTS": "1", "JOBS_QUEUE_LENGTH": "0"}
    with Worker(tmp_path, **keys) as worker, peers.connect(worker.address, "red") as red:
        red.start("sleep", "999")
        assert red.call("StartJob", command="true", job_id="full").name == "RESOURCE_EXHAUSTED"
        assert [line[1:] for line in lines_of(worker, "full")][-1] == ("failed", "RESOURCE_EXHAUSTED")


def test_each_job_that_is_pruned_has_a_line(secured: Worker, clients: dict[str, Peer]) -> None:
    blue = clients["blue"]
    ids = [blue.start("true") for _ in range(5)]
    for job_id in ids:
        blue.wait(job_id)
    before = len(secured.log_events("audit"))
    blue.ok("PruneJobs", max_count=0, dry_run=True)
    [asked] = secured.log_events("audit")[before:]
    assert (asked["rpc"], asked["job_id"], asked["dry_run"]) == ("PruneJobs", "", True)
    blue.ok("PruneJobs", max_count=0)
    asked, *pruned = secured.log_events("audit")[before + 1 :]
    assert "dry_run" not in asked
    assert [line["job_id"] for line in pruned] == ids
    assert {(line["identity"], line["decision"], line["rule"]) for line in pruned} == {
        ("dns:blue", "allowed", "pruned")
    }


def test_no_level_of_the_log_leaves_out_the_audit(tmp_path: Path, peers: Peers) -> None:
    keys = {**tls_keys(peers.certs), "LOG_LEVEL": "error", "GRPC_SERVER_ADDR": f"unix:{tmp_path}/w.sock"}
    worker = Worker(tmp_path, **keys)
    worker.spawn()
    try:
        eventually_sync((tmp_path / "w.sock").is_socket, PATIENCE_S, "the worker does not serve")
        options = [("grpc.ssl_target_name_override", "localhost")]
        with grpc.secure_channel(f"unix:{tmp_path}/w.sock", peers.credentials("red"), options) as channel:
            job_id = Peer(channel, peers.messages).start("true")
        assert [decision for _, decision, _ in lines_of(worker, job_id)] == ["allowed"]
        assert {line["event"] for line in worker.log_events()} == {"audit"}
    finally:
        worker.__exit__(None, None, None)
