"""The supervisor's own log: it never holds up what holds all jobs, and tells what it could not tell."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.support import programs
from tests.support.workers import SupervisorProcess, Worker
from worker_svc.job import Outcome
from worker_svc.supervisor import journal


@pytest.fixture
def standard_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Another file in its place; its path."""
    monkeypatch.setattr(journal, "_lost_lines", 0)
    monkeypatch.setattr(journal, "_is_cut", False)
    return tmp_path / "log"


def test_a_fifo_that_nobody_reads(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    os.mkfifo(tmp_path / "state" / "supervisor.log", 0o600)
    with SupervisorProcess(tmp_path / "state") as supervisor:
        assert supervisor.finish("j", programs.TRUE).outcome is Outcome.SUCCEEDED


def test_a_worker_beside_a_fifo_that_nobody_reads(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    os.mkfifo(tmp_path / "state" / "supervisor.log", 0o600)
    with Worker(tmp_path) as worker:
        assert worker.log_events("supervisor.started")


def test_what_was_not_written_is_counted(standard_error: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with capfd.disabled():
        kept = os.dup(2)
        try:
            for path in ("/dev/full", str(standard_error)):
                fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
                os.dup2(fd, 2)
                os.close(fd)
                for text in ("first", "\x7f\x9b\u202e"):
                    journal.note("said", text=text)
        finally:
            os.dup2(kept, 2)
            os.close(kept)
    text = standard_error.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line.get("lost_lines") for line in lines] == [2, None]
    assert text.replace("\n", "").isprintable()
