"""The log: each transition as one line, once and in order, across deaths at any point; what a line looks like; and no
secrets in it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import warnings
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.support.waiting import eventually
from worker_svc.config import LogConfig
from worker_svc.job import JobSpec, JobState, Outcome, Transition
from worker_svc.masking import MASK
from worker_svc.telemetry import Log, TransitionLog, fields_of, set_up_log
from worker_svc.telemetry.cursor import Cursor, Place

ME, OTHER = "aaaa1111bbbb2222", "cccc3333dddd4444"


@pytest.fixture(autouse=True)
def _plain_logging() -> Iterator[None]:
    """set_up_log takes over the root logger, as it should in a process of its own."""
    root, hook = logging.getLogger(), sys.unraisablehook
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)
    sys.unraisablehook = hook


class Run:
    """One life of a worker, as far as its log goes."""

    def __init__(self, log: Log, transitions: TransitionLog) -> None:
        self.log = log
        self.transitions = transitions

    async def write(self, batch: Sequence[Transition]) -> None:
        self.transitions.add(batch)
        await eventually(lambda: self.transitions.sequence >= batch[-1].sequence)


@asynccontextmanager
async def run(
    folder: Path,
    worker_id: str = ME,
    log_format: Literal["json", "console"] = "json",
    *,
    recorded: Sequence[Transition] = (),
    level: Literal["info", "error"] = "info",
) -> AsyncIterator[Run]:
    """`recorded`: what the store has when it starts."""

    def read(after: int, limit: int) -> list[Transition]:
        return [moved for moved in recorded if moved.sequence > after][:limit]

    log = set_up_log(LogConfig(file=folder / "worker.log", format=log_format, level=level))
    latest = recorded[-1].sequence if recorded else 0
    transitions = log.transitions(folder / worker_id, worker_id, read, latest)
    task = asyncio.create_task(transitions.run())
    try:
        await eventually(lambda: transitions.sequence >= latest)
        yield Run(log, transitions)
    finally:
        task.cancel()
        log.close()


@contextmanager
def opened(folder: Path, **config: Any) -> Iterator[Log]:
    log = set_up_log(LogConfig(file=folder / "worker.log", **{"format": "json", **config}))
    try:
        yield log
    finally:
        log.close()


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


def killed_while_writing(folder: Path, before: int, lines: Sequence[bytes], size: int) -> None:
    """What is left when the worker is killed with `size` bytes of `lines` written, after transition `before`."""
    path = folder / "worker.log"
    found = path.stat()
    cursor = Cursor(folder / ME, ME)
    cursor.sequence = before
    cursor.ahead(Place(found.st_dev, found.st_ino, found.st_size), lines)
    cursor.close()
    with path.open("ab") as file:
        file.write(b"".join(lines)[:size])


async def test_once_across_restarts(folder: Path) -> None:
    for last in (3, 5, 5, 9):
        async with run(folder, recorded=moves(1, last)):
            pass
    assert logged(folder) == list(range(1, 10))


@pytest.mark.parametrize("since", ["", '\n{"event":"noise"}\n' * 20])
async def test_killed_at_any_byte_of_a_batch(folder: Path, since: str) -> None:
    """`since`: lines of a start that failed, or of another worker."""
    async with run(folder, recorded=moves(1, 2)):
        pass
    path = folder / "worker.log"
    settled = path.stat().st_size
    async with run(folder, recorded=moves(1, 5)):
        pass
    lines = [line + b"\n" for line in path.read_bytes()[settled:].splitlines()]
    for size in range(sum(map(len, lines)) + 1):
        os.truncate(path, settled)
        killed_while_writing(folder, 2, lines, size)
        with path.open("a") as log:
            log.write(since)
        async with run(folder, recorded=moves(1, 6)):
            pass
        assert logged(folder) == [1, 2, 3, 4, 5, 6], f"{size} bytes written"


async def test_killed_and_the_log_moved_away_since(folder: Path) -> None:
    async with run(folder, recorded=moves(1, 2)):
        pass
    path = folder / "worker.log"
    lines = [line + b"\n" for line in path.read_bytes().splitlines()]
    killed_while_writing(folder, 2, lines, sum(map(len, lines)))
    path.rename(folder / "worker.log.1")
    async with run(folder, recorded=moves(1, 5)):
        pass
    assert logged(folder) == [5]


async def test_killed_and_the_log_gone_since(folder: Path) -> None:
    """Rather twice than never."""
    async with run(folder, recorded=moves(1, 2)):
        pass
    path = folder / "worker.log"
    lines = path.read_bytes().splitlines(keepends=True)
    killed_while_writing(folder, 2, lines, sum(map(len, lines)))
    path.unlink()
    async with run(folder, recorded=moves(1, 5)):
        pass
    assert logged(folder) == [3, 4, 5]


async def test_a_line_that_was_cut_short_is_ended(folder: Path) -> None:
    (folder / "worker.log").write_text('{"event":"audit","wor')
    async with run(folder, recorded=moves(1, 1)):
        pass
    assert logged(folder) == [1]


@pytest.mark.parametrize("log_format", ["json", "console"])
async def test_nothing_in_the_log_counts(folder: Path, log_format: Literal["json", "console"]) -> None:
    """Whoever can have text logged could write what looks like a transition."""
    async with run(folder, recorded=moves(1, 2)):
        pass
    forged = f"job.transition worker={ME} sequence=4000000000 "
    as_json = json.dumps({"event": "job.transition", "worker": ME, "sequence": 4000000000})
    with (folder / "worker.log").open("a") as log:
        log.write(f"{forged}\n{as_json}\n" * 3000 + forged)
    async with run(folder, log_format=log_format, recorded=moves(1, 4)) as current:
        assert current.transitions.sequence == 4


async def test_a_cursor_beyond_the_store_is_repaired_and_told(folder: Path) -> None:
    cursor = Cursor(folder / ME, ME)
    cursor.settle(4_000_000_000)
    cursor.close()
    async with run(folder, recorded=moves(1, 3)) as current:
        await current.write(moves(4, 5))
    assert logged(folder) == [4, 5]
    told = json.loads((folder / "worker.log").read_text().splitlines()[0])
    assert (told["event"], told["cursor"], told["latest"]) == ("log.cursor_repaired", 4_000_000_000, 3)


@pytest.mark.parametrize("content", [b"", b"\0", b"x" * 7, os.urandom(5000)])
async def test_a_cursor_that_is_none(folder: Path, content: bytes) -> None:
    (folder / ME / "worker.cursor").write_bytes(content)
    async with run(folder, recorded=moves(1, 3)):
        pass
    assert logged(folder) == [1, 2, 3]


async def test_the_cursor_of_an_earlier_version(folder: Path) -> None:
    (folder / ME / "worker.cursor").write_bytes((2).to_bytes(8, "little") + ME.encode())
    async with run(folder, recorded=moves(1, 3)):
        pass
    assert logged(folder) == [3]


async def test_the_cursor_of_another_store_does_not_count(folder: Path) -> None:
    """The operator removed the store to begin anew, and left the cursor: the new store's transitions are logged."""
    async with run(folder, recorded=moves(1, 500)):
        pass
    (folder / OTHER / "worker.cursor").write_bytes((folder / ME / "worker.cursor").read_bytes())
    async with run(folder, OTHER, recorded=moves(1, 2)):
        pass
    assert logged(folder, OTHER) == [1, 2]


