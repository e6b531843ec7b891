"""The command line: what it makes of its arguments, how things look, and its exit statuses, against a fake
worker."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from tests.support.fake_worker import (
    BEGAN,
    MERGED,
    STDERR,
    STDOUT,
    FakeWorker,
    chunks,
    finished,
    serving_in_thread,
)
from worker_svc.cli import main
from worker_svc.cli.job_options import JobOptions
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
from worker_svc.config import Config
from worker_svc.pb.jobscheduler import (
    Groups,
    Identity,
    Job,
    JobSpec,
    JobState,
    LeaderExit,
    Limits,
    ListJobsReq,
    Outcome,
    OutputPolicy,
    OutputStream,
    PauseJobReq,
    ResumeJobReq,
    Rlimit,
    Sandbox,
    SignalJobReq,
    StartJobReq,
    StopJobReq,
    StreamJobReq,
)
from worker_svc.printable import printable

NOW = BEGAN + timedelta(minutes=5)


@pytest.fixture
def address(fake_worker: FakeWorker, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with serving_in_thread(fake_worker) as address:
        monkeypatch.setenv("WORKER_SVC_ADDR", address)
        yield address


def usage_error(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


# --- arguments


@pytest.mark.parametrize(
    "argv, command",
    [
        (["ls"], ["ls"]),
        (["ls", "-l", "--id", "x"], ["ls", "-l", "--id", "x"]),
        (["--id", "x", "ls"], ["ls"]),
        (["--id=x", "ls", "--", "-l"], ["ls", "--", "-l"]),
        (["--separate-stderr", "ls"], ["ls"]),
        (["--", "-odd-name"], ["-odd-name"]),
        (["--id", "x", "--", "ls", "--"], ["ls", "--"]),
        (["--", "--", "x"], ["--", "x"]),
        (["--env", "A=-b", "--label", "k=v", "--timeout", "3", "ls"], ["ls"]),
        (["-"], ["-"]),
    ],
)
def test_where_the_command_begins(argv: list[str], command: list[str]) -> None:
    assert JobOptions("worker-svc start", "").parse(argv).command == command


@pytest.mark.parametrize(
    "argv",
    [
        ["start"],
        ["start", "--"],
        ["start", "--id"],
        ["start", "--bogus", "ls"],
        ["start", "--sep", "ls"],
        ["start", "--env", "NOT_THERE_AT_ALL", "ls"],
        ["start", "--label", "=v", "ls"],
        ["start", "--timeout", "soon", "ls"],
        ["start", "--timeout=-1", "ls"],
        ["start", "--stop-grace", "nan", "ls"],
        ["start", "--memory-max", "much", "ls"],
        ["start", "--cpus", "nan", "ls"],
        ["start", "--rlimit", "nofile", "ls"],
        ["start", "--rlimit", "bogus=1", "ls"],
        ["start", "--cpu-affinity", "3-1", "ls"],
        ["start", "--umask", "9", "ls"],
        ["start", "--nice", "low", "ls"],
        ["pause"],
        ["signal", "a"],
        ["stop"],
        ["query"],
        ["logs", "a", "--tail", "1", "--since-offset", "2"],
        ["logs", "a", "--tail", "-1"],
        ["list", "--state", "new"],
        ["list", "--limit", "x"],
        ["serve", "--no-such-key", "1"],
        ["nonsense"],
        [],
    ],
)
def test_wrong_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    usage_error(argv)
    assert capsys.readouterr().err.startswith("usage: ")


def test_a_command_that_is_nearly_right(capsys: pytest.CaptureFixture[str]) -> None:
    usage_error(["qurey"])
    assert "did you mean 'query'?" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["run", "--help"], ["serve", "--help"], ["--version"]])
def test_help(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 0
    assert "worker-svc" in capsys.readouterr().out


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


# --- against a worker


def test_start(
    fake_worker: FakeWorker, address: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("FROM_HERE", "here")
    stdin = tmp_path / "stdin"
    stdin.write_bytes(b"\x00in")
    options = ["--cwd", "/tmp", "--env", "A=b=c", "--env=FROM_HERE", "--timeout", "1.5", "--label", "k=v"]
    options += ["--id", "mine", "--stdin", str(stdin), "--separate-stderr", "--stop-signal", "INT"]
    assert main(["start", *options, "--stop-grace", "0", "sh", "-c", "exit"]) == 0
    assert capsys.readouterr() == ("mine\n", "")
    assert fake_worker.requests == [
        StartJobReq(
            command="sh",
            args=["-c", "exit"],
            env={"A": "b=c", "FROM_HERE": "here"},
            cwd="/tmp",
            stdin=b"\x00in",
            timeout=timedelta(seconds=1.5),
            stop_signal="INT",
            stop_grace=timedelta(0),
            labels={"k": "v"},
            separate_stderr=True,
            job_id="mine",
        )
    ]


def test_start_with_limits(fake_worker: FakeWorker, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--memory-max", "512M", "--swap-max", "0", "--cpus", "1.5", "--cpu-weight", "50", "--pids-max", "100"]
    options += ["--io-weight", "60", "--rlimit", "nofile=1024:4096", "--rlimit=core=0", "--nice", "-5"]
    options += ["--cpu-affinity", "0,2-3", "--umask", "027", "--oom-score-adj", "-1", "--user", "nobody"]
    options += ["--group", "adm", "--groups", "", "--new-privs", "--read-only", "/usr", "--read-only", "/etc"]
    options += ["--read-write", "/work", "--private-tmp", "--no-network", "--wait-for-tree"]
    assert main(["start", *options, "ls", "--nice"]) == 0
    assert fake_worker.requests == [
        StartJobReq(
            command="ls",
            args=["--nice"],
            limits=Limits(
                memory_max_bytes=512 * 2**20,
                swap_max_bytes=0,
                cpu_max_cores=1.5,
                cpu_weight=50,
                pids_max=100,
                io_weight=60,
                rlimits=[Rlimit(name="nofile", soft=1024, hard=4096), Rlimit(name="core", soft=0, hard=0)],
                nice=-5,
                cpu_affinity=[0, 2, 3],
                umask=0o27,
                oom_score_adj=-1,
            ),
            identity=Identity(user="nobody", group="adm", groups=Groups(), no_new_privs=False),
            sandbox=Sandbox(
                read_only_paths=["/usr", "/etc"], read_write_paths=["/work"], private_tmp=True, no_network=True
            ),
            leader_exit=LeaderExit(LeaderExit.WAIT),
        )
    ]


def test_pause_resume_and_signal(fake_worker: FakeWorker, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert [main(["pause", "a"]), main(["resume", "a"]), main(["signal", "a", "USR1"])] == [0, 0, 0]
    assert fake_worker.requests == [PauseJobReq("a"), ResumeJobReq("a"), SignalJobReq("a", "USR1")]
    assert capsys.readouterr() == ("", "")


def test_stdin_from_a_pipe(fake_worker: FakeWorker, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(b"piped\xff")))
    assert main(["start", "--stdin", "-", "cat"]) == 0
    assert fake_worker.requests[0].stdin == b"piped\xff"


def test_stdin_that_cannot_be(
    fake_worker: FakeWorker, address: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["start", "--stdin", str(tmp_path / "none"), "cat"]) == 1
    assert capsys.readouterr().err == f"worker-svc: start: --stdin: {tmp_path}/none: No such file or directory\n"
    large = tmp_path / "large"
    large.write_bytes(bytes(2**20 + 1))
    assert main(["run", "--stdin", str(large), "cat"]) == 1
    assert "at most 1048576 bytes" in capsys.readouterr().err
    assert fake_worker.requests == []


def test_errors_are_one_line(fake_worker: FakeWorker, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    fake_worker.refusal = GRPCError(Status.INVALID_ARGUMENT, "command: must not be empty")
    assert main(["start", ""]) == 1
    assert capsys.readouterr() == ("", "worker-svc: start: command: must not be empty\n")
    assert main(["run", ""]) == 125
    fake_worker.refusal = GRPCError(Status.PERMISSION_DENIED, "rule 3")
    assert main(["query", "a"]) == 1
    assert capsys.readouterr().err.endswith("worker-svc: query: rule 3\n")
    fake_worker.refusal = GRPCError(Status.ABORTED, "rule 3")
    assert main(["query", "a"]) == 1
    assert capsys.readouterr().err.endswith("worker-svc: query: the worker answered ABORTED: rule 3\n")


HOSTILE = "\x1b[2J\x9b31m\u202e\u2028\x7f\nworker-svc: forged"


def test_nothing_that_a_worker_says_reaches_the_terminal_raw(
    fake_worker: FakeWorker, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = JobSpec(command=HOSTILE, cwd=HOSTILE, env={HOSTILE: ""}, labels={HOSTILE: HOSTILE})
    job = finished(HOSTILE, Outcome.START_FAILED, error_text=HOSTILE, owner=HOSTILE, signal=HOSTILE, stuck=HOSTILE)
    job.spec = spec
    fake_worker.jobs.update(a=job, b=job)
    fake_worker.next_end = job
    for command in (["list"], ["list", "--json"], ["query", "a"], ["query", "a", "--json"], ["run", "true"]):
        assert main(command) in (0, 125)
    fake_worker.refusal = GRPCError(Status.INVALID_ARGUMENT, HOSTILE)
    for command in (["query", "a"], ["start", "a"], ["run", "a"], ["logs", "a"], ["list"], ["stop", "a"]):
        assert main(command) in (1, 125)
    with pytest.raises(SystemExit):
        main(["query", "a", HOSTILE])
    shown = capsys.readouterr()
    for text in (shown.out, shown.err):
        assert all(line.isprintable() for line in text.split("\n"))
        assert not any(line.startswith("worker-svc: forged") for line in text.split("\n"))


def test_no_worker(capsys: pytest.CaptureFixture[str]) -> None:
    # Port 1 is nobody's.
    assert main(["list", "--addr", "127.0.0.1:1"]) == 1
    first, *hints = capsys.readouterr().err.splitlines()
    assert first == "worker-svc: list: no connection to a worker at 127.0.0.1:1: Connection refused"
    assert hints[0].endswith(" serve --grpc-server-addr 127.0.0.1:1")
    assert main(["run", "--addr", "127.0.0.1:1", "true"]) == 125
    assert main(["list", "--addr", "nonsense"]) == 2


def test_query(fake_worker: FakeWorker, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    fake_worker.jobs["a"] = finished("a", Outcome.FAILED, exit_code=3, error_text="exit status 3")
    assert main(["query", "a"]) == 0
    assert "status:        failed: exit status 3\n" in capsys.readouterr().out
    assert main(["query", "a", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["exit_code"] == 3
    assert main(["query", "b"]) == 1
    assert capsys.readouterr().err == "worker-svc: query: job not found\n"


def test_list_of_paused_jobs(fake_worker: FakeWorker, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    running = JobState(JobState.RUNNING)
    fake_worker.jobs = {name: Job(job_id=name, state=running, paused=name in "bd") for name in "abcd"}
    assert main(["list", "--state", "paused", "--limit", "1"]) == 0
    out, err = capsys.readouterr()
    assert [line[0] for line in out.splitlines()] == ["I", "b"]
    assert "--limit 10" in err
    assert fake_worker.took(ListJobsReq)[-1].states == [JobState.RUNNING]
    assert main(["list", "--state", "paused", "--state", "running"]) == 0
    assert [line[0] for line in capsys.readouterr().out.splitlines()] == ["I", "a", "b", "c", "d"]
    fake_worker.jobs["e"] = finished("e", Outcome.SUCCEEDED)
    assert main(["list", "--state", "paused", "--state", "finished"]) == 0
    assert [line[0] for line in capsys.readouterr().out.splitlines()] == ["I", "b", "d", "e"]


def test_list(fake_worker: FakeWorker, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    assert capsys.readouterr() == ("", "no jobs\n")
    fake_worker.jobs = {name: finished(name, Outcome.SUCCEEDED, exit_code=0) for name in "abcde"}
    assert main(["list", "--state", "finished", "--state", "RUNNING", "--label", "k=v", "--limit", "3"]) == 0
    out, err = capsys.readouterr()
    assert [line[0] for line in out.splitlines()] == ["I", "a", "b", "c"]
    assert "--limit 30" in err
    request = fake_worker.took(ListJobsReq)[-1]
    assert request.states == [JobState.FINISHED, JobState.RUNNING]
    assert request.labels == {"k": "v"}
    assert main(["list", "--limit", "0", "--json"]) == 0
    out, err = capsys.readouterr()
    assert [json.loads(line)["job_id"] for line in out.splitlines()] == list("abcde")
    assert err == ""


def test_stop(fake_worker: FakeWorker, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    fake_worker.jobs["a"] = Job(job_id="a", state=JobState(JobState.RUNNING))
    assert main(["stop", "a", "--wait", "--signal", "SIGKILL", "--grace", "2"]) == 0
    assert capsys.readouterr().out == "stopped: signal: killed\n"
    assert fake_worker.took(StopJobReq) == [StopJobReq("a", "SIGKILL", timedelta(seconds=2), wait=True)]
    assert main(["stop", "a"]) == 0
    assert capsys.readouterr().out == ""


def test_logs(fake_worker: FakeWorker, address: str, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    fake_worker.jobs["a"] = finished("a", Outcome.SUCCEEDED)
    fake_worker.chunks[MERGED] = chunks(4096, b"\x00\xff", b"no newline")
    assert main(["logs", "a", "-f"]) == 0
    out, err = capfdbinary.readouterr()
    assert out == b"\x00\xffno newline"
    assert err == b"worker-svc: logs: bytes 0 to 4095 are gone (4.0 KiB)\n"
    assert main(["logs", "a", "--tail", "5", "--stderr"]) == 0
    assert main(["logs", "a", "--since-offset", "7"]) == 0
    stream = OutputStream(OutputStream.STDERR)
    assert fake_worker.took(StreamJobReq) == [
        StreamJobReq("a", follow=True),
        StreamJobReq("a", stream=stream, tail_lines=5),
        StreamJobReq("a", offset=7),
    ]


def test_run(fake_worker: FakeWorker, address: str, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    fake_worker.next_end = finished("", Outcome.FAILED, exit_code=3, error_text="exit status 3")
    fake_worker.chunks[MERGED] = chunks(b"\x00\xff", b"both")
    assert main(["run", "sh", "-c", "exit 3"]) == 3
    assert capfdbinary.readouterr() == (b"\x00\xffboth", b"")


def test_run_with_separate_stderr(
    fake_worker: FakeWorker, address: str, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    fake_worker.next_end = finished("", Outcome.SIGNALED, signal="SIGKILL", error_text="signal: killed")
    fake_worker.chunks[STDOUT] = chunks(b"out")
    fake_worker.chunks[STDERR] = chunks(b"err\n")
    assert main(["run", "--separate-stderr", "x"]) == 137
    out, err = capfdbinary.readouterr()
    assert out == b"out"
    assert err == b"err\nworker-svc: run: job assigned signaled: killed\n"


# --- as a process: signals and pipes


def spawn(*arguments: str) -> subprocess.Popen[bytes]:
    # pytest may have been started with SIGINT ignored, which children inherit.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "worker_svc", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    finally:
        signal.signal(signal.SIGINT, before)


def eventually(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_ctrl_c_in_run_asks_the_job_to_stop(fake_worker: FakeWorker, address: str) -> None:
    with spawn("run", "sleep", "99") as process:
        eventually(lambda: fake_worker.open_streams == 1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 143
    assert fake_worker.took(StopJobReq) == [StopJobReq("assigned")]
    assert err.decode().splitlines()[-1] == "worker-svc: run: job assigned stopped: signal: terminated"


def test_a_second_ctrl_c_kills_it(fake_worker: FakeWorker, address: str) -> None:
    with spawn("run", "--id", "stubborn", "sleep", "99") as process:
        eventually(lambda: fake_worker.open_streams == 1)
        process.send_signal(signal.SIGINT)
        eventually(lambda: len(fake_worker.took(StopJobReq)) == 1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 137
    assert fake_worker.took(StopJobReq) == [
        StopJobReq("stubborn"),
        StopJobReq("stubborn", "SIGKILL", timedelta(0)),
    ]
    assert b"Ctrl-C again kills it" in err


def test_ctrl_c_in_logs_leaves_the_job_alone(fake_worker: FakeWorker, address: str) -> None:
    fake_worker.next_end = None
    assert main(["start", "--id", "a", "x"]) == 0
    with spawn("logs", "-f", "a") as process:
        eventually(lambda: fake_worker.open_streams == 1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, b"", b"")
    assert fake_worker.took(StopJobReq) == []


def test_a_pipe_that_nobody_reads(fake_worker: FakeWorker, address: str) -> None:
    fake_worker.jobs["a"] = finished("a", Outcome.SUCCEEDED)
    fake_worker.chunks[MERGED] = chunks(*[b"x" * 65536] * 8)
    with spawn("logs", "a") as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait(20) == 141


def test_run_into_a_pipe_that_nobody_reads_stops_the_job(fake_worker: FakeWorker, address: str) -> None:
    fake_worker.chunks[MERGED] = chunks(*[b"x" * 65536] * 8)
    with spawn("run", "yes") as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.wait(20) == 141
    assert fake_worker.took(StopJobReq) == [StopJobReq("assigned")]


# --- serve, check-config, demo


def test_serve_gets_its_flags(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from worker_svc import app

    served: list[Config] = []

    def serve(config: Config, config_file: Path, *, file_is_named: bool) -> int:
        assert (str(config_file), file_is_named) == ("w.toml", True)
        served.append(config)
        return 7

    monkeypatch.setattr(app, "serve", serve)
    monkeypatch.setenv("WORKER_SVC_ADDR", "127.0.0.1:9")
    (elsewhere / "w.toml").write_text("[jobs]\nslots = 2\nqueue_length = 3\n")
    flags = ["--jobs-slots", "5", "--grpc-server-use-tls", "--scheduler-addr", ""]
    assert main(["serve", "--config", "w.toml", *flags]) == 7
    [config] = served
    assert (config.jobs.slots, config.jobs.queue_length) == (5, 3)
    assert config.grpc_server.use_tls
    assert config.scheduler.addr is None


def test_check_config(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-config"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("OK: no file")
    (elsewhere / "worker.toml").write_text("[jobs]\nslots = 2\n")
    assert main(["check-config"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("OK: worker.toml\n\n[grpc_server]\n")
    assert any(line.split() == ["slots", "=", "2", "#", "worker.toml:2"] for line in out.splitlines())


@pytest.mark.parametrize("command", ["check-config", "serve"])
def test_a_bad_configuration(elsewhere: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    (elsewhere / "bad.toml").write_text("[jobs]\nslots = -1\nslotz = 2\n")
    assert main([command, "--config", "bad.toml"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    first, second, last = err.splitlines()
    assert first.startswith("bad.toml:2: jobs.slots: ")
    assert second.startswith("bad.toml:3: jobs.slotz: ")
    assert last == f"worker-svc: {command}: 2 problems in the configuration"


def test_the_demo_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["demo"]) == 1
    assert capsys.readouterr().err.startswith("worker-svc: demo: bash is missing: ")


def test_a_demo_that_fails_shows_the_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho the reason; exit 4\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    assert main(["demo"]) == 1
    out = capsys.readouterr().out
    assert "✗ the worker ended with exit status 4 before it registered" in out
    assert "the worker's log:\n   the reason\n" in out
    assert "All went as it should" not in out


def test_moments_are_shown_in_local_time() -> None:
    moment = datetime(2026, 11, 24, 6, 0, tzinfo=UTC)
    [line] = [line for line in job_block(Job(job_id="a", accepted_at=moment), now=moment) if "accepted" in line]
    assert f"{moment.astimezone():%Y-%m-%d %H:%M:%S}" in line
