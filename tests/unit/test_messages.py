"""Between messages and our own types: no field can be forgotten, and a fingerprint tells every request apart."""

from __future__ import annotations

import dataclasses
import resource
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker_svc.job import (
    Identity,
    InvalidArgument,
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
    Files,
    fingerprint_of,
    job_message,
    query_message,
    spec_message,
    start_from,
    transition_message,
)
from worker_svc.wire.messages.defaults import Defaults
from worker_svc.wire.messages.limits import LimitDefaults

# Type checkers take the members of betterproto's enums for plain integers.
wire: Any = pb

DEFAULTS = Defaults(
    cwd="/default",
    timeout_s=60.0,
    stop_signal=2,
    stop_grace_s=5.0,
    output_max_bytes=1000,
    output_max_bytes_limit=0,
    output_policy=OutputPolicy.NONE,
)
# Every field of the request, at no default.
FULL: dict[str, Any] = {
    "command": "bash",
    "path": "script.sh",
    "args": ["-x", ""],
    "env": {"KEY": "value", "EMPTY": ""},
    "cwd": "/tmp",
    "stdin": b"in\0put",
    "timeout": timedelta(seconds=1, microseconds=500_000),
    "stop_signal": "HUP",
    "stop_grace": timedelta(seconds=2),
    "labels": {"team": "red"},
    "separate_stderr": True,
    "job_id": "my-job",
    "output_max_bytes": 4096,
    "output_policy": pb.OutputPolicy.STOP,
    "limits": pb.Limits(
        memory_max_bytes=2**30,
        swap_max_bytes=0,
        cpu_max_cores=1.5,
        cpu_weight=50,
        pids_max=100,
        io_weight=60,
        rlimits=[pb.Rlimit(name="RLIMIT_NOFILE", soft=10, hard=20), pb.Rlimit(name="core", soft=0)],
        nice=-5,
        cpu_affinity=[3, 0, 3],
        umask=0o27,
        oom_score_adj=500,
    ),
    "identity": pb.Identity(user="nobody", group="4", groups=pb.Groups(names=["adm", "5"]), no_new_privs=False),
    "sandbox": pb.Sandbox(
        read_only_paths=["/usr", "/lib"], read_write_paths=["/work"], private_tmp=True, no_network=True
    ),
    "leader_exit": pb.LeaderExit.WAIT,
    "secret_env": {"TOKEN": "hunter2", "A_SECRET": ""},
    "output_via": pb.OutputVia.PIPE,
}
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
FILES = Files("/state/output/my-job.out", "/state/output/my-job.err", 2**40, 17)
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


def fields_of(message: type[Any]) -> set[str]:
    return {field.name for field in dataclasses.fields(message)}


def sent(message: Any) -> Any:
    """As it comes out at the other end of the wire."""
    return type(message)().parse(bytes(message))


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


# Of the record, what a client is told under another name, and what only we need.
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


