"""Between messages and our own types: no field can be forgotten."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.support.examples import DEFAULTS, FULL, fields_of, sent, wire
from worker_svc.job import (
    Identity,
    JobRecord,
    JobSpec,
    JobState,
    LeaderExit,
    Outcome,
    OutputPolicy,
    OutputVia,
    Sandbox,
    Transition,
)
from worker_svc.job.limits import BY_NAME
from worker_svc.pb import jobscheduler as pb
from worker_svc.wire import messages
from worker_svc.wire.messages import (
    OutputFiles,
    job_message,
    query_message,
    spec_message,
    start_from,
    transition_message,
)

SPEC = JobSpec(
    command="bash",
    path="script.sh",
    args=("-x", ""),
    env={"KEY": "value", "EMPTY": ""},
    cwd="/tmp",
    stdin_size_bytes=6,
    timeout_s=1.5,
    stop_signal=1,
    stop_grace_s=2.0,
    labels={"team": "red"},
    separate_stderr=True,
    output_max_bytes=4096,
    output_policy=OutputPolicy.STOP,
    limits={
        "rlimits": {"nofile": (10, 20), "core": (0, None)},
        "nice": -5,
        "cpu_affinity": (0, 3),
        "umask": 0o27,
        "oom_score_adj": 500,
        "memory_max_bytes": 2**30,
        "swap_max_bytes": 0,
        "cpu_max_cores": 1.5,
        "cpu_weight": 50,
        "pids_max": 100,
        "io_weight": 60,
        "memory_high_bytes": 2**29,
    },
    identity=Identity("nobody", "4", ("adm", "5"), False),
    sandbox=Sandbox(("/usr", "/lib"), ("/work",), True, True),
    leader_exit=LeaderExit.WAIT,
    secret_env=("A_SECRET", "TOKEN"),
    output_via=OutputVia.PIPE,
)

RECORD = JobRecord(
    ordinal=7,
    job_id="my-job",
    spec=SPEC,
    state=JobState.FINISHED,
    last_sequence=9,
    accepted_ns=1_700_000_000_000_001_000,
    fingerprint="f",
    outcome=Outcome.FAILED,
    exit_code=3,
    signal=15,
    reason="exit status 3",
    pid=1234,
    started_ns=1_700_000_001_000_000_000,
    finished_ns=1_700_000_002_000_000_000,
    wall_ns=1_000_000_000,
    cpu_ns=500_000_000,
    peak_memory_bytes=2**33,
    output_size_bytes=2**40,
    stderr_size_bytes=17,
    paused=1,
    stuck="pid 3",
    owner="dns:someone",
    started_monotonic_ns=5_000_000_000,
    output_loss="9 bytes were truncated",
    is_brief=True,
)

FILES = OutputFiles("/state/output/my-job.out", "/state/output/my-job.err", 2**40, 17)

MOVED = Transition(
    sequence=9,
    job_id="my-job",
    at_ns=1_700_000_002_000_000_000,
    from_state=JobState.STOPPING,
    to_state=JobState.FINISHED,
    pid=1234,
    outcome=Outcome.STOPPED,
    exit_code=3,
    signal=15,
    reason="stopped (exit status 3)",
    queued_ns=1,
    wall_ns=2,
    cpu_ns=3,
    owner="dns:someone",
)


def left_out(message: Any) -> set[str]:
    """The fields that are at their defaults."""
    plain = type(message)()
    return {name for name in fields_of(type(message)) if getattr(message, name) == getattr(plain, name)}


def test_the_examples_here_are_whole() -> None:
    assert set(FULL) == fields_of(pb.StartJobReq)
    for message in (pb.StartJobReq(**FULL), FULL["limits"], FULL["identity"], FULL["sandbox"]):
        assert not left_out(message)
    for example in (SPEC, RECORD, MOVED, SPEC.identity, SPEC.sandbox):
        for name in example._fields:
            if name != "checked":  # the policy's, which no message tells of
                assert getattr(example, name) != example._field_defaults.get(name, object()), name


def test_every_field_of_a_request_comes_into_the_spec() -> None:
    start = start_from(sent(pb.StartJobReq(**FULL)), DEFAULTS)
    assert start.spec == SPEC
    assert [type(value) for value in start.spec] == [type(value) for value in SPEC]
    assert start.stdin == b"in\0put"
    # What is asked for is what is told: by names of fields, save for standard input and the id.
    told = fields_of(pb.JobSpec) - {"stdin_size_bytes"}
    assert told == set(FULL) - {"stdin", "job_id"}


def test_what_is_left_out_is_the_workers_default() -> None:
    start = start_from(sent(pb.StartJobReq(command="true")), DEFAULTS)
    assert start == messages.Start(
        JobSpec("true", cwd="/default", timeout_s=60.0, stop_signal=2, stop_grace_s=5.0, output_max_bytes=1000,
                output_policy=OutputPolicy.NONE, output_via=OutputVia.PIPE),
        b"",
    )  # fmt: skip


def test_zero_is_not_left_out() -> None:
    message = pb.StartJobReq(command="true", timeout=timedelta(0), stop_grace=timedelta(0), output_max_bytes=0)
    spec = start_from(sent(message), DEFAULTS).spec
    assert (spec.timeout_s, spec.stop_grace_s, spec.output_max_bytes) == (0.0, 0.0, 0)


def test_every_field_of_a_spec_is_told() -> None:
    message = sent(spec_message(SPEC))
    assert not left_out(message)
    assert message == pb.JobSpec(
        command="bash",
        path="script.sh",
        args=["-x", ""],
        env={"KEY": "value", "EMPTY": ""},
        cwd="/tmp",
        stdin_size_bytes=6,
        timeout=timedelta(seconds=1.5),
        stop_signal="SIGHUP",
        stop_grace=timedelta(seconds=2),
        labels={"team": "red"},
        separate_stderr=True,
        output_max_bytes=4096,
        output_policy=wire.OutputPolicy.STOP,
        limits=pb.Limits(
            memory_max_bytes=2**30,
            swap_max_bytes=0,
            cpu_max_cores=1.5,
            cpu_weight=50,
            pids_max=100,
            io_weight=60,
            memory_high_bytes=2**29,
            rlimits=[pb.Rlimit(name="nofile", soft=10, hard=20), pb.Rlimit(name="core", soft=0)],
            nice=-5,
            cpu_affinity=[0, 3],
            umask=0o27,
            oom_score_adj=500,
        ),
        identity=FULL["identity"],
        sandbox=FULL["sandbox"],
        leader_exit=wire.LeaderExit.WAIT,
        secret_env=["A_SECRET", "TOKEN"],
        output_via=wire.OutputVia.PIPE,
    )
    # `checked` is the policy's.
    assert len(JobSpec._fields) == len(fields_of(pb.JobSpec)) + 1
    assert set(SPEC.limits) == set(BY_NAME)
    for part in (message.limits, message.identity, message.sandbox):
        assert not left_out(part)
    assert fields_of(pb.Limits) == set(BY_NAME)
    assert fields_of(pb.Identity) == set(Identity._fields)
    assert fields_of(pb.Sandbox) == set(Sandbox._fields)


def test_what_is_not_limited_is_not_told() -> None:
    message = sent(spec_message(JobSpec("true")))
    assert (message.limits, message.identity, message.sandbox) == (None, None, None)
    assert message.leader_exit == pb.LeaderExit.KILL


# What a client is told of the record under another name, and what only we need.
RENAMED = {"outcome": "outcome", "reason": "error_text", "cpu_ns": "cpu_time", "wall_ns": "wall_time"}

RENAMED |= {"accepted_ns": "accepted_at", "started_ns": "started_at", "finished_ns": "finished_at"}

RENAMED |= {"is_brief": "left_out"}

OURS = {"ordinal", "fingerprint", "started_monotonic_ns"}


def test_every_field_of_a_record_is_told() -> None:
    message = sent(job_message(RECORD, FILES, 0))
    assert not left_out(message)
    told = {RENAMED.get(name, name) for name in JobRecord._fields if name not in OURS}
    assert told | {"output_file", "stderr_file"} == fields_of(pb.Job)
    assert message == pb.Job(
        job_id="my-job",
        spec=spec_message(SPEC),
        state=wire.JobState.FINISHED,
        outcome=wire.Outcome.FAILED,
        exit_code=3,
        signal="SIGTERM",
        error_text="exit status 3",
        pid=1234,
        accepted_at=datetime(2023, 11, 14, 22, 13, 20, 1, UTC),
        started_at=datetime(2023, 11, 14, 22, 13, 21, tzinfo=UTC),
        finished_at=datetime(2023, 11, 14, 22, 13, 22, tzinfo=UTC),
        wall_time=timedelta(seconds=1),
        cpu_time=timedelta(seconds=0.5),
        peak_memory_bytes=2**33,
        output_file="/state/output/my-job.out",
        stderr_file="/state/output/my-job.err",
        output_size_bytes=2**40,
        stderr_size_bytes=17,
        last_sequence=9,
        paused=True,
        stuck="pid 3",
        owner="dns:someone",
        output_loss="9 bytes were truncated",
        left_out=["spec.args", "spec.env"],
    )


def test_every_field_of_a_transition_is_told() -> None:
    message = sent(transition_message(MOVED))
    assert not left_out(message)
    # The durations are in the log and, at the end, in the job; as is the owner.
    told = {{"at_ns": "at"}.get(name, name) for name in Transition._fields}
    assert told - {"queued_ns", "wall_ns", "cpu_ns", "owner"} == fields_of(pb.JobTransition)
    assert message == pb.JobTransition(
        sequence=9,
        job_id="my-job",
        at=datetime(2023, 11, 14, 22, 13, 22, tzinfo=UTC),
        from_state=wire.JobState.STOPPING,
        to_state=wire.JobState.FINISHED,
        pid=1234,
        outcome=wire.Outcome.STOPPED,
        exit_code=3,
        signal="SIGTERM",
        reason="stopped (exit status 3)",
    )


@pytest.mark.parametrize("ours", [JobState, Outcome, OutputPolicy, OutputVia, LeaderExit])
def test_enums_have_the_numbers_of_the_wire(ours: Any) -> None:
    theirs = getattr(pb, ours.__name__)
    names = {"NEW": "UNSPECIFIED", "NONE": "UNSPECIFIED"} if ours is not OutputPolicy else {}
    expected = {names.get(member.name, member.name): int(member) for member in ours}
    expected.setdefault("UNSPECIFIED", 0)
    assert {name: int(member) for name, member in theirs.__members__.items()} == expected


def test_exit_status_zero_is_told_apart_from_none() -> None:
    ended = RECORD._replace(outcome=Outcome.SUCCEEDED, exit_code=0, signal=None, reason="")
    message = sent(query_message(ended, FILES, 0))
    assert (message.done, message.error, message.error_text, message.job.exit_code) == (True, False, "", 0)
    running = RECORD._replace(state=JobState.RUNNING, outcome=Outcome.NONE, exit_code=None, signal=None, wall_ns=None)
    message = sent(query_message(running, FILES, 7_000_000_000))
    assert (message.done, message.error, message.error_text, message.job.exit_code) == (False, False, "", None)
    assert message.job.wall_time == timedelta(seconds=2)


def test_a_record_of_before_the_last_boot_makes_no_negative_time() -> None:
    running = RECORD._replace(state=JobState.RUNNING, wall_ns=None)
    assert job_message(running, FILES, 0).wall_time == timedelta(0)


def test_every_outcome_but_success_is_an_error() -> None:
    for outcome in set(Outcome) - {Outcome.NONE}:
        message = query_message(RECORD._replace(outcome=outcome, reason="why"), FILES, 0)
        assert message.done
        assert message.error is (outcome is not Outcome.SUCCEEDED)
        assert bool(message.error_text) is message.error
