"""The worker over mTLS, with a client of another make: who gets in, and what each may do and see."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support import programs, stalled_fs
from tests.support.peers import Answer, Peer, Peers
from tests.support.secured import last_audit, tls_keys
from tests.support.workers import PATIENCE_S, Worker
from worker_svc.access.roles import RPCS, Role, Scope, Verdict

ROLE_OF = {"admin": Role.ADMIN, "operator": Role.OPERATOR, "red": Role.SUBMITTER, "viewer": Role.VIEWER}
NO_JOB = "no-such-job"


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
    if RPCS[rpc].mutates:
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


# Ownership

BY_JOB = sorted(name for name, rpc in RPCS.items() if rpc.scope is Scope.JOB)
EXTRA: dict[str, dict[str, Any]] = {
    "SignalJob": {"signal": "KILL"},
    "StopJob": {"wait": True},
    "StreamJob": {"follow": True},
}


@pytest.mark.parametrize("state", ["running", "finished"])
@pytest.mark.parametrize("rpc", BY_JOB)
def test_another_submitters_job_is_not_there(secured: Worker, clients: dict[str, Peer], rpc: str, state: str) -> None:
    red, blue = clients["red"], clients["blue"]
    job_id = red.start(*(programs.SLEEP if state == "running" else programs.TRUE))
    if state == "finished":
        red.wait(job_id)
    extra = EXTRA.get(rpc, {})
    missing = blue.call(rpc, jobID=NO_JOB, **extra)
    assert missing == Answer(missing.code, "job not found")
    assert missing.name == "NOT_FOUND"
    assert blue.call(rpc, jobID=job_id, **extra) == missing
    # And nothing happened to it.
    job = red.ok("QueryJob", jobID=job_id).job
    assert (job.state, job.paused) == (3 if state == "running" else 5, False)
    lines = [line for line in secured.log_events("audit") if line["identity"] == "dns:blue" and line["rpc"] == rpc]
    assert [(line["job_id"], line["decision"], line["rule"]) for line in lines[-2:]] == [
        (NO_JOB, "denied", "own jobs only"),
        (job_id, "denied", "own jobs only"),
    ]
    # Nor is anything looked up for one of the two lines that is not for the other.
    assert lines[-1].keys() == lines[-2].keys()
    if state == "running":
        red.ok("StopJob", jobID=job_id, wait=True)


def test_a_malformed_id_is_told_as_to_everybody(clients: dict[str, Peer]) -> None:
    for rpc in BY_JOB:
        assert clients["blue"].call(rpc, jobID="a/b", **EXTRA.get(rpc, {})).name == "INVALID_ARGUMENT"


def test_operators_reach_all_jobs_and_owners_their_own(clients: dict[str, Peer]) -> None:
    job_id = clients["red"].start(*programs.SLEEP)
    assert clients["viewer"].ok("QueryJob", jobID=job_id).job.owner == "dns:red"
    clients["operator"].ok("PauseJob", jobID=job_id)
    clients["red"].ok("ResumeJob", jobID=job_id)
    clients["operator"].ok("StopJob", jobID=job_id, wait=True)
    clients["red"].ok("DeleteJob", jobID=job_id)


def test_lists_have_ones_own_jobs_only(clients: dict[str, Peer]) -> None:
    labels = {"test": "lists"}
    ids = {name: [clients[name].start("true", labels=labels) for _ in range(3)] for name in ("red", "blue", "operator")}
    for name in ("red", "blue"):
        pages: list[str] = []
        token = ""
        while True:
            page = clients[name].ok("ListJobs", labels=labels, page_size=2, page_token=token)
            pages += [job.job_id for job in page.jobs]
            token = page.next_page_token
            if not token:
                break
        assert sorted(pages) == sorted(ids[name])
        assert {job.owner for job in clients[name].ok("ListJobs", page_size=1000).jobs} == {f"dns:{name}"}
    everything = {job.job_id for job in clients["viewer"].ok("ListJobs", labels=labels).jobs}
    assert everything == {job_id for group in ids.values() for job_id in group}


def test_watches_show_ones_own_jobs_only(clients: dict[str, Peer]) -> None:
    """Past and live, named and not, of jobs that are deleted too."""
    red, blue = clients["red"], clients["blue"]
    theirs = red.start("true")
    red.wait(theirs)
    red.ok("DeleteJob", jobID=theirs)
    past, named = blue.stream("WatchJobs", from_sequence=1), blue.stream("WatchJobs", from_sequence=1, job_ids=[theirs])
    own = blue.start("true")
    seen = []
    for moved in past:
        seen.append(moved)
        if moved.job_id == own and moved.to_state == 5:
            break
    mine = {job.job_id for job in blue.ok("ListJobs", page_size=1000).jobs}
    assert {moved.job_id for moved in seen} <= mine
    assert theirs not in {moved.job_id for moved in seen}
    # Live: what red does in between does not come.
    live = blue.stream("WatchJobs")
    red.wait(red.start("true"))
    again = blue.start("true")
    assert next(iter(live)).job_id == again
    # The one who asked for theirs by name has got nothing until now, and the owner gets all.
    named.cancel()
    owners = red.stream("WatchJobs", from_sequence=1, job_ids=[theirs])
    assert [next(owners).to_state for _ in range(3)] == [2, 3, 5]
    owners.cancel()
    past.cancel()
    live.cancel()
    with pytest.raises(Exception, match="CANCELLED"):
        next(named)


def test_prune_removes_ones_own_jobs_only(clients: dict[str, Peer]) -> None:
    red, blue = clients["red"], clients["blue"]
    theirs, own = red.start("true"), blue.start("true")
    red.wait(theirs)
    blue.wait(own)
    told = blue.ok("PruneJobs", max_count=0, dry_run=True)
    assert own in told.job_ids
    assert theirs not in told.job_ids
    pruned = blue.ok("PruneJobs", max_count=0)
    assert pruned.jobs == told.jobs
    assert blue.call("QueryJob", jobID=own).name == "NOT_FOUND"
    assert red.ok("QueryJob", jobID=theirs).done


def test_somebody_elses_id_is_taken_whatever_the_spec(clients: dict[str, Peer]) -> None:
    """The same words, whether or not the spec is the same, as for one's own id with another spec."""
    red, blue = clients["red"], clients["blue"]
    red.ok("StartJob", command="sleep", args=["999"], job_id="taken")
    other = blue.call("StartJob", command="true", job_id="taken")
    same = blue.call("StartJob", command="sleep", args=["999"], job_id="taken")
    blue.ok("StartJob", command="true", job_id="blues")
    own = blue.call("StartJob", command="false", job_id="blues")
    assert other == same == own
    assert own.name == "ALREADY_EXISTS"
    assert clients["operator"].call("StartJob", command="sleep", args=["999"], job_id="taken") == own
    # To an admin too, who may know whose it is.
    admins = clients["admin"].call("StartJob", command="sleep", args=["999"], job_id="taken")
    assert (admins.name, admins.details) == (
        "ALREADY_EXISTS",
        "job_id: belongs to a job of dns:red: choose another id",
    )
    clients["admin"].ok("StartJob", command="true", job_id="admins")
    assert clients["admin"].call("StartJob", command="false", job_id="admins") == own
    assert red.ok("StartJob", command="sleep", args=["999"], job_id="taken").existed
    red.ok("StopJob", jobID="taken", wait=True)
    assert blue.call("StartJob", command="sleep", args=["999"], job_id="taken") == own
    # A job that became another one's: nothing of the former owner's rights is left.
    red.ok("DeleteJob", jobID="taken")
    blue.ok("StartJob", command="sleep", args=["999"], job_id="taken")
    assert red.call("StopJob", jobID="taken").name == "NOT_FOUND"
    blue.ok("StopJob", jobID="taken", wait=True)


