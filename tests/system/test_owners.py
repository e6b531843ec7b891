"""Whose job it is: a worker over mTLS."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support import programs
from tests.support.peers import Answer, Peer
from tests.support.workers import Worker
from worker_svc.access.roles import RPCS, Scope

NO_JOB = "no-such-job"


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