# Another value than in FULL for each field; for those that can be unset, unset too.
OTHERS: list[tuple[str, Any]] = [
    ("command", "sh"),
    ("path", ""),
    ("args", ["-x"]),
    ("args", ["", "-x"]),
    ("env", {"KEY": "value"}),
    ("env", {"KEY": "", "EMPTY": "value"}),
    ("cwd", ""),
    ("stdin", b""),
    ("stdin", b"in\0pus"),
    ("timeout", None),
    ("timeout", timedelta(0)),
    ("stop_signal", ""),
    ("stop_grace", None),
    ("stop_grace", timedelta(seconds=2.000001)),
    ("labels", {}),
    ("labels", {"team": "blue"}),
    ("separate_stderr", False),
    ("output_max_bytes", None),
    ("output_max_bytes", 0),
    ("output_policy", pb.OutputPolicy.UNSPECIFIED),
    ("limits", None),
    ("identity", None),
    ("sandbox", None),
    ("leader_exit", pb.LeaderExit.UNSPECIFIED),
    ("leader_exit", pb.LeaderExit.KILL),
    ("secret_env", {}),
    ("secret_env", {"TOKEN": "hunter2"}),
    ("output_via", pb.OutputVia.UNSPECIFIED),
    ("output_via", pb.OutputVia.FILE),
]
# And of each field within them.
WITHIN: dict[str, list[tuple[str, Any]]] = {
    "limits": [
        *((name, None) for name in BY_NAME if name not in ("rlimits", "cpu_affinity")),
        *((name, 0) for name in BY_NAME if name not in ("rlimits", "cpu_affinity", "swap_max_bytes")),
        ("swap_max_bytes", 1),
        ("rlimits", []),
        ("rlimits", [pb.Rlimit(name="nofile", soft=10)]),
        ("rlimits", [pb.Rlimit(name="nofile", hard=10)]),
        ("rlimits", [pb.Rlimit(name="nofile", soft=10, hard=10)]),
        ("rlimits", [pb.Rlimit(name="core", soft=10)]),
        ("cpu_affinity", []),
        ("cpu_affinity", [1]),
    ],
    "identity": [
        ("user", ""),
        ("user", "root"),
        ("group", ""),
        ("group", "nobody"),
        ("groups", None),
        ("groups", pb.Groups()),
        ("groups", pb.Groups(names=["5", "adm"])),
        ("no_new_privs", None),
        ("no_new_privs", True),
    ],
    "sandbox": [
        ("read_only_paths", []),
        ("read_only_paths", ["/usr"]),
        ("read_write_paths", []),
        ("read_write_paths", ["/usr"]),
        ("private_tmp", None),
        ("private_tmp", False),
        ("no_network", None),
        ("no_network", False),
    ],
}
for _field, _changes in WITHIN.items():
    OTHERS += [(_field, dataclasses.replace(FULL[_field], **{name: value})) for name, value in _changes]


def fingerprint(**fields: Any) -> str:
    return fingerprint_of(sent(pb.StartJobReq(**{**FULL, **fields})))


def test_the_same_request_has_the_same_fingerprint() -> None:
    assert fingerprint() == fingerprint()
    turned = {"env": {"EMPTY": "", "KEY": "value"}}
    assert fingerprint(**turned) == fingerprint()


def test_every_field_is_in_the_fingerprint() -> None:
    assert {name for name, _ in OTHERS} == set(FULL) - {"job_id"}
    for field, changes in WITHIN.items():
        assert {name for name, _ in changes} == fields_of(type(FULL[field]))
    prints = [fingerprint(), *(fingerprint(**{name: value}) for name, value in OTHERS)]
    assert len(set(prints)) == len(prints)


def test_the_values_of_secrets_are_not_in_the_fingerprint() -> None:
    """It is on disk; and who asks again may have been given another token meanwhile."""
    assert fingerprint(secret_env=dict.fromkeys(FULL["secret_env"], "other")) == fingerprint()


def test_text_does_not_flow_from_one_field_into_the_next() -> None:
    moved = [{"command": "a", "path": "b", "args": ["c"]}, {"command": "ab", "path": "", "args": ["c"]}]
    moved += [{"command": "a", "path": "", "args": ["b", "c"]}, {"command": "a", "path": "b", "args": ["", "c"]}]
    assert len({fingerprint(**fields) for fields in moved}) == len(moved)


