"""What a worker must have logged or said."""

from __future__ import annotations

import signal

from tests.support import programs
from tests.support.waiting import eventually_sync
from tests.support.workers import PATIENCE_S, Worker
from worker_svc import Outcome


def assert_logged_exactly_once(worker: Worker) -> None:
    """Every transition of the store is a line of the log, in order."""
    events = worker.events()
    eventually_sync(
        lambda: len(worker.log_events("job.transition")) >= len(events), PATIENCE_S, "transitions are not in the log"
    )
    lines = worker.log_events("job.transition")
    assert [line["sequence"] for line in lines] == list(range(1, len(events) + 1))
    for line, event in zip(lines, events, strict=True):
        assert (line["job_id"], line["from_state"], line["to_state"], line["at_ns"]) == (
            event.job_id, event.from_state.name, event.to_state.name, event.at_ns,
        )  # fmt: skip
        assert line.get("exit_code") == event.exit_code
        assert line.get("pid", 0) == event.pid


MIX: list[tuple[list[str], int, int | None, str]] = [
    (programs.TRUE, Outcome.SUCCEEDED, 0, ""),
    (programs.exits(3), Outcome.FAILED, 3, ""),
    (programs.exits(255), Outcome.FAILED, 255, ""),
    (programs.kills_self(signal.SIGKILL), Outcome.SIGNALED, None, "SIGKILL"),
    (programs.kills_self(signal.SIGTERM), Outcome.SIGNALED, None, "SIGTERM"),
    (programs.sleeps(0.05), Outcome.SUCCEEDED, 0, ""),
    (programs.LEAVES_CHILD, Outcome.FAILED, 3, ""),
]


def failure_of(worker: Worker) -> str:
    """What one more of it says; it ends with status 1 and without a traceback."""
    process = worker.spawn()
    assert process.wait(PATIENCE_S) == 1
    printed = (worker.tmp_path / "worker.out").read_text()
    assert "Traceback" not in printed
    reason: str = worker.wait_log("worker.failed")["reason"]
    assert "\n" not in reason
    return reason
