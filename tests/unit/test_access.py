"""Who a peer is, which role that gives it, and what the role may do: the table, walked."""

from __future__ import annotations

import dataclasses
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from worker_svc.access.guard import GuardedService, method_name
from worker_svc.access.roles import (
    ANONYMOUS,
    NAME_MAX_CHARS,
    NAMELESS,
    RPCS,
    UNKNOWN_RPC,
    Doorkeeper,
    Role,
    Scope,
    Verdict,
    names_in,
)
from worker_svc.config import AccessConfig
from worker_svc.job import JobSpec, JobState, Transition
from worker_svc.pb import jobscheduler as pb
from worker_svc.record.query import JobQuery
from worker_svc.record.reader import StoreReader
from worker_svc.record.schema import IS_OWNED
from worker_svc.record.writer import JobStore

nothing: Any = None
HANDLERS = {path.rpartition("/")[2]: handler for path, handler in pb.WorkerBase().__mapping__().items()}

# The table as it is meant to be, once more: viewer, submitter, operator, admin; "own": with the caller's own jobs only.
EXPECTED = {
    "StartJob": ("no", "own", "own", "own"),
    "StopJob": ("no", "own", "yes", "yes"),
    "QueryJob": ("yes", "own", "yes", "yes"),
    "ListJobs": ("yes", "own", "yes", "yes"),
    "WatchJobs": ("yes", "own", "yes", "yes"),
    "WaitJob": ("yes", "own", "yes", "yes"),
    "SignalJob": ("no", "own", "yes", "yes"),
    "PauseJob": ("no", "own", "yes", "yes"),
    "ResumeJob": ("no", "own", "yes", "yes"),
    "DeleteJob": ("no", "own", "yes", "yes"),
    "PruneJobs": ("no", "own", "yes", "yes"),
    "StreamJob": ("yes", "own", "yes", "yes"),
    "ShutdownWorker": ("no", "no", "no", "yes"),
    "GetWorker": ("yes", "own", "yes", "yes"),
    "RunJobs": ("no", "own", "own", "own"),
    "StartJobs": ("no", "own", "own", "own"),
    "QueryJobs": ("yes", "own", "yes", "yes"),
    "StopJobs": ("no", "own", "yes", "yes"),
}
WORDS = {Verdict.ALLOWED: "yes", Verdict.OWN: "own", Verdict.DENIED: "no"}


def test_every_rpc_of_the_service_has_a_row() -> None:
    assert set(RPCS) == set(HANDLERS) == set(EXPECTED), "a new RPC needs a row in access.RPCS, and one here"


@pytest.mark.parametrize("name", sorted(RPCS))
def test_the_table(name: str) -> None:
    assert tuple(WORDS[RPCS[name].verdict(role)] for role in Role) == EXPECTED[name]
    assert RPCS[name].verdict(None) is Verdict.DENIED


@pytest.mark.parametrize("name", sorted(RPCS))
def test_the_guard_can_tell_whose_job_it_is(name: str) -> None:
    """A request that names a job is checked by the guard; one that is about many is for the handler to narrow down."""
    request = HANDLERS[name].request_type
    assert request is not None
    names_job = "job_id" in {field.name for field in dataclasses.fields(request)}
    assert names_job == (RPCS[name].scope in (Scope.JOB, Scope.START))
    if RPCS[name].scope is Scope.NONE:
        assert Verdict.OWN not in RPCS[name][:4]


@pytest.mark.parametrize("name", sorted(RPCS))
def test_looking_changes_nothing_and_all_else_is_audited(name: str) -> None:
    looks = {"QueryJob", "ListJobs", "WatchJobs", "WaitJob", "StreamJob", "GetWorker", "QueryJobs"}
    assert RPCS[name].mutates == (name not in looks)
    # Whoever only looks may not change anything.
    assert RPCS[name].verdict(Role.VIEWER) is (Verdict.DENIED if RPCS[name].mutates else Verdict.ALLOWED)


def test_an_rpc_without_a_row_is_for_nobody() -> None:
    assert {UNKNOWN_RPC.verdict(role) for role in Role} == {Verdict.DENIED}


def test_every_handler_goes_through_the_guard() -> None:
    service = GuardedService(nothing)
    for path, handler in service.__mapping__().items():
        assert "GuardedService._guarded" in handler.func.__qualname__, path
        assert hasattr(service, method_name(path.rpartition("/")[2]))


# Identities


