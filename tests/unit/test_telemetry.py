"""The log: each transition as one line, exactly once and in order, across deaths at any point; and no secrets in it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from worker_svc.config import LogConfig
from worker_svc.job import JobSpec, JobState, Outcome, Transition
from worker_svc.masking import MASK
from worker_svc.telemetry import TransitionLog, audit_log, fields_of, set_up_log

ME, OTHER = "aaaa1111bbbb2222", "cccc3333dddd4444"


@pytest.fixture(autouse=True)
def _plain_logging() -> Iterator[None]:
    """set_up_log takes over the root logger, as it should in a process of its own."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


class Run:
    """One life of a worker, as far as its log goes."""

    def __init__(self, folder: Path, worker_id: str = ME, log_format: Literal["json", "console"] = "json") -> None:
        self.path = folder / "worker.log"
        self.log, self.fd = set_up_log(LogConfig(file=self.path, format=log_format))
        self.recorded: list[Transition] = []
        self.transitions = TransitionLog(self.log, self.fd, folder / worker_id, worker_id, self.read)

    def read(self, after_sequence: int, limit: int) -> list[Transition]:
        return [moved for moved in self.recorded if moved.sequence > after_sequence][:limit]

    def __enter__(self) -> TransitionLog:
        return self.transitions

    def __exit__(self, *_: object) -> None:
        self.transitions.close()
        os.close(self.fd)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for worker_id in (ME, OTHER):
        (tmp_path / worker_id).mkdir()
    return tmp_path


def moves(first: int, last: int, job_id: str = "j") -> list[Transition]:
    return [Transition(number, job_id, number, JobState.NEW, JobState.QUEUED) for number in range(first, last + 1)]


def logged(folder: Path, worker_id: str = ME) -> list[int]:
    """The sequence numbers in the log, in the order they stand there; lines that are no JSON left out."""
    found = []
    for text in (folder / "worker.log").read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if line["event"] == "job.transition" and line["worker"] == worker_id:
            found.append(line["sequence"])
    return found


def cut(folder: Path, size: int) -> None:
    """The log as it was `size` bytes before its end."""
    path = folder / "worker.log"
    os.truncate(path, path.stat().st_size - size)


def lose_cursor(folder: Path, to_sequence: int = 0) -> None:
    """The cursor as it was at `to_sequence`: what a kill between line and note leaves."""
    path = folder / ME / "worker.cursor"
    content = path.read_bytes()
    path.write_bytes(to_sequence.to_bytes(8, "little") + content[8:])


def test_exactly_once_across_restarts(folder: Path) -> None:
    for last in (3, 5, 5, 9):
        with Run(folder) as log:
            log.write(moves(1, last))
    assert logged(folder) == list(range(1, 10))


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_killed_between_line_and_note(folder: Path, at: int) -> None:
    """The file itself has the last word."""
    with Run(folder) as log:
        log.write(moves(1, 3))
    lose_cursor(folder, at)
    with Run(folder) as log:
        assert log.sequence == 3
        log.write(moves(1, 4))
    assert logged(folder) == [1, 2, 3, 4]


def test_a_line_cut_short_is_written_again_whole(folder: Path) -> None:
    with Run(folder) as log:
        log.write(moves(1, 3))
    size = len((folder / "worker.log").read_bytes().splitlines()[-1])
    for cut_off in range(1, size + 1):
        cut(folder, cut_off)
        lose_cursor(folder, 2)
        with Run(folder) as log:
            # Where only the line feed is missing, the line was written.
            assert log.sequence == (3 if cut_off == 1 else 2), f"{cut_off} bytes cut off"
            log.write(moves(1, 3))
        lines = (folder / "worker.log").read_bytes().splitlines()
        assert json.loads(lines[-1])["sequence"] == 3
        assert logged(folder) == [1, 2, 3]


def test_a_cut_line_on_console_is_not_taken_for_a_smaller_number(folder: Path) -> None:
    with Run(folder, log_format="console") as log:
        log.write(moves(1, 123))
    text = (folder / "worker.log").read_bytes()
    end = text.rindex(b"sequence=12") + len(b"sequence=12")
    (folder / "worker.log").write_bytes(text[:end])
    lose_cursor(folder)
    for _ in range(2):  # the first one ends the line; it must not count as whole for the second
        with Run(folder, log_format="console") as log:
            assert log.sequence == 122


def test_more_than_the_tail_since_the_last_transition(folder: Path) -> None:
    with Run(folder) as log:
        log.write(moves(1, 3))
    with (folder / "worker.log").open("ab") as file:
        file.write(b'{"event":"noise","worker":"x"}\n' * 20_000)
    with Run(folder) as log:
        assert log.sequence == 3


def test_a_rotated_log(folder: Path) -> None:
    with Run(folder) as log:
        log.write(moves(1, 3))
    (folder / "worker.log").rename(folder / "worker.log.1")
    with Run(folder) as log:
        log.write(moves(1, 5))
    assert logged(folder) == [4, 5]