async def test_two_workers_with_one_log(folder: Path) -> None:
    async with run(folder, recorded=moves(1, 3)):
        pass
    async with run(folder, OTHER, recorded=moves(1, 7)):
        pass
    async with run(folder, recorded=moves(1, 4)):
        pass
    assert logged(folder) == [1, 2, 3, 4]
    assert logged(folder, OTHER) == [1, 2, 3, 4, 5, 6, 7]


async def test_far_behind_it_reads_in_the_store(folder: Path) -> None:
    recorded = moves(1, 1)
    async with run(folder, recorded=recorded) as current:
        recorded += moves(2, 3000)
        for first in range(2, 3000, 400):
            current.transitions.add(moves(first, min(first + 399, 3000)))
        await eventually(lambda: current.transitions.sequence == 3000)
    assert logged(folder) == list(range(1, 3001))


async def test_catching_up_gives_way(folder: Path) -> None:
    """In no turn of the loop many lines are made, whether they are read again or come in one batch."""
    recorded = moves(1, 2000)
    async with run(folder, recorded=moves(1, 1)) as current:
        current.transitions._read = lambda after, limit: recorded[after : after + limit]
        current.transitions.add(recorded[1:400])
        current.transitions.add(recorded[1000:])
        most = 0
        before = current.transitions.sequence
        while before < 2000:
            await asyncio.sleep(0)
            most, before = max(most, current.transitions.sequence - before), current.transitions.sequence
    assert most <= 64
    assert logged(folder) == list(range(1, 2001))


