"""Limits as people write them: on the command line and in the configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.configured import load_config
from worker_svc.config import ConfigError, LimitsConfig, SandboxConfig, load
from worker_svc.job import Sandbox
from worker_svc.job.limit_texts import cpus_text, parse_cpus, parse_rlimit, parse_size, parse_umask, rlimit_text
from worker_svc.wire.messages.defaults import start_defaults

HOME = {"HOME": "/home/someone"}


@pytest.mark.parametrize(
    "parse,text,value",
    [
        (parse_rlimit, "nofile=1024:4096", ("nofile", (1024, 4096))),
        (parse_rlimit, "RLIMIT_CORE=0", ("core", (0, 0))),
        (parse_rlimit, " stack = 8 : unlimited ", ("stack", (8, -1))),
        (parse_rlimit, "cpu=infinity", ("cpu", (-1, -1))),
        (parse_cpus, "3,0-1, 1", (0, 1, 3)),
        (parse_umask, "027", 0o27),
        (parse_umask, "0777", 0o777),
        (parse_umask, "0", 0),
        (parse_size, "1048576", 1048576),
        (parse_size, "512M", 512 * 2**20),
        (parse_size, "1.5GiB", 3 * 2**29),
        (parse_size, "2kb", 2048),
        (parse_size, "0", 0),
    ],
)
def test_good_texts(parse: Callable[[str], object], text: str, value: object) -> None:
    assert parse(text) == value


@pytest.mark.parametrize(
    "parse,texts",
    [
        (parse_rlimit, ["nofile", "=1", "bogus=1", "nofile=", "nofile=-1", "nofile=1:2:3", "nofile=x", f"cpu={2**63}"]),
        (parse_cpus, ["", "x", "1-", "3-1", "9000", "1,,2", "-1"]),
        (parse_umask, ["", "8", "01000", "-1", "0o27", "u=rwx"]),
        (parse_size, ["", "-1", "1X", "M", "1.5.2G", "1e9", "0x10", "٣"]),
    ],
)
def test_bad_texts(parse: Callable[[str], object], texts: list[str]) -> None:
    for text in texts:
        with pytest.raises(ValueError, match=r"must|there is no"):
            parse(text)


@given(st.sets(st.integers(0, 100), min_size=1))
def test_cpus_there_and_back(cpus: set[int]) -> None:
    assert parse_cpus(cpus_text(tuple(cpus))) == tuple(sorted(cpus))


@given(st.integers(-1, 2**40), st.integers(-1, 2**40))
def test_rlimits_there_and_back(soft: int, hard: int) -> None:
    assert parse_rlimit(rlimit_text("nofile", soft, hard)) == ("nofile", (soft, hard))


# In the configuration


def config_of(tmp_path: Path, text: str) -> Any:
    (tmp_path / "worker.toml").write_text(text)
    return load_config(tmp_path / "worker.toml", environ=HOME)


FILE = """
[limits]
memory_max_bytes = "512M"
memory_max_bytes_limit = 1073741824
swap_max_bytes_limit = 0
cpu_max_cores = 1
cpu_weight_limit = 50
pids_max_limit = 100
io_weight_limit = 500
rlimits = ["NOFILE=10:20", "core=0"]
rlimits_limit = ["nofile=64"]
nice = 5
nice_min = 0
cpu_affinity = "1,0"
umask = "27"
oom_score_adj = 3

