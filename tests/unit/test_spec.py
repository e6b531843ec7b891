"""What is asked for: specs, ids and secrets."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker_svc.job import (
    ARG_MAX_BYTES,
    ARGS_MAX,
    DURATION_MAX_S,
    LABEL_KEY_MAX_BYTES,
    LABEL_VALUE_MAX_BYTES,
    LABELS_MAX,
    STDIN_MAX_BYTES,
    CheckedFile,
    Identity,
    InvalidArgument,
    JobSpec,
    LeaderExit,
    OutputPolicy,
    OutputVia,
    Sandbox,
    SecretEnv,
    check_job_id,
    fault_text,
)

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
