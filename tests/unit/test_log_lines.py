"""The lines of the log."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.telemetry import ME, logged, moves, run
from worker_svc.config import LogConfig
from worker_svc.job import JobSpec, JobState, Outcome, Transition
from worker_svc.masking import MASK
from worker_svc.telemetry import Log, fields_of, set_up_log

pytestmark = pytest.mark.usefixtures("plain_logging")


@contextmanager
def opened(folder: Path, **config: Any) -> Iterator[Log]:
    log = set_up_log(LogConfig(file=folder / "worker.log", **{"format": "json", **config}))
    try:
        yield log
    finally:
        log.close()


async def test_a_transition_is_one_whole_line(log_folder: Path) -> None:
    moved = Transition(
        sequence=1,
        job_id="j",
        at_ns=5,
        from_state=JobState.STOPPING,
        to_state=JobState.FINISHED,
        pid=123,
        outcome=Outcome.STOPPED,
        exit_code=None,
        signal=15,
        reason="signal: terminated",
        queued_ns=None,
        wall_ns=1_500_000_000,
        cpu_ns=2_000,
    )
    async with run(log_folder, recorded=[moved]):
        pass
    line: dict[str, Any] = json.loads((log_folder / "worker.log").read_text())
    assert list(line)[:3] == ["timestamp", "level", "event"]
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "level": "info",
        "event": "job.transition",
        "worker": ME,
        "sequence": 1,
        "job_id": "j",
        "from_state": "STOPPING",
        "to_state": "FINISHED",
        "at_ns": 5,
        "pid": 123,
        "outcome": "STOPPED",
        "signal": "SIGTERM",
        "reason": "signal: terminated",
        "wall_s": 1.5,
        "cpu_s": 0.000002,
    }


def test_exit_status_zero_is_logged() -> None:
    moved = Transition(1, "j", 5, JobState.RUNNING, JobState.FINISHED, 1, Outcome.SUCCEEDED, 0, None, "", 0, 0, 0)
    assert fields_of(moved) == {
        "sequence": 1,
        "job_id": "j",
        "from_state": "RUNNING",
        "to_state": "FINISHED",
        "at_ns": 5,
        "pid": 1,
        "outcome": "SUCCEEDED",
        "exit_code": 0,
        "queued_s": 0.0,
        "wall_s": 0.0,
        "cpu_s": 0.0,
    }


def test_what_does_not_apply_is_not_in_the_line() -> None:
    assert set(fields_of(moves(1, 1)[0])) == {"sequence", "job_id", "from_state", "to_state", "at_ns"}


async def test_a_line_feed_in_a_reason_makes_no_second_line(log_folder: Path) -> None:
    moved = Transition(1, "j", 5, JobState.STARTING, JobState.FINISHED, reason='command: "a\nb" \udcff was not found')
    async with run(log_folder, recorded=[moved]):
        pass
    assert len((log_folder / "worker.log").read_bytes().splitlines()) == 1
    assert logged(log_folder) == [1]


def test_a_spec_in_the_log_tells_no_secret(log_folder: Path) -> None:
    spec = JobSpec("run", path="secret", args=("--token=secret",), env={"PASSWORD": "secret"})
    with opened(log_folder) as log:
        log.events.info("something", error=ValueError("x", spec), spec=spec, specs=[spec])
        log.events.info("something", error=ValueError("TOKEN=secret"))
        log.events.error("failed", exc_info=_raised_beside(spec))
    text = (log_folder / "worker.log").read_text()
    assert "PASSWORD" in text
    assert "secret" not in text


def _raised_beside(spec: JobSpec) -> Exception:
    try:
        raise RuntimeError(f"about {spec}")
    except RuntimeError as error:
        return error


def test_what_libraries_log_is_in_our_log(log_folder: Path) -> None:
    with opened(log_folder):
        logging.getLogger("grpclib").warning("trouble: %s", "x")
        logging.getLogger("grpclib").debug("noise")
    (line,) = [json.loads(text) for text in (log_folder / "worker.log").read_text().splitlines()]
    assert (line["event"], line["level"], line["logger"], line["message"]) == (
        "library.log", "warning", "grpclib", "trouble: x",
    )  # fmt: skip


def test_no_level_leaves_out_the_audit(log_folder: Path) -> None:
    with opened(log_folder, level="error") as log:
        log.events.warning("audit", token="x=y")
        log.audit.allowed(reason="TOKEN=x")
    [line] = [json.loads(text) for text in (log_folder / "worker.log").read_text().splitlines()]
    assert (line["event"], line["level"], line["reason"]) == ("audit", "info", f"TOKEN={MASK}")


def test_a_log_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"worker\.log"):
        set_up_log(LogConfig(file=tmp_path / "missing" / "worker.log"))


def test_a_log_that_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("precious\n")
    (tmp_path / "log").symlink_to("other")
    with pytest.raises(OSError, match="is a symbolic link: name the file itself"):
        set_up_log(LogConfig(file=tmp_path / "log"))
    assert (tmp_path / "other").read_text() == "precious\n"


def test_a_named_tuple_does_not_get_past_its_repr(log_folder: Path) -> None:
    with opened(log_folder) as log:
        log.events.info("spec", spec=JobSpec("sh", env={"TOKEN": "hunter2"}))
    assert "hunter2" not in (log_folder / "worker.log").read_text()


HOSTILE = (
    "\x1b]0;owned\x07\x1b[2J\x7f\x9b31m\u202eabc\u2066\u200b\ufeff"
    " a\nb\rc\x85d\u2028e\u2029f\x0bg\x0ch\udcff\U000e0001\0"
)


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_no_text_reaches_a_line_raw(log_folder: Path, log_format: str) -> None:
    error = ValueError(f"{HOSTILE}\n2026-01-01T00:00:00Z [info     ] forged")
    with opened(log_folder, format=log_format) as log:
        log.events.info("plain", reason=HOSTILE, short=HOSTILE.replace(" ", ""), table={"k": HOSTILE}, rows=[HOSTILE])
        log.events.info("key", identity=HOSTILE)
        logging.getLogger("library").error("said %s", HOSTILE)
        if log_format == "console":
            log.events.error("failed", exc_info=error)
    text = (log_folder / "worker.log").read_bytes().decode()
    lines = text.removesuffix("\n").split("\n")
    assert all(line.isprintable() for line in lines), text
    assert len(lines) == 3 or all(line.startswith(("    ", "202")) and "] forged" not in line[:40] for line in lines)
    if log_format == "json":
        plain, *_ = map(json.loads, lines)
        assert plain["reason"] == HOSTILE


def test_what_the_interpreter_cannot_raise_is_in_our_log(log_folder: Path) -> None:
    class Ending:
        def __del__(self) -> None:
            raise ValueError("at the end")

    with opened(log_folder) as log:
        Ending()
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("old", DeprecationWarning, stacklevel=1)
    del log
    lines = [json.loads(text) for text in (log_folder / "worker.log").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["library.unraisable", "library.log"]
    assert "at the end" in lines[0]["exception"]
