"""Limits that are asked for: the worker's defaults, maxima, and what the policy bounds."""

from __future__ import annotations

import resource
from datetime import timedelta
from typing import Any

import pytest

from tests.support.examples import DEFAULTS, sent, wire
from worker_svc.job import (
    Identity,
    InvalidArgument,
    JobSpec,
    LeaderExit,
    OutputPolicy,
    Sandbox,
)
from worker_svc.pb import jobscheduler as pb
from worker_svc.wire.messages import (
    start_from,
)
from worker_svc.wire.messages.defaults import Defaults
from worker_svc.wire.messages.limits import LimitDefaults

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
    limits = pb.Limits(2**30, 0, 2.0, 200, 100, 50, None, [pb.Rlimit("nofile", 64, 64)], 0, oom_score_adj=-10)
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