@pytest.mark.parametrize("job_id", ["../etc", "x" * 129])
def test_a_bad_id_is_named(job_id: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^job_id: "):
        fingerprint(job_id=job_id)


def test_no_fingerprint_without_an_id() -> None:
    assert fingerprint(job_id="") == ""


@pytest.mark.parametrize(
    "fields, field",
    [
        ({"command": ""}, "command"),
        ({"command": "a\0"}, "command"),
        ({"path": "\0"}, "path"),
        ({"args": ["ok", "a\0b"]}, "args[1]"),
        ({"env": {"A=B": "x"}}, "env"),
        ({"env": {"A": "\0"}}, "env"),
        ({"cwd": "here"}, "cwd"),
        ({"stdin": bytes(1024 * 1024 + 1)}, "stdin"),
        ({"timeout": timedelta(seconds=-1)}, "timeout"),
        ({"timeout": timedelta(days=3700)}, "timeout"),
        ({"stop_signal": "SIGNOT"}, "stop_signal"),
        ({"stop_grace": timedelta(microseconds=-1)}, "stop_grace"),
        ({"labels": {"": "x"}}, "labels"),
        ({"output_policy": 77}, "output_policy"),
        ({"leader_exit": 77}, "leader_exit"),
        ({"output_via": 77}, "output_via"),
        ({"limits": pb.Limits(memory_max_bytes=1000)}, "limits.memory_max_bytes"),
        ({"limits": pb.Limits(cpu_max_cores=float("nan"))}, "limits.cpu_max_cores"),
        ({"limits": pb.Limits(rlimits=[pb.Rlimit(name="bogus", soft=1)])}, "limits.rlimits.bogus"),
        ({"limits": pb.Limits(rlimits=[pb.Rlimit(name="nofile")])}, "limits.rlimits.nofile"),
        ({"limits": pb.Limits(rlimits=[pb.Rlimit("nofile", 1), pb.Rlimit("NOFILE", 2)])}, "limits.rlimits.nofile"),
        ({"limits": pb.Limits(nice=20)}, "limits.nice"),
        ({"limits": pb.Limits(umask=0o1000)}, "limits.umask"),
        ({"identity": pb.Identity(user="a:b")}, "identity.user"),
        ({"sandbox": pb.Sandbox(read_only_paths=["usr"])}, "sandbox.read_only_paths"),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value)[:30],
)
def test_bad_input_is_named(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        start_from(pb.StartJobReq(**{**FULL, **fields}), DEFAULTS)
    assert caught.value.message.startswith(f"{field}: ")


def test_the_operators_output_limit_holds() -> None:
    limited = DEFAULTS._replace(output_max_bytes_limit=5000, output_policy=OutputPolicy.STOP)
    assert start_from(pb.StartJobReq(**FULL), limited).spec.output_max_bytes == 4096
    for asked in (5001, 0):
        with pytest.raises(InvalidArgument, match=r"^output_max_bytes: .*5000"):
            start_from(pb.StartJobReq(command="true", output_max_bytes=asked), limited)
    none: Any = pb.OutputPolicy.NONE
    with pytest.raises(InvalidArgument, match=r"^output_policy: "):
        start_from(pb.StartJobReq(command="true", output_policy=none), limited)
    with pytest.raises(InvalidArgument, match=r"^output_policy: "):  # by default as little as on demand
        start_from(pb.StartJobReq(command="true"), limited._replace(output_policy=OutputPolicy.NONE))


# The maxima are defaults too, as the configuration makes them.
LIMITED = DEFAULTS._replace(
    limits=LimitDefaults(
        limits={
            "memory_max_bytes": 2**30,
            "pids_max": 50,
            "rlimits": {"nofile": (64, 64), "core": (0, 0)},
            "nice": 5,
        },
        identity=Identity("nobody", no_new_privs=False),
        sandbox=Sandbox(("/usr",), ("/work",), True, True),
        leader_exit=LeaderExit.WAIT,
        bounds={
            "memory_max_bytes": 2**30,
            "swap_max_bytes": 0,
            "cpu_max_cores": 2.0,
            "cpu_weight": 200,
            "pids_max": 100,
            "io_weight": 50,
            "rlimits": {"nofile": 64},
            "nice": 0,
            "oom_score_adj": -10,
        },
    )
)


def limited(**fields: Any) -> JobSpec:
    return start_from(sent(pb.StartJobReq(command="true", **fields)), LIMITED).spec


def test_who_asks_for_no_limit_has_the_workers() -> None:
    defaults = LIMITED.limits
    for spec in (limited(), limited(limits=pb.Limits(), identity=pb.Identity(), sandbox=pb.Sandbox())):
        assert spec.limits == defaults.limits
        assert spec.identity == defaults.identity
        assert spec.sandbox == defaults.sandbox
        assert spec.leader_exit is LeaderExit.WAIT


def test_what_is_asked_for_goes_over_the_workers_field_by_field() -> None:
    spec = limited(
        limits=pb.Limits(pids_max=7, cpu_weight=0, rlimits=[pb.Rlimit("nofile", soft=10)], umask=0),
        identity=pb.Identity(group="adm", no_new_privs=True),
        sandbox=pb.Sandbox(read_only_paths=["/"], no_network=False),
        leader_exit=wire.LeaderExit.KILL,
    )
    assert spec.limits == {
        "memory_max_bytes": 2**30,
        "pids_max": 7,
        # Only soft: the hard limit is the maximum, which the job can't get beyond.
        "rlimits": {"nofile": (10, 64), "core": (0, 0)},
        "nice": 5,
        "umask": 0,
    }
    assert spec.identity == Identity("nobody", "adm")
    assert spec.sandbox == Sandbox(("/",), (), True, False)
    assert spec.leader_exit is LeaderExit.KILL


def test_zero_is_no_limit_where_there_is_no_maximum() -> None:
    free = LIMITED._replace(limits=LIMITED.limits._replace(limits={"pids_max": 5}, bounds={}))
    limits = pb.Limits(memory_max_bytes=0, pids_max=0, swap_max_bytes=0)
    spec = start_from(sent(pb.StartJobReq(command="true", limits=limits)), free).spec
    assert spec.limits == {"swap_max_bytes": 0}


@pytest.mark.parametrize(
    "limits,said",
    [
        (pb.Limits(memory_max_bytes=2**30 + 1), "memory_max_bytes: must be at most 1073741824, .*, not 1073741825"),
        (pb.Limits(memory_max_bytes=0), "memory_max_bytes: must be at most 1073741824, .*, not unlimited"),
        (pb.Limits(swap_max_bytes=1), "swap_max_bytes: must be at most 0, which is this worker's maximum, not 1"),
        (pb.Limits(cpu_max_cores=2.5), "cpu_max_cores: must be at most 2, .*, not 2.5"),
        (pb.Limits(cpu_weight=201), "cpu_weight: must be at most 200, .*, not 201"),
        (pb.Limits(pids_max=101), "pids_max: must be at most 100"),
        (pb.Limits(io_weight=0), "io_weight: must be at most 50, .*, not 100"),
        (pb.Limits(rlimits=[pb.Rlimit("nofile", 65)]), "rlimits.nofile: must be at most 64, .*, not 65"),
        (pb.Limits(rlimits=[pb.Rlimit("nofile", 1, -1)]), "rlimits.nofile: must be at most 64, .*, not unlimited"),
        (pb.Limits(nice=-1), "nice: must be at least 0, which is this worker's minimum, not -1"),
        (pb.Limits(oom_score_adj=-11), "oom_score_adj: must be at least -10"),
    ],
)
def test_beyond_a_maximum(limits: pb.Limits, said: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^limits.{said}"):
        limited(limits=limits)


def test_at_a_maximum() -> None:
    limits = pb.Limits(2**30, 0, 2.0, 200, 100, 50, [pb.Rlimit("nofile", 64, 64)], 0, oom_score_adj=-10)
    bounds = {**LIMITED.limits.bounds, "rlimits": {"nofile": (64, 64), "core": (0, 0)}}
    assert limited(limits=limits).limits == bounds


# What the policy bounds: the bound is the default of who asks for nothing, and nothing is judged.

BOUNDS: dict[str, float] = {
    "timeout_s": 30,
    "stop_grace_s": 2.5,
    "output_max_bytes": 500.0,
    "stdin_bytes": 0,
    "memory_max_bytes": 2**20,
    "swap_max_bytes": 0,
    "cpu_max_cores": 1.5,
    "cpu_weight": 100,
    "io_weight": 50,
    "pids_max": 9,
    "rlimits.nofile": 32,
    "rlimits.core": 0,
    "nice_min": 7,
    "oom_score_adj_min": 0,
}


def bounded(defaults: Defaults = DEFAULTS, /, **fields: Any) -> JobSpec:
    return start_from(sent(pb.StartJobReq(command="true", **fields)), defaults.within(BOUNDS)).spec


def test_who_asks_for_nothing_gets_what_the_policy_allows_at_most() -> None:
    unlimited = DEFAULTS._replace(timeout_s=0.0, output_max_bytes=0)
    for defaults in (DEFAULTS, unlimited, LIMITED):
        spec = bounded(defaults)
        assert (spec.timeout_s, spec.stop_grace_s) == (30, 2.5)
        # Where all would be kept by default, the bound brings the usual way to keep to it.
        assert (spec.output_max_bytes, spec.output_policy) == (500, OutputPolicy.DROP_HEAD)
        nice = {"nice": 7} if defaults is LIMITED else {}
        assert spec.limits == {
            "memory_max_bytes": 2**20,
            "swap_max_bytes": 0,
            "cpu_max_cores": 1.5,
            "pids_max": 9,
            "io_weight": 50,
            "rlimits": {"nofile": (32, 32), "core": (0, 0)},
            **nice,
        }
        assert all(isinstance(value, int) for value in (spec.output_max_bytes, spec.limits["memory_max_bytes"]))
    # Stricter defaults stay.
    strict = DEFAULTS._replace(timeout_s=1.0, output_max_bytes=7, output_policy=OutputPolicy.STOP)
    assert (bounded(strict).timeout_s, bounded(strict).output_max_bytes) == (1, 7)
    assert bounded(strict).output_policy is OutputPolicy.STOP
    assert DEFAULTS.within({}) is DEFAULTS


def test_what_is_asked_for_stays_for_the_policy_to_judge() -> None:
    limits = pb.Limits(memory_max_bytes=0, pids_max=50, rlimits=[pb.Rlimit("nofile", 64)], nice=0)
    spec = bounded(timeout=timedelta(0), output_max_bytes=0, limits=limits)
    assert (spec.timeout_s, spec.output_max_bytes) == (0, 0)
    assert spec.limits == {
        "swap_max_bytes": 0,
        "cpu_max_cores": 1.5,
        "pids_max": 50,
        "io_weight": 50,
        "rlimits": {"nofile": (64, 64), "core": (0, 0)},
        "nice": 0,
    }


@pytest.mark.parametrize(
    "asked, limits",
    [
        (pb.Rlimit("nofile", soft=10), (10, 32)),  # raised by the job itself to the maximum, and no further
        (pb.Rlimit("nofile", soft=33), (33, 33)),
        (pb.Rlimit("nofile", soft=-1), (-1, None)),
        (pb.Rlimit("nofile", soft=10, hard=11), (10, 11)),
        (pb.Rlimit("stack", soft=10), (10, None)),
    ],
)
def test_a_soft_limit_alone_brings_the_hard_one(asked: pb.Rlimit, limits: tuple[int, int | None]) -> None:
    assert bounded(limits=pb.Limits(rlimits=[asked])).limits["rlimits"][asked.name] == limits
    # Within both maxima, that of the worker and that of the policy.
    if limits[0] == 10 and asked.name == "nofile":
        assert bounded(LIMITED, limits=pb.Limits(rlimits=[asked])).limits["rlimits"][asked.name] == limits


def test_a_maximum_asks_for_no_more_than_the_worker_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (5, 10))
    defaults = DEFAULTS.within({"rlimits.nofile": 1000}).limits
    assert (defaults.limits["rlimits"]["nofile"], defaults.rlimit_hards["nofile"]) == ((10, 10), 10)


def test_states_to_list() -> None:
    known: list[Any] = [pb.JobState.QUEUED, pb.JobState.FINISHED]
    assert messages.states_from(known) == (JobState.QUEUED, JobState.FINISHED)
    unknown: list[Any] = [pb.JobState.UNSPECIFIED, 6]
    for state in unknown:
        with pytest.raises(InvalidArgument, match=r"^states: there is no state"):
            messages.states_from([state])


@pytest.mark.parametrize("asked, given_size", [(0, 100), (1, 1), (1000, 1000), (1001, 1000), (2**31 - 1, 1000)])
def test_page_sizes(asked: int, given_size: int) -> None:
    assert messages.page_size_from(asked) == given_size


def test_bad_pages() -> None:
    with pytest.raises(InvalidArgument, match=r"^page_size: "):
        messages.page_size_from(-1)
    assert messages.page_token_from("") is None
    assert messages.page_token_from("17") == 17
    for token in ("x", "-1", "1.5", "٣", "9" * 19, " 1"):
        with pytest.raises(InvalidArgument, match=r"^page_token: "):
            messages.page_token_from(token)


@given(st.integers(-(10**18), 4 * 10**18))
def test_moments_are_exact_to_the_microsecond(ns: int) -> None:
    us = ns // 1000
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us)
    assert messages.ns_from(moment) == us * 1000
    assert messages.ns_from(moment.replace(tzinfo=None)) == us * 1000
