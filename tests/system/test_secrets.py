"""Secrets show to nobody, over the wire and in the logs."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.peers import Peer, Peers
from tests.support.secured import last_audit, tls_keys
from tests.support.workers import Worker
from worker_svc.masking import MASK

SECRET = "hunter2-topsecret"


def test_owner_and_admin_see_all_and_others_no_arguments(secured: Worker, clients: dict[str, Peer]) -> None:
    env = {"PLAIN": "value-of-plain", "DB_PASSWORD": SECRET}
    argv = ("sh", "-c", "echo $DB_PASSWORD $PLAIN", "sh", f"--token={SECRET}")
    labels = {"api_key": SECRET, "opts": f"--set=db.password={SECRET}", "test": "secrets"}
    job_id = clients["red"].start(*argv, env=env, labels=labels)
    shown_labels = {"api_key": MASK, "opts": f"--set=db.password={MASK}", "test": "secrets"}
    for name, sees in {"red": True, "admin": True, "operator": False, "viewer": False}.items():
        client = clients[name]
        listed = next(job for job in client.ok("ListJobs", labels={"test": "secrets"}).jobs)
        for job in (client.wait(job_id), client.ok("QueryJob", jobID=job_id).job, listed):
            told = (job.spec.command, list(job.spec.args), dict(job.spec.env), dict(job.spec.labels))
            hidden = ("sh", [MASK], dict.fromkeys(env, MASK), shown_labels)
            assert told == (("sh", list(argv[1:]), env, labels) if sees else hidden)
    # The job itself had them.
    assert secured.output(job_id) == f"{SECRET} value-of-plain\n".encode()
    line = last_audit(secured, rpc="StartJob", job_id=job_id)
    assert (line["command"], "arguments" in line) == ("sh", False)
    for file in (secured.log_path, secured.path / "supervisor.log"):
        assert SECRET not in file.read_text()


def test_no_way_to_write_a_secret_shows_it(secured: Worker, clients: dict[str, Peer]) -> None:
    """The path is an argument as well, and what the job and an idempotent start get is the real thing."""
    ways: list[dict[str, Any]] = [
        {"path": f"--password={SECRET}"},
        {"path": "--password", "args": [SECRET]},
        {"path": "", "args": ["--password", f"-{SECRET}"]},
        {"path": "-password", "args": [SECRET, "plain"]},
        {"path": "-H", "args": [f"Authorization: Bearer {SECRET}"]},
        {"path": "", "args": [f'{{"password":"{SECRET}"}}', f"https://u:{SECRET}@h/"]},
        {"path": f"--password={SECRET},{SECRET}"},
    ]
    red, viewer = clients["red"], clients["viewer"]
    for number, fields in enumerate(ways):
        job_id = f"secret-{number}"
        red.ok("StartJob", command="echo", job_id=job_id, labels={"test": "ways"}, **fields)
        red.wait(job_id)
        words = [fields["path"], *fields.get("args", [])]
        assert secured.output(job_id) == (" ".join(filter(None, words)) + "\n").encode()
        assert red.ok("StartJob", command="echo", job_id=job_id, labels={"test": "ways"}, **fields).existed
        if SECRET in fields["path"]:  # what shows alike is not the same
            other = fields | {"path": fields["path"].replace(SECRET, "other")}
            again = red.call("StartJob", command="echo", job_id=job_id, labels={"test": "ways"}, **other)
            assert again.name == "ALREADY_EXISTS"
        assert SECRET not in str(viewer.ok("QueryJob", jobID=job_id))
    listed = viewer.ok("ListJobs", labels={"test": "ways"}).jobs
    assert len(listed) == len(ways)
    assert SECRET not in str(listed)
    for file in (secured.log_path, secured.path / "supervisor.log"):
        assert SECRET not in file.read_text()


@pytest.mark.parametrize(
    "fields, details",
    [
        ({"command": f"mysql -p{SECRET} db"}, "command: 'mysql…' was not found"),
        ({"command": f"/no/such/TOKEN={SECRET}"}, "command: /no/such/TOKEN…: no such file"),
        ({"command": "true", "cwd": f"/no/such?{SECRET}"}, "cwd: /no/such…: no such file"),
        ({"command": "no-such-program", "env": {"PATH": f"/{SECRET}"}}, "command: 'no-such-program' was not found"),
        ({"command": "true", "cwd": f"'{SECRET}'"}, "cwd: must be an absolute path"),
        ({"command": "true", "env": {f"KEY={SECRET}": "x"}}, "env: key 'KEY…' must not contain"),
    ],
)
def test_no_reason_or_error_has_more_of_a_command_than_its_name(
    secured: Worker, clients: dict[str, Peer], fields: dict[str, Any], details: str
) -> None:
    latest = clients["admin"].ok("GetWorker").last_sequence
    watching = clients["viewer"].stream("WatchJobs", from_sequence=latest + 1)
    failed = clients["red"].call("StartJob", **fields)
    assert failed.details.startswith(details)
    assert SECRET not in failed.details
    if failed.name == "FAILED_PRECONDITION":  # a job that did not start, for all to see
        reason = next(moved.reason for moved in watching if moved.reason)
        assert reason == failed.details
        (listed,) = clients["viewer"].ok("ListJobs", page_size=1).jobs
        assert listed.error_text == reason
        assert SECRET not in str(listed)
    watching.cancel()
    for file in (secured.log_path, secured.path / "supervisor.log"):
        assert SECRET not in file.read_text()


def test_arguments_show_where_the_configuration_says_so(tmp_path: Path, peers: Peers) -> None:
    with Worker(tmp_path, **tls_keys(peers.certs), ACCESS_SHOW_ARGUMENTS="true") as worker, ExitStack() as stack:
        red, viewer = (stack.enter_context(peers.connect(worker.address, name)) for name in ("red", "viewer"))
        job_id = red.start("echo", "plain", f"--token={SECRET}", env={"PLAIN": "v", "TOKEN": SECRET})
        spec = viewer.ok("QueryJob", jobID=job_id).job.spec
        shown = ["plain", f"--token={MASK}"]
        assert (list(spec.args), dict(spec.env)) == (shown, {"PLAIN": "v", "TOKEN": MASK})
        line = last_audit(worker, rpc="StartJob", job_id=job_id)
        assert (line["command"], line["arguments"]) == ("echo", shown)


def test_nobody_finds_out_a_secret_by_guessing(secured: Worker, clients: dict[str, Peer]) -> None:
    labels = {"token": SECRET, "opts": f"--password={SECRET}", "test": "guess"}
    job_id = clients["red"].start("true", labels=labels)

    def found(name: str, **wanted: str) -> list[str]:
        return [job.job_id for job in clients[name].ok("ListJobs", labels=wanted).jobs]

    for name in ("viewer", "operator"):
        for key in ("token", "opts"):
            answers = {clients[name].call("ListJobs", labels={key: text}) for text in (labels[key], "--password=x")}
            assert {(answer.name, answer.details) for answer in answers} == {
                (
                    "PERMISSION_DENIED",
                    f"labels: only an admin may look for '{key}', which is secret (access.secret_keys)",
                )
            }
        assert found(name, test="guess") == [job_id]
        line = last_audit(secured, identity=f"dns:{name}", rpc="ListJobs")
        assert (line["decision"], line["rule"]) == ("denied", "access.secret_keys")
    # Owners and admins may: the first know it, the second can read the store.
    assert found("red", token=SECRET) == found("admin", opts=labels["opts"]) == [job_id]
    assert found("blue", token=SECRET) == []