def test_a_submitter_counts_its_own_jobs(clients: dict[str, Peer]) -> None:
    job_id = clients["red"].start(*programs.SLEEP)
    assert clients["red"].ok("GetWorker").running >= 1
    assert clients["blue"].ok("GetWorker").running == 0
    assert clients["viewer"].ok("GetWorker").running >= 1
    clients["red"].ok("StopJob", jobID=job_id, wait=True)


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


# The policy, end to end


def test_the_policy_of_a_role(tmp_path: Path, peers: Peers) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "ok.sh").write_text("echo inside $1\n")
    (tmp_path / "evil.sh").write_text("echo outside\n")
    rules = f"{{ allow_commands = ['/bin/sh'], script_roots = ['{root}'], max = {{ timeout_s = 60 }} }}"
    with (
        Worker(tmp_path, POLICY_SUBMITTER=rules, **tls_keys(peers.certs)) as worker,
        peers.connect(worker.address, "red") as red,
        peers.connect(worker.address, "operator") as operator,
    ):
        job_id = red.ok("StartJob", command="sh", path=str(root / "ok.sh"), args=["x"]).jobID
        job = red.wait(job_id)
        # Who asks for no timeout has the most there may be.
        assert (job.outcome, job.spec.timeout.seconds) == (1, 60)
        assert worker.output(job_id) == b"inside x\n"
        line = last_audit(worker, job_id=job_id)
        assert line["rule"] == f'policy.submitter.allow_commands: "/bin/sh", policy.submitter.script_roots: "{root}"'
        for fields, rule in {
            ("sh", str(tmp_path / "evil.sh"), None): "policy.submitter.script_roots",
            ("sh", f"{root}/../evil.sh", None): "policy.submitter.script_roots",
            ("sh", "-c", None): "policy.submitter.script_roots",
            ("bash", str(root / "ok.sh"), None): "policy.submitter.allow_commands",
            ("sh", str(root / "ok.sh"), 0): "policy.submitter.max.timeout_s: 60",
            ("sh", str(root / "ok.sh"), 61): "policy.submitter.max.timeout_s: 60",
        }.items():
            command, path, timeout_s = fields
            timeout: dict[str, Any] = {} if timeout_s is None else {"timeout": {"seconds": timeout_s}}
            answer = red.call("StartJob", command=command, path=path, **timeout)
            assert answer.name == "PERMISSION_DENIED"
            assert answer.details.endswith(f"({rule})"), answer
            denied = last_audit(worker, decision="denied", identity="dns:red")
            assert (denied["rule"], len(denied["job_id"])) == (rule, 36)
        # The rules are for submitters.
        assert operator.wait(operator.start("sh", str(tmp_path / "evil.sh"))).outcome == 1
        missing = red.call("StartJob", command="sh", path=str(root / "gone.sh"))
        assert missing.name == "FAILED_PRECONDITION"
        assert missing.details == f"path: {root / 'gone.sh'} no such file or directory"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to run jobs as another user")
