"""The policy, end to end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support import programs, stalled_fs
from tests.support.peers import Peers
from tests.support.secured import last_audit, tls_keys
from tests.support.workers import Worker

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
def stalled_folder(tmp_path: Path) -> Iterator[Path]:
    """Where a file system is mounted that hangs when a file on it is opened for reading."""
    with stalled_fs.mounted_or_skip(tmp_path) as mount_point:
        yield mount_point


def test_a_file_system_that_hangs_holds_up_only_who_uses_it(tmp_path: Path, peers: Peers, stalled_folder: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "ok.sh").write_text("#!/bin/sh\n")
    (root / "ok.sh").chmod(0o755)
    keys = {
        **tls_keys(peers.certs),
        "POLICY_SUBMITTER": f"{{ script_roots = ['{root}', '{stalled_folder}'] }}",
        "POLICY_OPERATOR": f"{{ allow_commands = ['/bin/true'], script_roots = ['{stalled_folder}'] }}",
    }
    with Worker(tmp_path, **keys) as worker, ExitStack() as stack:
        red, blue, operator = (
            stack.enter_context(peers.connect(worker.address, name)) for name in ("red", "blue", "operator")
        )
        pool = stack.enter_context(ThreadPoolExecutor(40))
        hanging = [pool.submit(red.call, "StartJob", command=str(stalled_folder / "program")) for _ in range(40)]
        for _ in range(20):
            blue.ok("StartJob", command=str(root / "ok.sh"))
        # What its path forbids is not opened: no need to wait for that.
        denied = operator.call("StartJob", command=str(stalled_folder / "program"))
        assert (denied.name, "policy.operator.allow_commands" in denied.details) == ("PERMISSION_DENIED", True)
        answers = [call.result() for call in hanging]
        assert {answer.name for answer in answers} == {"UNAVAILABLE"}
        own = [
            answer
            for answer in answers
            if f"has not answered for 10 s about {stalled_folder}/program" in answer.details
        ]
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
