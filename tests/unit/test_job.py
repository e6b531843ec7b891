"""The vocabulary: the table of states, how a job ends and in which words, and what can be wrong with a spec."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.programs import exits, kills_self
from worker_svc.config import JobsConfig
from worker_svc.job import (
    ARG_MAX_BYTES,
    ARGS_MAX,
    DURATION_MAX_S,
    LABEL_KEY_MAX_BYTES,
    LABEL_VALUE_MAX_BYTES,
    LABELS_MAX,
    STDIN_MAX_BYTES,
    CheckedFile,
    Event,
    Exit,
    Identity,
    IllegalTransition,
    InvalidArgument,
    JobSpec,
    JobState,
    LeaderExit,
    Outcome,
    OutputPolicy,
    OutputVia,
    Sandbox,
    SecretEnv,
    StopCause,
    check_job_id,
    error_text,
    exit_text,
    fault_text,
    next_state,
    outcome_of,
    parse_signal,
    signal_name,
)

SAME, NEVER = "nothing changes", "cannot happen"

# The whole of it, each pair once: rows are states, columns the events below.
EVENTS = [
    Event.ENQUEUE, Event.LAUNCH, Event.SPAWNED, Event.SPAWN_FAILED, Event.STOP, Event.EXIT, Event.LOSE, Event.PAUSE,
    Event.RESUME, Event.REMARK,
]  # fmt: skip
QUEUED, STARTING, RUNNING, STOPPING, FINISHED = list(JobState)[1:]
TABLE: dict[JobState, list[JobState | str]] = {
    JobState.NEW: [QUEUED, STARTING, NEVER, NEVER, NEVER, NEVER, NEVER, NEVER, NEVER, NEVER],
    JobState.QUEUED: [NEVER, STARTING, NEVER, NEVER, FINISHED, NEVER, FINISHED, NEVER, NEVER, NEVER],
    JobState.STARTING: [NEVER, NEVER, RUNNING, FINISHED, SAME, NEVER, FINISHED, NEVER, NEVER, NEVER],
    JobState.RUNNING: [NEVER, NEVER, NEVER, NEVER, STOPPING, FINISHED, FINISHED, RUNNING, RUNNING, RUNNING],
    JobState.STOPPING: [NEVER, NEVER, NEVER, NEVER, SAME, FINISHED, FINISHED, NEVER, NEVER, STOPPING],
    JobState.FINISHED: [NEVER, NEVER, NEVER, NEVER, SAME, NEVER, NEVER, NEVER, NEVER, NEVER],
}


def test_the_table_here_is_whole() -> None:
    assert set(TABLE) == set(JobState)
    assert sorted(EVENTS) == sorted(Event)


@pytest.mark.parametrize("state, event", list(product(JobState, Event)), ids=lambda value: value.name)
def test_every_state_answers_every_event(state: JobState, event: Event) -> None:
    expected = TABLE[state][EVENTS.index(event)]
    if expected is NEVER:
        with pytest.raises(IllegalTransition, match=rf"{event.name} cannot happen .* {state.name}"):
            next_state(state, event)
    else:
        assert next_state(state, event) == (None if expected is SAME else expected)


def test_states_only_move_on() -> None:
    for state, row in TABLE.items():
        assert all(to_state >= state for to_state in row if isinstance(to_state, JobState))


@pytest.mark.parametrize(
    "ended, cause, outcome, limit, text",
    [
        (Exit(0, None), StopCause.NONE, Outcome.SUCCEEDED, "", ""),
        (Exit(1, None), StopCause.NONE, Outcome.FAILED, "", "exit status 1"),
        (Exit(255, None), StopCause.NONE, Outcome.FAILED, "", "exit status 255"),
        (Exit(None, 9), StopCause.NONE, Outcome.SIGNALED, "", "signal: killed"),
        (Exit(None, 11), StopCause.NONE, Outcome.SIGNALED, "", "signal: segmentation fault"),
        (Exit(None, 15), StopCause.REQUEST, Outcome.STOPPED, "", "signal: terminated"),
        (Exit(None, 9), StopCause.REQUEST, Outcome.STOPPED, "", "signal: killed"),
        (Exit(0, None), StopCause.REQUEST, Outcome.STOPPED, "", "stopped (exit status 0)"),
        (Exit(5, None), StopCause.REQUEST, Outcome.STOPPED, "", "stopped (exit status 5)"),
        (
            Exit(None, 15),
            StopCause.TIMEOUT,
            Outcome.TIMED_OUT,
            "timed out after 1.5 s",
            "timed out after 1.5 s (signal: terminated)",
        ),
        (Exit(0, None), StopCause.TIMEOUT, Outcome.TIMED_OUT, "timed out", "timed out (exit status 0)"),
        (Exit(None, 15), StopCause.OUTPUT, Outcome.OUTPUT_LIMIT, "wrote more", "wrote more (signal: terminated)"),
    ],
)
def test_how_a_job_ends(ended: Exit, cause: StopCause, outcome: Outcome, limit: str, text: str) -> None:
    assert outcome_of(ended, cause) is outcome
    assert error_text(ended, outcome, limit) == text


def test_every_cause_has_an_outcome_and_none_is_a_success() -> None:
    for cause in set(StopCause) - {StopCause.NONE}:
        assert outcome_of(Exit(0, None), cause) not in (Outcome.NONE, Outcome.SUCCEEDED)


@pytest.mark.parametrize(
    "number, words",
    [
        (signal.SIGHUP, "hangup"),
        (signal.SIGINT, "interrupt"),
        (signal.SIGQUIT, "quit"),
        (signal.SIGILL, "illegal instruction"),
        (signal.SIGTRAP, "trace/breakpoint trap"),
        (signal.SIGABRT, "aborted"),
        (signal.SIGBUS, "bus error"),
        (signal.SIGFPE, "floating point exception"),
        (signal.SIGKILL, "killed"),
        (signal.SIGUSR1, "user defined signal 1"),
        (signal.SIGSEGV, "segmentation fault"),
        (signal.SIGUSR2, "user defined signal 2"),
        (signal.SIGPIPE, "broken pipe"),
        (signal.SIGALRM, "alarm clock"),
        (signal.SIGTERM, "terminated"),
        (16, "stack fault"),
        (signal.SIGCHLD, "child exited"),
        (signal.SIGCONT, "continued"),
        (signal.SIGSTOP, "stopped (signal)"),
        (signal.SIGTSTP, "stopped"),
        (signal.SIGTTIN, "stopped (tty input)"),
        (signal.SIGTTOU, "stopped (tty output)"),
        (signal.SIGURG, "urgent I/O condition"),
        (signal.SIGXCPU, "CPU time limit exceeded"),
        (signal.SIGXFSZ, "file size limit exceeded"),
        (signal.SIGVTALRM, "virtual timer expired"),
        (signal.SIGPROF, "profiling timer expired"),
        (signal.SIGWINCH, "window changed"),
        (signal.SIGIO, "I/O possible"),
        (signal.SIGPWR, "power failure"),
        (signal.SIGSYS, "bad system call"),
        (signal.SIGRTMIN, "signal 34"),
        (signal.SIGRTMAX, "signal 64"),
    ],
)
def test_signals_in_the_words_of_go(number: int, words: str) -> None:
    """runtime/zerrors_linux_amd64.go: var signals."""
    assert exit_text(Exit(None, int(number))) == f"signal: {words}"


@pytest.mark.parametrize(
    "argv, expected",
    [
        (exits(0), Exit(0, None)),
        (exits(1), Exit(1, None)),
        (exits(127), Exit(127, None)),
        (exits(255), Exit(255, None)),
        (kills_self(signal.SIGTERM), Exit(None, 15)),
        (kills_self(signal.SIGSEGV), Exit(None, 11)),
        (kills_self(signal.SIGRTMAX), Exit(None, 64)),
    ],
)
def test_a_real_wait_status(argv: list[str], expected: Exit) -> None:
    child = subprocess.Popen(argv)
    _, status = os.waitpid(child.pid, 0)
    child.returncode = 0
    assert Exit.from_wait_status(status) == expected


def test_a_core_dump_does_not_hide_the_signal() -> None:
    assert Exit.from_wait_status(0x80 | signal.SIGSEGV) == Exit(None, signal.SIGSEGV)


@pytest.mark.parametrize(
    "text, number",
    [
        ("SIGTERM", 15),
        ("TERM", 15),
        ("term", 15),
        ("sigterm", 15),
        (" KILL ", 9),
        ("15", 15),
        ("SIGRTMIN", 34),
        ("64", 64),
        ("SIGRTMIN+1", 35),
        ("rtmax-2", 62),
        ("SIG37", 37),
        ("SIGIO", 29),
        ("POLL", 29),
    ],
)
def test_signals_that_can_be_named(text: str, number: int) -> None:
    assert parse_signal(text) == number


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "0",
        "65",
        "-9",
        "9.0",
        "SIG",
        "SIGNONE",
        "SIG_DFL",
        "15 9",
        "\u0661\u0665",
        "²",
        "9" * 40,
        "SIGSIGTERM",
        "SIG9",
        "SIGRTMIN+31",
    ],
)
def test_signals_that_cannot(text: str) -> None:
    with pytest.raises(ValueError, match="there is no signal"):
        parse_signal(text)


@pytest.mark.parametrize("number", sorted(map(int, signal.valid_signals())))
def test_a_signals_name_and_number_lead_back_to_it(number: int) -> None:
    assert parse_signal(str(number)) == number
    assert parse_signal(signal_name(number)) == number
    # As the configuration has it, too.
    assert JobsConfig(cwd=Path("/"), stop_signal=signal_name(number)).stop_signal_number == number


GOOD = JobSpec("true")


@pytest.mark.parametrize(
    "spec, field, part",
    [
        (JobSpec(""), "command", "empty"),
        (JobSpec("a\0b"), "command", "NUL"),
        (JobSpec("a" * (ARG_MAX_BYTES + 1)), "command", "at most"),
        (GOOD._replace(path="\0"), "path", "NUL"),
        (GOOD._replace(args=("fine", "b\0")), "args[1]", "NUL"),
        (GOOD._replace(args=("é" * (ARG_MAX_BYTES // 2 + 1),)), "args[0]", "at most"),
        (GOOD._replace(args=("",) * (ARGS_MAX + 1)), "args", "at most 4096, not 4097"),
        (GOOD._replace(args=("x" * 100_000,) * 30), "args", "together"),
        (GOOD._replace(env={f"V{n}": "x" * 100_000 for n in range(30)}), "args", "env together"),
        (GOOD._replace(env={"": "x"}), "env", "empty key"),
        (GOOD._replace(env={"A=B": "x"}), "env", "'A…'"),
        (GOOD._replace(env={"A\0": "x"}), "env", "NUL"),
        (GOOD._replace(env={"A": "\0"}), "env", "the value of 'A'"),
        (GOOD._replace(env={"A": "x" * ARG_MAX_BYTES}), "env", "below"),
        (GOOD._replace(cwd="relative"), "cwd", "absolute"),
        (GOOD._replace(cwd="/a\0"), "cwd", "NUL"),
        (GOOD._replace(stdin_size_bytes=STDIN_MAX_BYTES + 1), "stdin", "at most 1048576"),
        (GOOD._replace(timeout_s=-0.001), "timeout", "negative"),
        (GOOD._replace(timeout_s=DURATION_MAX_S * 1.001), "timeout", "at most"),
        (GOOD._replace(stop_grace_s=-1.0), "stop_grace", "negative"),
        (GOOD._replace(stop_grace_s=1e18), "stop_grace", "at most"),
        (GOOD._replace(labels={"": "x"}), "labels", "1 to 128"),
        (GOOD._replace(labels={"é" * 65: "x"}), "labels", "1 to 128"),
        (GOOD._replace(labels={"k": "x" * 1025}), "labels", "at most 1024"),
        (GOOD._replace(labels={str(n): "" for n in range(65)}), "labels", "at most 64, not 65"),
        (GOOD._replace(limits={"rlimits": {"nofile": (2, 1)}}), "limits.rlimits.nofile", "exceed"),
        (GOOD._replace(limits={"nice": 20}), "limits.nice", "from -20 to 19"),
        (GOOD._replace(limits={"pids_max": 0}), "limits.pids_max", "from 1"),
        (GOOD._replace(identity=Identity(user="a:b")), "identity.user", "no name"),
        (GOOD._replace(sandbox=Sandbox(("x",))), "sandbox.read_only_paths", "absolute"),
    ],
)
def test_what_can_be_wrong_with_a_spec(spec: JobSpec, field: str, part: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        spec.validate()
    assert caught.value.message.startswith(f"{field}")
    assert caught.value.message.removeprefix(field).startswith((":", " "))
    assert part in caught.value.message


ARG_CHARACTERS = st.characters(exclude_characters="\0", exclude_categories=["Cs"])


@pytest.mark.parametrize(
    "env, secrets, problem",
    [
        ({"PASSWORD": "hunter2\0"}, {}, "env: the value of 'PASSWORD' must not contain NUL"),
        ({}, {"TOKEN": "hunter2\0"}, "secret_env: the value of 'TOKEN' must not contain NUL"),
        ({}, {"TOKEN=hunter2": "x"}, "secret_env: key 'TOKEN…' must not contain '=' or NUL"),
        ({}, {"": "hunter2"}, "secret_env: has an empty key"),
        ({}, {"TOKEN": "hunter2" * ARG_MAX_BYTES}, "secret_env: 'TOKEN' and its value must be below 131071 bytes"),
        ({"A": "1"}, {"A": "hunter2"}, "secret_env: 'A' is in env too: give it in one of them"),
        ({}, {"PATH": "/hunter2"}, "secret_env: PATH is no secret: give it in env"),
        ({}, {f"T{n}": "hunter2" * 15_000 for n in range(20)}, "args: and env together must be below"),
    ],
)
def test_a_secret_is_not_in_what_is_wrong_with_it(env: dict[str, str], secrets: dict[str, str], problem: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        GOOD._replace(env=env, secret_env=tuple(secrets)).validate(secrets)
    assert caught.value.message.startswith(problem)
    assert "hunter2" not in caught.value.message


@given(
    st.dictionaries(st.text(ARG_CHARACTERS, min_size=1).filter(lambda name: "=" not in name), st.text(ARG_CHARACTERS))
)
def test_secrets_survive_their_way_and_have_no_repr(values: dict[str, str]) -> None:
    secrets = SecretEnv(values)
    assert SecretEnv.unpack(secrets.pack()) == values
    assert repr(secrets) == f"SecretEnv({sorted(values)})"


@pytest.mark.parametrize(
    "spec",
    [
        GOOD,
        JobSpec("/bin/sh", "script", ("", " ", "-x", "é\n")),
        GOOD._replace(args=("",) * ARGS_MAX),
        GOOD._replace(args=("x" * ARG_MAX_BYTES,)),
        GOOD._replace(env={"A": "", "B": "x=y"}, cwd="/"),
        GOOD._replace(stdin_size_bytes=STDIN_MAX_BYTES),
        GOOD._replace(timeout_s=DURATION_MAX_S, stop_grace_s=0.0),
        GOOD._replace(
            labels={str(n).rjust(LABEL_KEY_MAX_BYTES): "v" * LABEL_VALUE_MAX_BYTES for n in range(LABELS_MAX)}
        ),
    ],
)
def test_a_spec_at_its_limits_is_fine(spec: JobSpec) -> None:
    spec.validate()


def test_what_is_said_of_a_fault_has_not_the_text_it_is_about() -> None:
    with pytest.raises(UnicodeEncodeError) as caught:
        "hunter2\udcff".encode()
    assert "hunter2" in repr(caught.value)
    assert "hunter2" not in fault_text(caught.value)
    assert fault_text(caught.value).startswith("UnicodeEncodeError: ")


def test_argv() -> None:
    assert JobSpec("bash", "s.sh", ("-x", "")).argv == ["bash", "s.sh", "-x", ""]
    assert JobSpec("true").argv == ["true"]


def test_a_repr_tells_no_secret() -> None:
    shown = repr(JobSpec("run", path="secret", args=("--password=secret",), env={"PASSWORD": "secret"}))
    assert "secret" not in shown
    assert "PASSWORD" in shown


@pytest.mark.parametrize("job_id", ["a", "A-b_c.9", "0", "x" * 128, "7f9c24e8-3b12-4f1a-9d2e-0c5b6a7d8e9f"])
def test_good_job_ids(job_id: str) -> None:
    check_job_id(job_id)


@pytest.mark.parametrize(
    "job_id",
    ["", ".", "..", ".hidden", "-x", "_x", "a/b", "../x", "a b", "a\n", "a\0", "é", "x" * 129, "a:b", "\uff21"],
)
def test_job_ids_that_cannot_be_file_names(job_id: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^jobID: must "):
        check_job_id(job_id)


TEXTS = st.text(max_size=20)
SPECS = st.builds(
    JobSpec,
    command=TEXTS,
    path=TEXTS,
    args=st.lists(TEXTS, max_size=4).map(tuple),
    env=st.dictionaries(TEXTS, TEXTS, max_size=3),
    cwd=TEXTS,
    stdin_size_bytes=st.integers(0, 2**20),
    timeout_s=st.floats(0, DURATION_MAX_S),
    stop_signal=st.integers(1, 64),
    stop_grace_s=st.floats(0, DURATION_MAX_S),
    labels=st.dictionaries(TEXTS, TEXTS, max_size=3),
    separate_stderr=st.booleans(),
    output_max_bytes=st.integers(0, 2**63 - 1),
    output_policy=st.sampled_from(OutputPolicy),
    limits=st.sampled_from(
        [
            {},
            {
                "rlimits": {"nofile": (1, None)},
                "nice": 3,
                "cpu_affinity": (0, 2),
                "umask": 0o27,
                "oom_score_adj": -1,
                "memory_max_bytes": 2**30,
                "swap_max_bytes": 0,
                "cpu_max_cores": 0.5,
                "cpu_weight": 1,
                "pids_max": 2,
                "io_weight": 3,
            },
        ]
    ),
    identity=st.sampled_from([Identity(), Identity("a", "b", (), False)]),
    sandbox=st.sampled_from([Sandbox(), Sandbox(("/",), ("/a",), True, True)]),
    leader_exit=st.sampled_from(LeaderExit),
    checked=st.sampled_from([(), (CheckedFile("command", "/c", 1, 2, 3), CheckedFile("path", "/p", 4, 5, 6))]),
    secret_env=st.lists(TEXTS, max_size=2).map(tuple),
    output_via=st.sampled_from(OutputVia),
)


@given(SPECS)
def test_a_spec_survives_json(spec: JobSpec) -> None:
    read = JobSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert read == spec
    assert [type(value) for value in read] == [type(value) for value in spec]


def test_the_strategy_knows_every_field() -> None:
    """So that a new field is not forgotten above."""
    drawn = {name for name, default in JobSpec._field_defaults.items() if getattr(_unusual(), name) != default}
    assert drawn | {"command"} == set(JobSpec._fields)


def _unusual() -> JobSpec:
    return JobSpec(
        "c", "p", ("a",), {"e": "v"}, "/", 1, 1.0, 9, 1.0, {"l": "v"}, True, 1, OutputPolicy.STOP,
        {"nice": 1}, Identity("u"), Sandbox(private_tmp=True), LeaderExit.WAIT,
        (CheckedFile("command", "/c", 1, 2, 3),), ("s",), OutputVia.PIPE,
    )  # fmt: skip


def test_what_is_at_its_default_is_not_written() -> None:
    assert JobSpec("").to_json() == {"command": ""}
    assert set(_unusual().to_json()) == set(JobSpec._fields)


def test_a_field_of_a_newer_version_is_an_error() -> None:
    with pytest.raises(TypeError, match="from_the_future"):
        JobSpec.from_json({"command": "true", "from_the_future": 1})
    with pytest.raises(TypeError, match="from_the_future"):
        JobSpec.from_json({"command": "true", "sandbox": {"from_the_future": 1}})