def test_nobody_below_admin_becomes_another_user_or_leaves_the_sandbox(tmp_path: Path, peers: Peers) -> None:
    keys = {**tls_keys(peers.certs), "JOBS_USER": "nobody", "JOBS_CWD": "/", "SANDBOX_NO_NETWORK": "true"}
    escapes: list[tuple[dict[str, Any], str, str]] = [
        ({"identity": {"user": "root"}}, 'jobs.user: "nobody"', "identity.user"),
        ({"identity": {"group": "root"}}, 'jobs.user: "nobody"', "identity.group"),
        ({"identity": {"groups": {"names": ["root"]}}}, 'jobs.user: "nobody"', "identity.groups"),
        ({"identity": {"no_new_privs": False}}, "jobs.no_new_privs: true", "identity.no_new_privs"),
        ({"sandbox": {"no_network": False}}, "sandbox.no_network: true", "sandbox.no_network"),
    ]
    with Worker(tmp_path, **keys) as worker, ExitStack() as stack:
        red, operator, admin = (
            stack.enter_context(peers.connect(worker.address, name)) for name in ("red", "operator", "admin")
        )
        for fields, rule, field in escapes:
            for name, peer in {"red": red, "operator": operator}.items():
                answer = peer.call("StartJob", command="id", **fields)
                assert answer.name == "PERMISSION_DENIED", fields
                assert answer.details.startswith(f"{field}: "), answer
                assert answer.details.endswith(f"({rule})"), answer
                assert last_audit(worker, decision="denied", identity=f"dns:{name}")["rule"] == rule
        for peer, fields, user in ((red, {}, "nobody"), (admin, {"identity": {"user": "root"}}, "root")):
            job_id = peer.start("id", "-un", **fields)
            assert peer.wait(job_id).outcome == 1
            assert worker.output(job_id) == f"{user}\n".encode()


def test_a_job_runs_in_the_directory_that_was_judged(tmp_path: Path, peers: Peers) -> None:
    root, link = tmp_path / "root", tmp_path / "link"
    root.mkdir()
    link.symlink_to(root)
    keys = {**tls_keys(peers.certs), "JOBS_SLOTS": "1", "POLICY_SUBMITTER": f"{{ allow_cwd = ['{root}'] }}"}
    with (
        Worker(tmp_path, **keys) as worker,
        peers.connect(worker.address, "red") as red,
        peers.connect(worker.address, "operator") as operator,
    ):
        answer = red.call("StartJob", command="pwd")  # where the worker was started
        assert (answer.name, answer.details) == (
            "PERMISSION_DENIED",
            f"cwd: {tmp_path} is not among the directories allowed, nor below one (policy.submitter.allow_cwd)",
        )
        first = operator.start(*programs.SLEEP)
        queued = red.start("pwd", cwd=str(link))
        link.unlink()
        link.symlink_to("/")
        operator.ok("StopJob", jobID=first, wait=True)
        assert red.wait(queued).spec.cwd == str(root)
        assert worker.output(queued) == f"{root}\n".encode()