@pytest.mark.parametrize(
    "certificate, names",
    [
        ({"subjectAltName": (("URI", "spiffe://x/a"),)}, ["uri:spiffe://x/a"]),
        (
            {"subjectAltName": (("email", "a@b"), ("DNS", "Host.Example"), ("URI", "urn:x"))},
            ["uri:urn:x", "dns:host.example", "email:a@b"],
        ),
        ({"subject": ((("commonName", "someone"),),)}, ["cn:someone"]),
        # The common name counts only where there is no other.
        ({"subject": ((("commonName", "admin"),),), "subjectAltName": (("DNS", "someone"),)}, ["dns:someone"]),
        # An address names no one, and nobody becomes a user of this machine by a certificate.
        ({"subjectAltName": (("IP Address", "10.0.0.1"),)}, []),
        ({"subjectAltName": (("URI", "uid:0"), ("DNS", "anonymous"))}, ["uri:uid:0", "dns:anonymous"]),
        ({"subject": ((("commonName", "uid:0"),),)}, ["cn:uid:0"]),
        ({"subjectAltName": (("DNS", "x" * NAME_MAX_CHARS),)}, []),
        ({"subjectAltName": (("DNS", "a\nb"), ("DNS", "c\0d"))}, []),
        ({"subject": ((("organizationName", "x"),),)}, []),
    ],
)
def test_names_in_a_certificate(certificate: dict[str, Any], names: list[str]) -> None:
    assert names_in(certificate) == names


def doorkeeper(**lists: Any) -> Doorkeeper:
    return Doorkeeper(AccessConfig(**lists), own_uid=1000, is_job=lambda peer: False)


@pytest.mark.parametrize(
    "names, role",
    [
        (["dns:a.ops.example"], Role.OPERATOR),
        (["dns:ops.example"], None),
        (["uri:spiffe://prod/ci/7"], Role.SUBMITTER),
        (["dns:someone"], None),
        (["dns:someone", "email:eve@example"], Role.VIEWER),
        # The one of several roles that may do most.
        (["dns:a.ops.example", "email:eve@example"], Role.OPERATOR),
        (["uid:1000"], Role.ADMIN),
        (["uid:0"], Role.ADMIN),
        (["uid:1001"], None),
        (["cn:uid:0"], None),
        ([], None),
    ],
)
def test_roles_by_patterns(names: list[str], role: Role | None) -> None:
    keeper = doorkeeper(
        operators=("dns:*.OPS.example",), submitters=("uri:spiffe://prod/ci/?",), viewers=("email:*@example",)
    )
    assert keeper.role_of(names) is role


def test_brackets_in_patterns_are_no_wildcards() -> None:
    keeper = doorkeeper(submitters=("uri:https://[::1]/*",))
    assert keeper.role_of(["uri:https://[::1]/ci"]) is Role.SUBMITTER
    assert keeper.role_of(["uri:https://:/ci"]) is keeper.role_of(["uri:https://1/ci"]) is None


class Connection:
    """What a transport tells of a connection."""

    def __init__(self, **facts: Any) -> None:
        self._facts = facts

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._facts.get(name, default)


STRANGER = {"subjectAltName": (("DNS", "eve"),)}
CERTIFICATE = {"subjectAltName": (("DNS", "ci"),)}


@pytest.mark.parametrize(
    "facts, anonymous, expected",
    [
        ({"peername": ("127.0.0.1", 5)}, "admin", (ANONYMOUS, Role.ADMIN, "127.0.0.1:5")),
        ({"peername": ("127.0.0.1", 5)}, "none", (ANONYMOUS, None, "127.0.0.1:5")),
        ({"peername": ("::1", 5, 0, 0)}, "viewer", (ANONYMOUS, Role.VIEWER, "[::1]:5")),
        ({"peername": ("::1", 5), "peercert": CERTIFICATE}, "admin", ("dns:ci", Role.SUBMITTER, "[::1]:5")),
        # TLS without a client's certificate
        ({"peername": ("10.0.0.1", 5), "peercert": {}}, "none", (ANONYMOUS, None, "10.0.0.1:5")),
        # A certificate that names nobody is not anonymous: it never has a role.
        ({"peername": ("::1", 5), "peercert": {"subject": ()}}, "admin", (NAMELESS, None, "[::1]:5")),
        ({"peername": ("::1", 5), "peercert": STRANGER}, "admin", ("dns:eve", None, "[::1]:5")),
    ],
)  # fmt: skip
def test_callers(facts: dict[str, Any], anonymous: Any, expected: tuple[Any, ...]) -> None:
    connection: Any = Connection(**facts)
    keeper = doorkeeper(anonymous=anonymous, submitters=("dns:ci",))
    assert keeper.caller(connection) == expected
    assert keeper.caller(connection) is keeper.caller(connection)
    named = expected[0] not in (ANONYMOUS, NAMELESS)
    assert keeper.rate_key(connection, "peer") == (expected[0] if named else "peer")


