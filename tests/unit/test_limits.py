"""Limits, identity and sandbox: the round trip through JSON, and what is refused, by field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from worker_svc.job import Identity, InvalidArgument, ProcessLimits, Sandbox
from worker_svc.job.limits import RLIMIT_NAMES
from worker_svc.supervisor.spawn.steps import RLIMITS

FULL = (
    ProcessLimits({"nofile": (100, 200), "core": (0, None), "as": (-1, -1)}, -5, (0, 3), 0o27, 500),
    Identity("nobody", "1000", ("adm", "4"), False),
    Sandbox(("/usr", "/etc"), ("/work",), True, True),
)


@pytest.mark.parametrize("value", [*FULL, ProcessLimits(), Identity(), Identity(groups=()), Sandbox()])
def test_the_round_trip_through_json(value: Any) -> None:
    assert type(value).from_json(json.loads(json.dumps(value.to_json()))) == value
    value.validate()


@pytest.mark.parametrize("value", FULL)
def test_every_field_is_in_the_round_trip(value: Any) -> None:
    """A new field has to be set in FULL."""
    assert set(value.to_json()) == set(value._fields)


def test_what_is_at_its_default_takes_no_room() -> None:
    assert [kind().to_json() for kind in (ProcessLimits, Identity, Sandbox)] == [{}, {}, {}]


@pytest.mark.parametrize("kind", [ProcessLimits, Identity, Sandbox])
def test_a_field_of_a_newer_version_is_an_error(kind: Any) -> None:
    with pytest.raises(TypeError):
        kind.from_json({"new": 1})


def test_no_new_privs_is_the_default() -> None:
    assert Identity().no_new_privs


def test_every_rlimit_has_its_number() -> None:
    import resource

    assert set(RLIMITS) == set(RLIMIT_NAMES)
    for name, number in RLIMITS.items():
        if hasattr(resource, f"RLIMIT_{name.upper()}"):  # what Python knows of, it knows by the same number
            assert getattr(resource, f"RLIMIT_{name.upper()}") == number


@pytest.mark.parametrize(
    "value,problem",
    [
        (ProcessLimits({"bogus": (1, 1)}), "limits.rlimits.bogus: there is no such limit: use one of as, core"),
        (ProcessLimits({"nofile": (2, 1)}), "limits.rlimits.nofile: the soft limit 2 must not exceed the hard limit 1"),
        (ProcessLimits({"nofile": (-1, 1)}), "limits.rlimits.nofile: the soft limit unlimited must not exceed"),
        (ProcessLimits({"cpu": (-2, 1)}), "limits.rlimits.cpu: must be from -1 to"),
        (ProcessLimits({"cpu": (1, 2**63)}), "limits.rlimits.cpu: must be from -1 to"),
        (ProcessLimits(nice=20), "limits.nice: must be from -20 to 19, not 20"),
        (ProcessLimits(cpu_affinity=(0, -1)), "limits.cpu_affinity: must be from 0 to 8191, not -1"),
        (ProcessLimits(umask=0o1000), "limits.umask: must be from 0 to 0777, not 0o1000"),
        (ProcessLimits(oom_score_adj=1001), "limits.oom_score_adj: must be from -1000 to 1000"),
        (Identity(user="a\0b"), "identity.user: is no name and no id"),
        (Identity(group="a:b"), "identity.group: is no name and no id"),
        (Identity(groups=("",)), "identity.groups: must not be empty"),
        (Identity(groups=("x",) * 1025), "identity.groups: must be at most 1024"),
        (Identity(user="x" * 300), "identity.user: must be at most 256 bytes"),
        (Sandbox(read_only_paths=("usr",)), "sandbox.read_only_paths: must be absolute paths, which entry 0 is not"),
        (Sandbox(read_write_paths=("/a\0",)), "sandbox.read_write_paths: must not contain a NUL"),
        (Sandbox(read_write_paths=("/" + "x" * 4096,)), "sandbox.read_write_paths: must be at most 4095"),
        (Sandbox(read_write_paths=("/",) * 257), "sandbox.read_write_paths: must be at most 256"),
    ],
)
def test_what_is_malformed_is_named(value: Any, problem: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        value.validate()
    assert str(caught.value).startswith(problem)