def test_a_stop_gives_no_longer_grace_than_the_policy(tmp_path: Path, peers: Peers) -> None:
    keys = {**tls_keys(peers.certs), "POLICY_SUBMITTER": "{ max = { stop_grace_s = 2 } }"}
    with (
        Worker(tmp_path, **keys) as worker,
        peers.connect(worker.address, "red") as red,
        peers.connect(worker.address, "operator") as operator,
    ):
        job_id = red.start(*programs.SLEEP)
        assert red.ok("QueryJob", jobID=job_id).job.spec.stop_grace.seconds == 2
        answer = red.call("StopJob", jobID=job_id, grace={"seconds": 3})
        rule = "policy.submitter.max.stop_grace_s: 2"
        assert (answer.name, answer.details) == ("PERMISSION_DENIED", f"grace: must be at most 2 s, not 3 ({rule})")
        assert [
            (line["decision"], line["rule"]) for line in worker.log_events("audit") if line["rpc"] == "StopJob"
        ] == [("denied", rule)]
        assert red.ok("QueryJob", jobID=job_id).job.state == 3
        operator.ok("StopJob", jobID=job_id, grace={"seconds": 3}, wait=True)


@pytest.fixture
def stalled(tmp_path: Path) -> Iterator[Path]:
    """Where a file system is mounted that hangs when a file on it is opened for reading."""
    with stalled_fs.mounted_or_skip(tmp_path) as mount_point:
        yield mount_point


def test_a_file_system_that_hangs_holds_up_only_who_uses_it(tmp_path: Path, peers: Peers, stalled: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "ok.sh").write_text("#!/bin/sh\n")
    (root / "ok.sh").chmod(0o755)
    keys = {
        **tls_keys(peers.certs),
        "POLICY_SUBMITTER": f"{{ script_roots = ['{root}', '{stalled}'] }}",
        "POLICY_OPERATOR": f"{{ allow_commands = ['/bin/true'], script_roots = ['{stalled}'] }}",
    }
    with Worker(tmp_path, **keys) as worker, ExitStack() as stack:
        red, blue, operator = (
            stack.enter_context(peers.connect(worker.address, name)) for name in ("red", "blue", "operator")
        )
        pool = stack.enter_context(ThreadPoolExecutor(40))
        hanging = [pool.submit(red.call, "StartJob", command=str(stalled / "program")) for _ in range(40)]
        for _ in range(20):
            blue.ok("StartJob", command=str(root / "ok.sh"))
        # What its path forbids is not opened: no need to wait for that.
        denied = operator.call("StartJob", command=str(stalled / "program"))
        assert (denied.name, "policy.operator.allow_commands" in denied.details) == ("PERMISSION_DENIED", True)
        answers = [call.result() for call in hanging]
        assert {answer.name for answer in answers} == {"UNAVAILABLE"}
        own = [answer for answer in answers if f"has not answered for 10 s about {stalled}/program" in answer.details]
        assert len(own) == 4
        assert all("earlier starts of yours" in answer.details for answer in answers if answer not in own)
        blue.ok("StartJob", command=str(root / "ok.sh"))


def test_a_script_that_is_swapped_while_its_job_waits_is_not_run(tmp_path: Path, peers: Peers) -> None:
    root = tmp_path / "root"
    root.mkdir()
    script = root / "x.sh"
    script.write_text("echo inside\n")
    keys = {**tls_keys(peers.certs), "JOBS_SLOTS": "1", "POLICY_SUBMITTER": f"{{ script_roots = ['{root}'] }}"}
    with (
        Worker(tmp_path, **keys) as worker,
        peers.connect(worker.address, "red") as red,
        peers.connect(worker.address, "operator") as operator,
    ):
        first = operator.start(*programs.SLEEP)
        queued = red.ok("StartJob", command="sh", path=str(script)).jobID
        (tmp_path / "evil.sh").write_text("echo outside\n")
        (tmp_path / "evil.sh").rename(script)
        operator.ok("StopJob", jobID=first, wait=True)
        job = red.wait(queued)
        assert job.outcome == 7
        assert "was changed or replaced after the worker's policy allowed it" in job.error_text
