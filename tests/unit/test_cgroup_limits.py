"""Limits of a whole tree: their bounds, their JSON, defaults and maxima."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from worker_svc.job import InvalidArgument
from worker_svc.job.cgroup_limits import CgroupLimits, amount_text

ALL = CgroupLimits(
    memory_max_bytes=2**30, swap_max_bytes=0, cpu_max_cores=1.5, cpu_weight=200, pids_max=64, io_weight=10
)


def test_every_field_survives_json() -> None:
    assert None not in ALL, "a new field belongs into this test"
    assert CgroupLimits.from_json(json.loads(json.dumps(ALL.to_json()))) == ALL
    assert CgroupLimits().to_json() == {}
    assert CgroupLimits.from_json({}) == CgroupLimits()
    with pytest.raises(TypeError):
        CgroupLimits.from_json({"of_a_newer_version": 1})


def test_what_is_in_range_is_accepted() -> None:
    CgroupLimits().validate()
    ALL.validate()


@pytest.mark.parametrize(
    "field, value",
    [
        ("memory_max_bytes", 0),
        ("memory_max_bytes", 2**20 - 1),
        ("memory_max_bytes", 2**63),
        ("swap_max_bytes", -1),
        ("cpu_max_cores", 0.0),
        ("cpu_max_cores", 0.009),
        ("cpu_max_cores", float("nan")),
        ("cpu_max_cores", float("inf")),
        ("cpu_weight", 0),
        ("cpu_weight", 10_001),
        ("pids_max", 0),
        ("io_weight", 0),
        ("io_weight", 10_001),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidArgument, match=rf"^limits\.{field}: must be from "):
        ALL._replace(**{field: value}).validate()


def test_defaults_fill_what_a_job_leaves_open() -> None:
    assert CgroupLimits(pids_max=5).over(CgroupLimits(pids_max=9, cpu_weight=50)) == CgroupLimits(
        pids_max=5, cpu_weight=50
    )
    assert CgroupLimits(swap_max_bytes=0).over(ALL).swap_max_bytes == 0


@pytest.mark.parametrize(
    "limits, text",
    [
        (CgroupLimits(pids_max=0), "limits.pids_max: must be from 1 to 4194304, not 0"),
        (
            CgroupLimits(memory_max_bytes=5),
            "limits.memory_max_bytes: must be from 1048576 (1M) to 9223372036854775807, not 5",
        ),
        (CgroupLimits(swap_max_bytes=-1), "limits.swap_max_bytes: must be from 0 to 9223372036854775807, not -1"),
        (CgroupLimits(cpu_max_cores=0.001), "limits.cpu_max_cores: must be from 0.01 to 100000, not 0.001"),
    ],
)
def test_bounds_have_all_their_digits(limits: CgroupLimits, text: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{re.escape(text)}$"):
        limits.validate()


def test_amounts() -> None:
    assert amount_text("memory_max_bytes", 3 * 2**29) == "1610612736 (1536M)"
    assert amount_text("memory_max_bytes", 2**40 + 1) == "1099511627777"
    assert amount_text("pids_max", 2**20) == "1048576"
    assert amount_text("cpu_max_cores", 1.5) == "1.5"
