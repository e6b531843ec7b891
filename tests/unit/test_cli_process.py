"""The command line as a process: signals and pipes; and what needs no worker."""

from __future__ import annotations

import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.support.fake_worker import (
    MERGED,
    FakeWorker,
    chunks,
    finished,
)
from tests.support.waiting import PATIENCE_S, eventually_sync
from worker_svc.cli import main
from worker_svc.cli.render import (
    job_block,
)
from worker_svc.config import Config
from worker_svc.pb.jobscheduler import (
    Job,
    Outcome,
    StopJobReq,
)

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


def test_ctrl_c_in_run_asks_the_job_to_stop(fake_worker: FakeWorker, fake_address: str) -> None:
    with spawn("run", "sleep", "99") as process:
        eventually_sync(lambda: fake_worker.open_streams == 1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 143
    assert fake_worker.took(StopJobReq) == [StopJobReq("assigned")]
    assert err.decode().splitlines()[-1] == "worker-svc: run: job assigned stopped: signal: terminated"


def test_a_second_ctrl_c_kills_it(fake_worker: FakeWorker, fake_address: str) -> None:
    with spawn("run", "--id", "stubborn", "sleep", "99") as process:
        eventually_sync(lambda: fake_worker.open_streams == 1)
        process.send_signal(signal.SIGINT)
        eventually_sync(lambda: len(fake_worker.took(StopJobReq)) == 1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 137
    assert fake_worker.took(StopJobReq) == [
        StopJobReq("stubborn"),
        StopJobReq("stubborn", "SIGKILL", timedelta(0)),
    ]
    assert b"Ctrl-C again kills it" in err


def test_ctrl_c_in_logs_leaves_the_job_alone(fake_worker: FakeWorker, fake_address: str) -> None:
    fake_worker.next_end = None
    assert main(["start", "--id", "a", "x"]) == 0
    with spawn("logs", "-f", "a") as process:
        eventually_sync(lambda: fake_worker.open_streams == 1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out, err) == (130, b"", b"")
    assert fake_worker.took(StopJobReq) == []


def test_a_pipe_that_nobody_reads(fake_worker: FakeWorker, fake_address: str) -> None:
    fake_worker.jobs["a"] = finished("a", Outcome.SUCCEEDED)
    fake_worker.chunks[MERGED] = chunks(*[b"x" * 65536] * 8)
    with spawn("logs", "a") as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait(20) == 141


def test_run_into_a_pipe_that_nobody_reads_stops_the_job(fake_worker: FakeWorker, fake_address: str) -> None:
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