[sandbox]
read_only_paths = ["/usr", "/etc"]
read_write_paths = ["/work"]
private_tmp = true
no_network = true
"""


def test_what_the_worker_makes_of_a_file(tmp_path: Path) -> None:
    config = config_of(tmp_path, FILE)
    limits: LimitsConfig = config.limits
    assert limits.bounds == {
        "memory_max_bytes": 2**30,
        "swap_max_bytes": 0,
        "cpu_weight": 50,
        "pids_max": 100,
        "io_weight": 500,
        "rlimits": {"nofile": 64},
        "nice": 0,
    }
    # A maximum is the default where there is none; a weight's only if it is below what the kernel gives.
    assert start_defaults(config).limits.limits == {
        "memory_max_bytes": 2**29,
        "swap_max_bytes": 0,
        "cpu_max_cores": 1.0,
        "cpu_weight": 50,
        "pids_max": 100,
        "rlimits": {"nofile": (10, 20), "core": (0, 0)},
        "nice": 5,
        "cpu_affinity": (0, 1),
        "umask": 0o27,
        "oom_score_adj": 3,
    }
    assert config.sandbox.sandbox == Sandbox(("/usr", "/etc"), ("/work",), True, True)


def test_what_is_in_effect_can_be_put_into_a_file(tmp_path: Path) -> None:
    first = config_of(tmp_path, FILE)
    dumped = load(tmp_path / "worker.toml", environ=HOME).dump()
    again = config_of(tmp_path, dumped)
    assert replace(again, jobs=first.jobs) == first


def test_by_default_nothing_is_limited() -> None:
    assert LimitsConfig().defaults == LimitsConfig().bounds == {}
    assert SandboxConfig().sandbox == Sandbox()


@pytest.mark.parametrize(
    "name,text,value",
    [
        ("memory_max_bytes", "1G", 2**30),
        ("memory_max_bytes", " ", None),
        ("swap_max_bytes", "0", 0),
        ("cpu_max_cores", "0.5", 0.5),
        ("nice", "-5", -5),
        ("pids_max", "", None),
        ("rlimits", "nofile=1:2,core=0", ("nofile=1:2", "core=0")),
        ("cpu_affinity", "0,1,2", "0-2"),
        ("umask", "7", "0007"),
    ],
)
def test_as_variables(name: str, text: str, value: object) -> None:
    environ = {**HOME, f"WORKER_SVC_LIMITS_{name.upper()}": text}
    assert getattr(load_config(None, environ=environ).limits, name) == value


@pytest.mark.parametrize(
    "text,said",
    [
        ("limits.memory_max_bytes = 5", "must be a number of bytes from 1048576 to 9223372036854775807 (or text"),
        ('limits.memory_max_bytes = "much"', 'not "much"'),
        ("limits.pids_max = 0", 'must be a whole number from 1 to 4194304, or "", not 0'),
        ("limits.pids_max = true", "not true"),
        ("limits.cpu_max_cores = nan", "must be a number from 0.01"),
        ('limits.cpu_max_cores = "x"', 'not "x"'),
        ('limits.rlimits = ["nofile=2:1"]', 'entry 1 has a soft limit above the hard one: "nofile=2:1"'),
        ('limits.rlimits = ["bogus=1"]', "entry 1 there is no limit 'bogus'"),
        ("limits.rlimits = [1]", "entry 1 must be text, not 1"),
        ('limits.rlimits = "nofile=1"', "must be a list of limits"),
        ('limits.rlimits_limit = ["nofile=1:2"]', "entry 1 must be one number, the most that the hard limit may be"),
        ('limits.rlimits_limit = ["nofile=unlimited"]', "entry 1 must be one number"),
        ('limits.umask = "99"', 'must be octal digits as text, such as "0027"'),
        ("limits.umask = 27", "must be octal digits as text"),
        ('limits.cpu_affinity = "x"', 'must be CPU numbers as text, such as "0,2-3"'),
        ('sandbox.read_only_paths = ["usr"]', 'entry 1 must be an absolute path, not "usr"'),
        ("limits.pids_max = 5\nlimits.pids_max_limit = 4", "pids_max 5 must not be more than pids_max_limit, 4"),
        ("limits.nice = -1\nlimits.nice_min = 0", "nice -1 must not be less than nice_min, 0"),
        (
            'limits.rlimits = ["nofile=5:unlimited"]\nlimits.rlimits_limit = ["nofile=5"]',
            "nofile must not be more than in rlimits_limit, 5",
        ),
        ('jobs.leader_exit = "stay"', 'must be "kill" or "wait"'),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(tmp_path, text)
    assert said in str(caught.value)
