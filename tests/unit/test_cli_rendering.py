"""How the command line shows things."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from tests.support.fake_worker import (
    BEGAN,
    finished,
)
from worker_svc.cli.render import (
    age,
    cut,
    human_duration,
    human_size,
    job_block,
    job_json,
    job_table,
    status_line,
)
from worker_svc.cli.run import exit_status
from worker_svc.pb.jobscheduler import (
    Groups,
    Identity,
    Job,
    JobSpec,
    JobState,
    LeaderExit,
    Limits,
    Outcome,
    OutputPolicy,
    Rlimit,
    Sandbox,
)
from worker_svc.printable import printable

NOW = BEGAN + timedelta(minutes=5)


# --- rendering


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0 ms"),
        (-3, "0 ms"),
        (0.0042, "4 ms"),
        (0.42, "0.42 s"),
        (9.994, "9.99 s"),
        (9.996, "10.0 s"),
        (59.94, "59.9 s"),
        (59.97, "1m 00s"),
        (185, "3m 05s"),
        (3599.6, "1h 00m"),
        (7440, "2h 04m"),
        (273600, "3d 04h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert human_duration(timedelta(seconds=seconds)) == text


@pytest.mark.parametrize(
    "size_bytes, text",
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (150 * 1024, "150 KiB"),
        (1023 * 1024, "1.0 MiB"),
        (20 * 2**30, "20.0 GiB"),
        (2**63, "8.0 EiB"),
    ],
)
def test_sizes(size_bytes: int, text: str) -> None:
    assert human_size(size_bytes) == text


def test_ages() -> None:
    ago = [timedelta(seconds=s) for s in (-5, 0.5, 59, 60, 7199, 86400 * 3)]
    expected = ["just now", "just now", "59 s ago", "1 min ago", "1 h ago", "3 d ago"]
    assert [age(NOW - past, NOW) for past in ago] == expected


def test_nothing_reaches_the_terminal_that_it_would_act_on() -> None:
    assert printable("a\x1b[2J\nb\udcffé\x7f") == r"a\u001b[2J\nb\udcffé\u007f"


def test_cut() -> None:
    assert [cut("abcdef", width) for width in (None, 6, 5, 1, 0)] == ["abcdef", "abcdef", "abcd…", "…", "…"]


def test_the_table() -> None:
    jobs = [
        Job(job_id="long-name", spec=JobSpec(command="sleep", args=["9"]), state=JobState(JobState.QUEUED)),
        finished("a", Outcome.FAILED, exit_code=3),
        finished("b", Outcome.TIMED_OUT, signal="SIGKILL"),
    ]
    assert job_table(jobs, now=NOW, width=None) == [
        "ID         STATUS     EXIT     STARTED    WALL    COMMAND",
        "long-name  queued     -        -          -       sleep 9",
        "a          failed     3        5 min ago  1.50 s  sh -c 'exit 3'",
        "b          timed out  SIGKILL  5 min ago  1.50 s  sh -c 'exit 3'",
    ]
    assert max(map(len, job_table(jobs, now=NOW, width=55))) == 55


def test_a_paused_job_shows_as_one_and_the_table_has_room_for_it() -> None:
    paused = Job(job_id="p", state=JobState(JobState.RUNNING), paused=True, spec=JobSpec(command="a"))
    running = Job(job_id="r", state=JobState(JobState.RUNNING), spec=JobSpec(command="b"))
    ended = finished("e", Outcome.STOPPED, paused=True)
    assert job_table([paused, running], now=NOW, width=None) == [
        "ID  STATUS            EXIT  STARTED  WALL  COMMAND",
        "p   running (paused)  -     -        -     a",
        "r   running           -     -        -     b",
    ]
    assert [status_line(job) for job in (paused, running, ended)] == ["running (paused)", "running", "stopped"]


def test_the_block() -> None:
    job = finished("a", Outcome.FAILED, exit_code=3, error_text="exit status 3", pid=7, peak_memory_bytes=2**20)
    job.spec.env = {"TOKEN": "secret"}
    job.spec.labels = {"k": "v\n"}
    job.spec.timeout = timedelta(seconds=90)
    job.spec.stop_signal = "SIGTERM"
    job.spec.stop_grace = timedelta(seconds=10)
    job.spec.output_max_bytes = 2**26
    job.spec.output_policy = OutputPolicy(OutputPolicy.DROP_HEAD)
    job.output_file, job.output_size_bytes = "/out", 5
    block = job_block(job, now=NOW)
    assert [line for line in block if "2026-" not in line] == [
        "job:           a",
        "status:        failed: exit status 3",
        "command:       sh -c 'exit 3'",
        "env:           TOKEN",
        "labels:        k=v\n",
        "pid:           7",
        "wall time:     1.50 s",
        "peak memory:   1.0 MiB",
        "timeout:       1m 30s",
        "to stop:       SIGTERM, then SIGKILL after 10 s",
        "output limit:  64.0 MiB, the oldest goes",
        "output:        /out (5 B)",
    ]
    assert len(block) == 15


def test_the_block_of_a_job_with_limits() -> None:
    job = Job(job_id="a", state=JobState(JobState.RUNNING), paused=True, stuck="pid 7 (D) waits in nfs_wait")
    job.output_loss = "5 bytes were truncated"
    job.spec = JobSpec(
        command="ls",
        limits=Limits(
            memory_max_bytes=2**29, swap_max_bytes=0, cpu_max_cores=1.5, cpu_weight=5, pids_max=7, io_weight=6,
            rlimits=[Rlimit(name="nofile", soft=10, hard=20), Rlimit(name="core", soft=0), Rlimit("as", -1, -1)],
            nice=-5, cpu_affinity=[0, 2, 3], umask=0o27, oom_score_adj=0,
        ),
        identity=Identity(user="nobody", group="adm", groups=Groups(), no_new_privs=False),
        sandbox=Sandbox(read_only_paths=["/usr", "/etc"], read_write_paths=["/w"], private_tmp=True, no_network=True),
        leader_exit=LeaderExit(LeaderExit.WAIT),
    )  # fmt: skip
    assert job_block(job, now=NOW) == [
        "job:           a",
        "status:        running (paused)",
        "command:       ls",
        "stuck:         pid 7 (D) waits in nfs_wait",
        (
            "limits:        memory 512 MiB; swap 0 B; cpus 1.5; cpu weight 5; pids 7; io weight 6; nofile 10:20; "
            "core 0; as unlimited; nice -5; on cpus 0,2-3; umask 0027; oom score 0"
        ),
        "runs as:       user nobody; group adm; groups none; may gain privileges",
        "sandbox:       read only /usr, /etc; read and write /w; private /tmp; no network",
        "ends:          when all of its processes are gone",
        "output loss:   5 bytes were truncated",
    ]
    told = job_json(job)["spec"]
    assert told["limits"]["rlimits"] == {
        "nofile": {"soft": 10, "hard": 20}, "core": {"soft": 0, "hard": None}, "as": {"soft": -1, "hard": -1},
    }  # fmt: skip
    for name, kind in (("limits", Limits), ("identity", Identity), ("sandbox", Sandbox)):
        assert set(told[name]) == set(kind.__dataclass_fields__)


@pytest.mark.parametrize(
    "outcome, error_text, line",
    [
        (Outcome.SUCCEEDED, "", "succeeded"),
        (Outcome.SIGNALED, "signal: killed", "signaled: killed"),
        (Outcome.STOPPED, "signal: terminated", "stopped: signal: terminated"),
        (Outcome.STOPPED, "stopped (exit status 0)", "stopped (exit status 0)"),
        (Outcome.TIMED_OUT, "timed out after 5 s (signal: killed)", "timed out after 5 s (signal: killed)"),
        (Outcome.LOST, "machine rebooted", "lost: machine rebooted"),
    ],
)
def test_how_an_end_is_told(outcome: int, error_text: str, line: str) -> None:
    assert status_line(finished("a", outcome, error_text=error_text)) == line


def test_json_has_a_place_for_every_field() -> None:
    def names(message: type) -> set[str]:
        return {name.removesuffix("_s") for name in message.__dataclass_fields__}  # type: ignore[attr-defined]

    told = job_json(Job())
    assert {name.removesuffix("_s") for name in told} == names(Job)
    assert {name.removesuffix("_s") for name in told["spec"]} == names(JobSpec)
    assert job_json(finished("a", Outcome.LOST))["finished_at"] == "2026-11-24T06:00:01.500000Z"


@pytest.mark.parametrize(
    "outcome, fields, interrupted, status",
    [
        (Outcome.SUCCEEDED, {"exit_code": 0}, False, 0),
        (Outcome.FAILED, {"exit_code": 3}, False, 3),
        (Outcome.SIGNALED, {"signal": "SIGSEGV"}, False, 139),
        (Outcome.SIGNALED, {"signal": "SIG35"}, False, 163),
        (Outcome.OOM_KILLED, {}, False, 137),
        (Outcome.OOM_KILLED, {"signal": "SIGKILL"}, False, 137),
        (Outcome.STOPPED, {"signal": "SIGTERM"}, True, 143),
        (Outcome.STOPPED, {"exit_code": 5}, True, 5),
        (Outcome.STOPPED, {"exit_code": 0}, True, 130),
        (Outcome.STOPPED, {"exit_code": 0}, False, 143),
        (Outcome.STOPPED, {}, False, 143),
        (Outcome.TIMED_OUT, {"exit_code": 0}, False, 124),
        (Outcome.TIMED_OUT, {"signal": "SIGKILL"}, False, 124),
        (Outcome.START_FAILED, {}, False, 125),
        (Outcome.LOST, {}, False, 125),
        (Outcome.OUTPUT_LIMIT, {"signal": "SIGTERM"}, False, 143),
        (Outcome.OUTPUT_LIMIT, {"exit_code": 0}, False, 143),
        (Outcome.UNSPECIFIED, {}, False, 125),
    ],
)
def test_the_status_of_run(outcome: int, fields: dict[str, Any], interrupted: bool, status: int) -> None:
    assert exit_status(finished("a", outcome, **fields), interrupted=interrupted) == status