def test_a_user_of_the_unix_socket() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        connection: Any = Connection(socket=ours, peername="")
        caller = Doorkeeper(AccessConfig(), is_job=lambda peer: peer is not ours).caller(connection)
        job = Doorkeeper(AccessConfig(), is_job=lambda peer: peer is ours).caller(connection)
        trusted = AccessConfig(submitters=("job:*",))
        submitter = Doorkeeper(trusted, is_job=lambda peer: peer is ours).caller(connection)
    assert caller == (f"uid:{os.geteuid()}", Role.ADMIN, f"pid:{os.getpid()}")
    assert job == (f"job:{os.geteuid()}", None, f"pid:{os.getpid()}")
    assert submitter.role is Role.SUBMITTER


# Whose a job is


def add(store: JobStore, job_id: str, owner: str, state: JobState = JobState.RUNNING) -> None:
    store.begin()
    ordinal = store.add_job(job_id, JobSpec("true"), "", 1, b"", owner)
    changes = {"finished_ns": ordinal, "stored_bytes": 10} if state is JobState.FINISHED else {}
    store.add_transition(ordinal, Transition(0, job_id, 5, JobState.NEW, state, owner=owner), changes)
    store.commit()


def test_owner_of_a_job(store: JobStore, tmp_path: Path) -> None:
    reader = StoreReader(str(tmp_path))
    assert reader.owner_of("a") is None
    add(store, "a", "dns:red")
    add(store, "b", "dns:blue")
    assert [reader.owner_of(job_id) for job_id in ("a", "b", "c")] == ["dns:red", "dns:blue", None]
    assert [reader.is_owned(job_id, "dns:red") for job_id in ("a", "b", "c", "")] == [True, False, False, False]
    assert not reader.is_owned("a", "")


@pytest.mark.parametrize("owner", ["dns:red", "dns:nobody-yet"])
def test_what_is_not_there_takes_as_long_as_what_is_not_ones_own(store: JobStore, tmp_path: Path, owner: str) -> None:
    """Counted in steps of SQLite's machine, which do not vary as times do; and no row is read, whatever its size."""
    for number in range(200):
        add(store, f"job-{number:03}", "dns:red" if number % 2 else "dns:blue")
    reader = StoreReader(str(tmp_path))
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    def steps_of(job_id: str) -> int:
        nonlocal steps
        steps = 0
        assert not reader.is_owned(job_id, owner)
        return steps

    reader._db.set_progress_handler(count, 1)
    there = {steps_of(f"job-{number:03}") for number in range(0, 200, 2)}
    missing = {steps_of(f"no-{number:03}") for number in range(200)} | {steps_of("zzz"), steps_of("a")}
    assert there == missing
    assert len(there) == 1
    plan = reader._db.execute(f"EXPLAIN QUERY PLAN {IS_OWNED}", ("", "")).fetchall()
    assert [row[3] for row in plan] == ["SEARCH jobs USING COVERING INDEX jobs_owner (owner=? AND job_id=?)"]


def test_listing_and_counting_of_one_owner_only(store: JobStore, tmp_path: Path) -> None:
    for number, owner in enumerate(["dns:red", "dns:blue"] * 3):
        add(store, f"run-{number}", owner)
        add(store, f"wait-{number}", owner, JobState.QUEUED)
        add(store, f"end-{number}", owner, JobState.FINISHED)
    reader = StoreReader(str(tmp_path))

    def found(query: JobQuery) -> list[str]:
        return [record.owner for record in reader.find(query, None, 100, 1000).records]

    assert found(JobQuery(owner="dns:red")) == ["dns:red"] * 9
    assert len(found(JobQuery())) == 18
    assert found(JobQuery(owner="")) == []
    assert (reader.live_of("dns:red"), reader.live_of("dns:green")) == ((3, 3), (0, 0))
    assert (reader.finished_totals("dns:red"), reader.finished_totals()) == ((3, 30), (6, 60))
    first, *rest = reader.oldest_finished(9, None, "dns:blue")
    assert [row.job_id for row in rest] == ["end-3", "end-5"]
    assert reader.oldest_finished(9, first, "dns:blue") == rest
