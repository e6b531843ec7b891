"""The commands, against a fake worker."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from tests.support.fake_worker import (
    MERGED,
    STDERR,
    STDOUT,
    FakeWorker,
    chunks,
    finished,
)
from worker_svc.cli import main
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

# --- against a worker


def test_start(
    fake_worker: FakeWorker, fake_address: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
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


def test_start_with_limits(fake_worker: FakeWorker, fake_address: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--memory-max", "512M", "--swap-max", "0", "--cpus", "1.5", "--cpu-weight", "50", "--pids-max", "100"]
    options += [
        "--io-weight",
        "60",
        "--memory-high",
        "512M",
        "--rlimit",
        "nofile=1024:4096",
        "--rlimit=core=0",
        "--nice",
        "-5",
    ]
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
                memory_high_bytes=2**29,
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


def test_pause_resume_and_signal(
    fake_worker: FakeWorker, fake_address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [main(["pause", "a"]), main(["resume", "a"]), main(["signal", "a", "USR1"])] == [0, 0, 0]
    assert fake_worker.requests == [PauseJobReq("a"), ResumeJobReq("a"), SignalJobReq("a", "USR1")]
    assert capsys.readouterr() == ("", "")


def test_stdin_from_a_pipe(fake_worker: FakeWorker, fake_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(b"piped\xff")))
    assert main(["start", "--stdin", "-", "cat"]) == 0
    assert fake_worker.requests[0].stdin == b"piped\xff"


def test_stdin_that_cannot_be(
    fake_worker: FakeWorker, fake_address: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["start", "--stdin", str(tmp_path / "none"), "cat"]) == 1
    assert capsys.readouterr().err == f"worker-svc: start: --stdin: {tmp_path}/none: No such file or directory\n"
    large = tmp_path / "large"
    large.write_bytes(bytes(2**20 + 1))
    assert main(["run", "--stdin", str(large), "cat"]) == 1
    assert "at most 1048576 bytes" in capsys.readouterr().err
    assert fake_worker.requests == []


def test_errors_are_one_line(fake_worker: FakeWorker, fake_address: str, capsys: pytest.CaptureFixture[str]) -> None:
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
    fake_worker: FakeWorker, fake_address: str, capsys: pytest.CaptureFixture[str]
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


def test_query(fake_worker: FakeWorker, fake_address: str, capsys: pytest.CaptureFixture[str]) -> None:
    fake_worker.jobs["a"] = finished("a", Outcome.FAILED, exit_code=3, error_text="exit status 3")
    assert main(["query", "a"]) == 0
    assert "status:        failed: exit status 3\n" in capsys.readouterr().out
    assert main(["query", "a", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["exit_code"] == 3
    assert main(["query", "b"]) == 1
    assert capsys.readouterr().err == "worker-svc: query: job not found\n"


def test_list_of_paused_jobs(fake_worker: FakeWorker, fake_address: str, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_list(fake_worker: FakeWorker, fake_address: str, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_stop(fake_worker: FakeWorker, fake_address: str, capsys: pytest.CaptureFixture[str]) -> None:
    fake_worker.jobs["a"] = Job(job_id="a", state=JobState(JobState.RUNNING))
    assert main(["stop", "a", "--wait", "--signal", "SIGKILL", "--grace", "2"]) == 0
    assert capsys.readouterr().out == "stopped: signal: killed\n"
    assert fake_worker.took(StopJobReq) == [StopJobReq("a", "SIGKILL", timedelta(seconds=2), wait=True)]
    assert main(["stop", "a"]) == 0
    assert capsys.readouterr().out == ""


def test_logs(fake_worker: FakeWorker, fake_address: str, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
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


def test_run(fake_worker: FakeWorker, fake_address: str, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    fake_worker.next_end = finished("", Outcome.FAILED, exit_code=3, error_text="exit status 3")
    fake_worker.chunks[MERGED] = chunks(b"\x00\xff", b"both")
    assert main(["run", "sh", "-c", "exit 3"]) == 3
    assert capfdbinary.readouterr() == (b"\x00\xffboth", b"")


def test_run_with_separate_stderr(
    fake_worker: FakeWorker, fake_address: str, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    fake_worker.next_end = finished("", Outcome.SIGNALED, signal="SIGKILL", error_text="signal: killed")
    fake_worker.chunks[STDOUT] = chunks(b"out")
    fake_worker.chunks[STDERR] = chunks(b"err\n")
    assert main(["run", "--separate-stderr", "x"]) == 137
    out, err = capfdbinary.readouterr()
    assert out == b"out"
    assert err == b"err\nworker-svc: run: job assigned signaled: killed\n"