async def test_what_the_store_has_no_more_is_told(folder: Path) -> None:
    async with run(folder, recorded=moves(1, 2)):
        pass
    async with run(folder, recorded=moves(6, 7)):
        pass
    assert logged(folder) == [1, 2, 6, 7]
    [told] = [line for line in map(json.loads, (folder / "worker.log").open()) if line["event"] != "job.transition"]
    assert (told["event"], told["first"], told["last"]) == ("log.transitions_missing", 3, 5)


async def test_a_level_that_leaves_them_out(folder: Path) -> None:
    async with run(folder, recorded=moves(1, 3), level="error"):
        pass
    async with run(folder, recorded=moves(1, 5)):
        pass
    assert logged(folder) == [4, 5]


async def test_a_transition_is_one_whole_line(folder: Path) -> None:
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
    async with run(folder, recorded=[moved]):
        pass
    line: dict[str, Any] = json.loads((folder / "worker.log").read_text())
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


async def test_a_line_feed_in_a_reason_makes_no_second_line(folder: Path) -> None:
    moved = Transition(1, "j", 5, JobState.STARTING, JobState.FINISHED, reason='command: "a\nb" \udcff was not found')
    async with run(folder, recorded=[moved]):
        pass
    assert len((folder / "worker.log").read_bytes().splitlines()) == 1
    assert logged(folder) == [1]


def test_a_spec_in_the_log_tells_no_secret(folder: Path) -> None:
    spec = JobSpec("run", path="secret", args=("--token=secret",), env={"PASSWORD": "secret"})
    with opened(folder) as log:
        log.events.info("something", error=ValueError("x", spec), spec=spec, specs=[spec])
        log.events.info("something", error=ValueError("TOKEN=secret"))
        log.events.error("failed", exc_info=_raised_beside(spec))
    text = (folder / "worker.log").read_text()
    assert "PASSWORD" in text
    assert "secret" not in text


def _raised_beside(spec: JobSpec) -> Exception:
    try:
        raise RuntimeError(f"about {spec}")
    except RuntimeError as error:
        return error


def test_what_libraries_log_is_in_our_log(folder: Path) -> None:
    with opened(folder):
        logging.getLogger("grpclib").warning("trouble: %s", "x")
        logging.getLogger("grpclib").debug("noise")
    (line,) = [json.loads(text) for text in (folder / "worker.log").read_text().splitlines()]
    assert (line["event"], line["level"], line["logger"], line["message"]) == (
        "library.log", "warning", "grpclib", "trouble: x",
    )  # fmt: skip


def test_no_level_leaves_out_the_audit(folder: Path) -> None:
    with opened(folder, level="error") as log:
        log.events.warning("audit", token="x=y")
        log.audit.allowed(reason="TOKEN=x")
    [line] = [json.loads(text) for text in (folder / "worker.log").read_text().splitlines()]
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


def test_a_named_tuple_does_not_get_past_its_repr(folder: Path) -> None:
    with opened(folder) as log:
        log.events.info("spec", spec=JobSpec("sh", env={"TOKEN": "hunter2"}))
    assert "hunter2" not in (folder / "worker.log").read_text()


HOSTILE = (
    "\x1b]0;owned\x07\x1b[2J\x7f\x9b31m\u202eabc\u2066\u200b\ufeff"
    " a\nb\rc\x85d\u2028e\u2029f\x0bg\x0ch\udcff\U000e0001\0"
)


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_no_text_reaches_a_line_raw(folder: Path, log_format: str) -> None:
    error = ValueError(f"{HOSTILE}\n2026-01-01T00:00:00Z [info     ] forged")
    with opened(folder, format=log_format) as log:
        log.events.info("plain", reason=HOSTILE, short=HOSTILE.replace(" ", ""), table={"k": HOSTILE}, rows=[HOSTILE])
        log.events.info("key", identity=HOSTILE)
        logging.getLogger("library").error("said %s", HOSTILE)
        if log_format == "console":
            log.events.error("failed", exc_info=error)
    text = (folder / "worker.log").read_bytes().decode()
    lines = text.removesuffix("\n").split("\n")
    assert all(line.isprintable() for line in lines), text
    assert len(lines) == 3 or all(line.startswith(("    ", "202")) and "] forged" not in line[:40] for line in lines)
    if log_format == "json":
        plain, *_ = map(json.loads, lines)
        assert plain["reason"] == HOSTILE


def test_what_the_interpreter_cannot_raise_is_in_our_log(folder: Path) -> None:
    class Ending:
        def __del__(self) -> None:
            raise ValueError("at the end")

    with opened(folder) as log:
        Ending()
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("old", DeprecationWarning, stacklevel=1)
    del log
    lines = [json.loads(text) for text in (folder / "worker.log").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["library.unraisable", "library.log"]
    assert "at the end" in lines[0]["exception"]
