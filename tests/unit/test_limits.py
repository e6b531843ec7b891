"""Limits, identity and sandbox: one row a limit, the round trip through JSON, and what is refused, by field."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from worker_svc.job import Identity, InvalidArgument, Limits, Sandbox
from worker_svc.job.limits import (
    BY_NAME,
    LIMITS,
    OF_TREE,
    RLIMIT_NAMES,
    amount_text,
    check_limits,
    limits_from_json,
)
from worker_svc.pb import jobscheduler as pb
from worker_svc.supervisor.spawn.steps import RLIMITS

ALL: Limits = {
    "memory_max_bytes": 2**30,
    "swap_max_bytes": 0,
    "cpu_max_cores": 1.5,
    "cpu_weight": 200,
    "pids_max": 64,
    "io_weight": 10,
    "memory_high_bytes": 2**29,
    "rlimits": {"nofile": (100, 200), "core": (0, None), "as": (-1, -1)},
    "nice": -5,
    "cpu_affinity": (0, 3),
    "umask": 0o27,
    "oom_score_adj": 500,
}
WHO_AND_WHERE = (
    Identity("nobody", "1000", ("adm", "4"), False),
    Sandbox(("/usr", "/etc"), ("/work",), True, True),
)


def test_every_limit_is_a_row_and_a_field_of_the_contract() -> None:
    assert set(ALL) == set(BY_NAME), "a new limit belongs into this test"
    assert [limit.name for limit in LIMITS] == list(pb.Limits.__dataclass_fields__)
    assert len({limit.flag for limit in LIMITS}) == len(LIMITS)
    assert {limit.controller for limit in OF_TREE} == {"memory", "cpu", "pids", "io"}


def in_docs() -> str:
    """The rows as docs/limits.md shows them."""
    lines = ["| limit | option | from | to | default, bound in `[limits]` | bound in a policy's `max` | holds for |"]
    lines.append("|---" * 7 + "|")
    for limit in LIMITS:
        config = f"`{limit.name}`" + (f", `{limit.bound_key}`" if limit.bound else "")
        policy = {"rlimits": "`rlimits.NAME`"}.get(limit.name, f"`{limit.policy_key}`") if limit.bound else "–"
        scope = f"the whole tree ({limit.file})" if limit.file else "each process"
        low, high = amount_text(limit, limit.low), amount_text(limit, limit.high)
        lines.append(f"| `{limit.name}` | `{limit.flag}` | {low} | {high} | {config} | {policy} | {scope} |")
    return "\n".join(lines)


def test_the_table_in_the_documentation_is_this_one() -> None:
    text = (Path(__file__).parents[2] / "docs/limits.md").read_text()
    assert in_docs() in text, f"docs/limits.md lacks:\n{in_docs()}"


def test_limits_survive_json() -> None:
    check_limits(ALL)
    assert limits_from_json(json.loads(json.dumps(ALL))) == ALL
    assert limits_from_json({}) == {}
    with pytest.raises(TypeError):
        limits_from_json({"of_a_newer_version": 1})


@pytest.mark.parametrize("value", [*WHO_AND_WHERE, Identity(), Identity(groups=()), Sandbox()])
def test_the_round_trip_through_json(value: Any) -> None:
    assert type(value).from_json(json.loads(json.dumps(value.to_json()))) == value
    value.validate()


@pytest.mark.parametrize("value", WHO_AND_WHERE)
def test_every_field_is_in_the_round_trip(value: Any) -> None:
    """A new field has to be set in WHO_AND_WHERE."""
    assert set(value.to_json()) == set(value._fields)


def test_what_is_at_its_default_takes_no_room() -> None:
    assert [kind().to_json() for kind in (Identity, Sandbox)] == [{}, {}]


@pytest.mark.parametrize("kind", [Identity, Sandbox])
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
    "limits, text",
    [
        ({"memory_max_bytes": 5}, "memory_max_bytes: must be from 1048576 (1M) to 9223372036854775807, not 5"),
        ({"memory_max_bytes": 2**20 - 1}, "memory_max_bytes: must be from "),
        ({"memory_max_bytes": 2**63}, "memory_max_bytes: must be from "),
        ({"swap_max_bytes": -1}, "swap_max_bytes: must be from 0 to 9223372036854775807, not -1"),
        ({"cpu_max_cores": 0.001}, "cpu_max_cores: must be from 0.01 to 100000, not 0.001"),
        ({"cpu_max_cores": float("nan")}, "cpu_max_cores: must be from "),
        ({"cpu_max_cores": float("inf")}, "cpu_max_cores: must be from "),
        ({"cpu_weight": 0}, "cpu_weight: must be from "),
        ({"cpu_weight": 10_001}, "cpu_weight: must be from "),
        ({"pids_max": 0}, "pids_max: must be from 1 to 4194304, not 0"),
        ({"io_weight": 10_001}, "io_weight: must be from "),
        ({"rlimits": {"bogus": (1, 1)}}, "rlimits.bogus: there is no such limit: use one of as, core"),
        ({"rlimits": {"nofile": (2, 1)}}, "rlimits.nofile: the soft limit 2 must not exceed the hard limit 1"),
        ({"rlimits": {"nofile": (-1, 1)}}, "rlimits.nofile: the soft limit unlimited must not exceed"),
        ({"rlimits": {"cpu": (-2, 1)}}, "rlimits.cpu: must be from -1 to"),
        ({"rlimits": {"cpu": (1, 2**63)}}, "rlimits.cpu: must be from -1 to"),
        ({"nice": 20}, "nice: must be from -20 to 19, not 20"),
        ({"cpu_affinity": (0, -1)}, "cpu_affinity: must be from 0 to 8191, not -1"),
        ({"umask": 0o1000}, "umask: must be from 0 to 0777, not 0o1000"),
        ({"oom_score_adj": 1001}, "oom_score_adj: must be from -1000 to 1000"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(limits: Limits, text: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"^limits\.{re.escape(text)}"):
        check_limits({**ALL, **limits})


@pytest.mark.parametrize(
    "value,problem",
    [
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


def test_amounts() -> None:
    memory, cores, pids = BY_NAME["memory_max_bytes"], BY_NAME["cpu_max_cores"], BY_NAME["pids_max"]
    assert amount_text(memory, 3 * 2**29) == "1610612736 (1536M)"
    assert amount_text(memory, 2**40 + 1) == "1099511627777"
    assert amount_text(pids, 2**20) == "1048576"
    assert amount_text(cores, 1.5) == "1.5"
