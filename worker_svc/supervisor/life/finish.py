"""The one way out of life; what is so in every state before it."""

from __future__ import annotations

import os
import time
from functools import partial

from worker_svc.job import Event, Exit, Outcome, PreconditionFailed
from worker_svc.linux.clocks import wall_ns
from worker_svc.supervisor.life.house import House
from worker_svc.supervisor.life.job import FINISHED, Job, Output, Stage

_UNKNOWN = Exit(None, None)


class Live(Stage):
    __slots__ = ("house", "job")

    def __init__(self, house: House, job: Job) -> None:
        self.house = house
        self.job = job

    def give_up(self, reason: str) -> None:
        lose(self.house, self.job, reason)
        self.house.ledger.then(partial(self.job.answer, PreconditionFailed(f"lost: {reason}")))


def finish(
    house: House,
    job: Job,
    event: Event,
    outcome: Outcome,
    reason: str,
    *,
    ended: Exit = _UNKNOWN,
    stuck: str | None = None,
    is_gone: bool = False,
) -> None:
    """Records how a job ended, and lets go of all that it held. `is_gone`: nothing of it lives, as was just seen."""
    was = job.now
    process = was.process
    output = process.output if process else Output(job, was.terms)
    ran_ns = None
    if process is not None and event is not Event.LOSE:  # of a lost one nobody saw when it ended
        ran_ns = time.monotonic_ns() - process.started_monotonic_ns if process.started_monotonic_ns else None
    columns = {
        **house.outputs.end(output),
        "exit_code": ended.exit_code,
        "signal": ended.signal,
        "cpu_ns": ended.cpu_ns,
        "outcome": int(outcome),
        "reason": reason,
        "finished_ns": wall_ns(),
        "wall_ns": ran_ns,
    }
    house.retention.on_finished(columns["stored_bytes"])
    if stuck is not None:
        columns |= {"peak_memory_bytes": ended.peak_memory_bytes, "stuck": stuck}
    if was.paused:
        columns["paused"] = 0
    house.moves.move(
        job,
        event,
        FINISHED,
        changes=columns,
        outcome=outcome,
        reason=reason,
        wall_ns=ran_ns,
        exit_code=ended.exit_code,
        signal=ended.signal,
        cpu_ns=ended.cpu_ns,
    )
    _let_go(house, was, is_gone)
    house.ledger.then(partial(_forget, house, job))


def lose(house: House, job: Job, reason: str, *, is_gone: bool = False) -> None:
    """What became of it cannot be known."""
    finish(house, job, Event.LOSE, Outcome.LOST, f"lost: {reason}", is_gone=is_gone)


def _let_go(house: House, was: Stage, is_gone: bool) -> None:
    if was.container is not None:
        house.remains.take(was.container, is_gone=is_gone)
    process = was.process
    if process is not None and process.pidfd >= 0:
        # Before closing: epoll was seen to report a closed pidfd.
        if house.by_pidfd.pop(process.pidfd, None):
            house.epoll.unregister(process.pidfd)
        os.close(process.pidfd)
        process.pidfd = -1


def _forget(house: House, job: Job) -> None:
    """Only now that its end is on disk: until then the store would say it still runs."""
    if house.by_id.get(job.job_id) is job:  # else it was taken back
        del house.by_id[job.job_id]