def test_lines_of_another_worker_do_not_count(folder: Path) -> None:
    with Run(folder) as log:
        log.write(moves(1, 3))
    with Run(folder, OTHER) as log:
        log.write(moves(1, 7))
    lose_cursor(folder)
    with Run(folder) as log:
        assert log.sequence == 3
        log.write(moves(1, 4))
    assert logged(folder) == [1, 2, 3, 4]
    assert logged(folder, OTHER) == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_lines_of_another_worker_that_name_this_one_do_not_count(
    folder: Path, log_format: Literal["json", "console"]
) -> None:
    with Run(folder, log_format=log_format) as log:
        log.write(moves(1, 3))
    with Run(folder, OTHER, log_format) as log:
        log.write(moves(1, 7, job_id=f"job.transition-{ME}"))
    with Run(folder, log_format=log_format) as log:
        assert log.sequence == 3


def test_console_lines_are_understood_too(folder: Path) -> None:
    with Run(folder, log_format="console") as log:
        log.write(moves(1, 12))
    lose_cursor(folder)
    with Run(folder, log_format="console") as log:
        assert log.sequence == 12


def test_the_cursor_of_another_store_does_not_count(folder: Path) -> None:
    """The operator removed the store to begin anew, and left the cursor: the new store's transitions are logged."""
    with Run(folder) as log:
        log.write(moves(1, 500))
    (folder / OTHER / "worker.cursor").write_bytes((folder / ME / "worker.cursor").read_bytes())
    with Run(folder, OTHER) as log:
        assert log.sequence == 0
        log.write(moves(1, 2))
    assert logged(folder, OTHER) == [1, 2]


def test_a_transition_is_one_whole_line(folder: Path) -> None:
    moved = Transition(
        sequence=7,
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
    with Run(folder) as log:
        log.write([moved])
    line: dict[str, Any] = json.loads((folder / "worker.log").read_text())
    assert list(line)[:3] == ["timestamp", "level", "event"]
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "level": "info",
        "event": "job.transition",
        "worker": ME,
        "sequence": 7,
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


def test_a_line_feed_in_a_reason_makes_no_second_line(folder: Path) -> None:
    moved = Transition(1, "j", 5, JobState.STARTING, JobState.FINISHED, reason='command: "a\nb" \udcff was not found')
    with Run(folder) as log:
        log.write([moved])
    assert len((folder / "worker.log").read_bytes().splitlines()) == 1
    assert logged(folder) == [1]


def test_a_spec_in_the_log_tells_no_secret(folder: Path) -> None:
    spec = JobSpec("run", path="secret", args=("--token=secret",), env={"PASSWORD": "secret"})
    run = Run(folder)
    with run:
        run.log.info("something", error=ValueError("x", spec), spec=spec, specs=[spec])
        run.log.info("something", error=ValueError("TOKEN=secret"))
        run.log.error("failed", exc_info=_raised_beside(spec))
    text = (folder / "worker.log").read_text()
    assert "PASSWORD" in text
    assert "secret" not in text


def _raised_beside(spec: JobSpec) -> Exception:
    try:
        raise RuntimeError(f"about {spec}")
    except RuntimeError as error:
        return error


def test_what_libraries_log_is_in_our_log(folder: Path) -> None:
    with Run(folder):
        logging.getLogger("grpclib").warning("trouble: %s", "x")
        logging.getLogger("grpclib").debug("noise")
    (line,) = [json.loads(text) for text in (folder / "worker.log").read_text().splitlines()]
    assert (line["event"], line["level"], line["logger"], line["message"]) == (
        "library.log", "warning", "grpclib", "trouble: x",
    )  # fmt: skip


def test_no_level_leaves_out_the_audit(tmp_path: Path) -> None:
    log, fd = set_up_log(LogConfig(file=tmp_path / "log", format="json", level="error"))
    log.warning("audit", token="x=y")
    audit_log(log).info("audit", reason="TOKEN=x")
    os.close(fd)
    [line] = [json.loads(text) for text in (tmp_path / "log").read_text().splitlines()]
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


def test_a_log_that_cannot_be_written_is_caught_up_with(folder: Path) -> None:
    run = Run(folder)
    with run as transitions:
        run.recorded = moves(1, 6)
        assert transitions.write(run.recorded[:2])
        real = os.dup(run.fd)
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, run.fd)
        os.close(full)
        assert not transitions.write(run.recorded[2:4])
        assert not transitions.catch_up()
        run.log.info("an ordinary line is let go")
        os.dup2(real, run.fd)
        os.close(real)
        assert transitions.sequence == 2
        assert transitions.write(run.recorded[4:5])
        assert transitions.catch_up()
    assert logged(folder) == [1, 2, 3, 4, 5, 6]


def test_a_named_tuple_does_not_get_past_its_repr(folder: Path) -> None:
    run = Run(folder)
    with run:
        run.log.info("spec", spec=JobSpec("sh", env={"TOKEN": "hunter2"}))
    assert "hunter2" not in run.path.read_text()
