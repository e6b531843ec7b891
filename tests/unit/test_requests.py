"""Requests: a fingerprint tells every one apart, and bad ones are named."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.examples import DEFAULTS, FULL, fields_of, sent
from worker_svc.job import (
    InvalidArgument,
    JobState,
    OutputPolicy,
)
from worker_svc.job.limits import BY_NAME
from worker_svc.pb import jobscheduler as pb
from worker_svc.wire import messages
from worker_svc.wire.messages import (
    fingerprint_of,
    start_from,
)

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
