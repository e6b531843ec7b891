"""Secrets show to nobody, over the wire and in the logs."""

from __future__ import annotations

from typing import Any

from tests.support.peers import Peer
from tests.support.secured import last_audit
from tests.support.workers import Worker
from worker_svc.masking import MASK

SECRET = "hunter2-topsecret"


def test_secrets_show_to_nobody_and_the_environment_to_owner_and_admin(
    worker: Worker, clients: dict[str, Peer]
) -> None:
    env = {"PLAIN": "value-of-plain", "DB_PASSWORD": SECRET}
    argv = ("sh", "-c", "echo $DB_PASSWORD $PLAIN", "sh", f"--token={SECRET}")
    job_id = clients["red"].start(*argv, env=env, labels={"api_key": SECRET, "test": "secrets"})
    for name, sees in {"red": True, "admin": True, "operator": False, "viewer": False}.items():
        client = clients[name]
        listed = next(job for job in client.ok("ListJobs", labels={"test": "secrets"}).jobs)
        for job in (client.wait(job_id), client.ok("QueryJob", jobID=job_id).job, listed):
            expected = {"PLAIN": "value-of-plain" if sees else MASK, "DB_PASSWORD": MASK}
            assert (dict(job.spec.env), dict(job.spec.labels)) == (expected, {"api_key": MASK, "test": "secrets"})
            assert SECRET not in str(job)
    # The job itself had them.
    assert worker.output(job_id) == f"{SECRET} value-of-plain\n".encode()
    failed = clients["red"].call("StartJob", command=f"/no/such/TOKEN={SECRET}")
    assert failed.name == "FAILED_PRECONDITION"
    assert SECRET not in failed.details
    for file in (worker.log_path, worker.path / "supervisor.log"):
        assert SECRET not in file.read_text()


def test_no_way_to_write_a_secret_shows_it(worker: Worker, clients: dict[str, Peer]) -> None:
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
        assert worker.output(job_id) == (" ".join(filter(None, words)) + "\n").encode()
        assert red.ok("StartJob", command="echo", job_id=job_id, labels={"test": "ways"}, **fields).existed
        if SECRET in fields["path"]:  # what shows alike is not the same
            other = fields | {"path": fields["path"].replace(SECRET, "other")}
            again = red.call("StartJob", command="echo", job_id=job_id, labels={"test": "ways"}, **other)
            assert again.name == "ALREADY_EXISTS"
        assert SECRET not in str(viewer.ok("QueryJob", jobID=job_id))
    listed = viewer.ok("ListJobs", labels={"test": "ways"}).jobs
    assert len(listed) == len(ways)
    assert SECRET not in str(listed)
    failed = red.call("StartJob", command=f"/no/such/--password={SECRET},{SECRET}")
    assert failed.name == "FAILED_PRECONDITION"
    assert SECRET not in failed.details
    for file in (worker.log_path, worker.path / "supervisor.log"):
        assert SECRET not in file.read_text()


def test_nobody_finds_out_a_secret_by_guessing(worker: Worker, clients: dict[str, Peer]) -> None:
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
        line = last_audit(worker, identity=f"dns:{name}", rpc="ListJobs")
        assert (line["decision"], line["rule"]) == ("denied", "access.secret_keys")
    # Owners and admins may: the first know it, the second can read the store.
    assert found("red", token=SECRET) == found("admin", opts=labels["opts"]) == [job_id]
    assert found("blue", token=SECRET) == []
