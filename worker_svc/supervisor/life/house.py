"""What the jobs of one supervisor share, whatever state they are in; and the one way out of life, from each."""

from __future__ import annotations

import os
import select
import time
from functools import partial
from typing import TYPE_CHECKING, Final

from worker_svc.job import Event, Exit, Limits, Outcome
from worker_svc.linux.clocks import boot_id, wall_ns
from worker_svc.record.writer import JobStore
from worker_svc.supervisor.containment import Containment
from worker_svc.supervisor.ledger import Ledger
from worker_svc.supervisor.life.job import FINISHED, Job, Output, Stage
from worker_svc.supervisor.life.moves import Moves
from worker_svc.supervisor.life.remains import Remains
from worker_svc.supervisor.mailbox import Mailbox
from worker_svc.supervisor.outputs import Outputs
from worker_svc.supervisor.reserve import Reserve
from worker_svc.supervisor.retention import Retention
from worker_svc.supervisor.settings import kept_settings
from worker_svc.supervisor.spawn import IMPLEMENTATION, Spawned, Spawner, SpawnFailed
from worker_svc.supervisor.timers import Timers

if TYPE_CHECKING:
    from worker_svc.supervisor.life.process import Process
    from worker_svc.supervisor.life.starting import Starting

_UNKNOWN: Final = Exit(None, None)


class House:
    def __init__(
        self,
        state_dir: str,
        store: JobStore,
        timers: Timers,
        containment: Containment,
        spawner: str,
        inherited: Limits,
    ) -> None:
        """`spawner` forces an implementation, empty: the best. `inherited` is what jobs have of the limits that the
        supervisor changed for itself."""
        self.state_dir = state_dir
        self.hidden = os.path.realpath(state_dir)
        self.boot_id = boot_id()
        self.settings = kept_settings(store)
        self.store = store
        self.ledger = Ledger(store)
        self.epoll = select.epoll(flags=select.EPOLL_CLOEXEC)
        self.timers = timers
        self.mailbox = Mailbox(timers)
        self.containment = containment
        self.inherited = inherited
        self.by_id: dict[str, Job] = {}
        self.by_pidfd: dict[int, Process] = {}
        """The processes whose exit the loop waits for."""
        self.moves = Moves(self.ledger)
        self.reserve = Reserve()
        self.retention = Retention(state_dir, store, self.ledger)
        self.remains = Remains(containment, timers, self.by_id)
        self.spawner = Spawner(self._on_spawned, spawner or IMPLEMENTATION)
        self.outputs = Outputs(state_dir, self.spawner.implementation, self.mailbox, self.ledger, self.moves)

    def _on_spawned(self, starting: Starting, result: Spawned | SpawnFailed) -> None:
        """In a spawner's thread."""
        self.mailbox.post(partial(starting.on_spawned, result), starting.job)

    # The one way out of life

    def finish(
        self,
        job: Job,
        event: Event,
        outcome: Outcome,
        reason: str,
        *,
        ended: Exit = _UNKNOWN,
        stuck: str | None = None,
        is_gone: bool = False,
    ) -> None:
        """Records how a job ended, and lets go of all that it held. `is_gone`: nothing of it lives, as was just
        seen."""
        was, process = job.now, job.now.process
        ran_ns = None
        # Nobody saw when a lost one ended.
        if process is not None and process.started_monotonic_ns and event is not Event.LOSE:
            ran_ns = time.monotonic_ns() - process.started_monotonic_ns
        exit_code, number, cpu_ns, peak_memory_bytes = ended
        told = {"reason": reason, "exit_code": exit_code, "signal": number, "cpu_ns": cpu_ns, "wall_ns": ran_ns}
        columns = self.outputs.end(process.output if process else Output(job, was.terms))
        columns |= {**told, "outcome": int(outcome), "finished_ns": wall_ns()}
        self.retention.on_finished(columns["stored_bytes"])
        if stuck is not None:
            columns |= {"peak_memory_bytes": peak_memory_bytes, "stuck": stuck}
        if was.paused:
            columns["paused"] = 0
        self.moves.move(job, event, FINISHED, changes=columns, outcome=outcome, **told)
        self._let_go(was, is_gone)
        self.ledger.then(partial(self._forget, job))

    def lose(self, job: Job, reason: str, *, is_gone: bool = False) -> None:
        """What became of it cannot be known."""
        self.finish(job, Event.LOSE, Outcome.LOST, f"lost: {reason}", is_gone=is_gone)

    def _let_go(self, was: Stage, is_gone: bool) -> None:
        if was.container is not None:
            self.remains.take(was.container, is_gone=is_gone)
        process = was.process
        if process is not None and process.pidfd >= 0:
            # Before closing: epoll was seen to report a closed pidfd.
            if self.by_pidfd.pop(process.pidfd, None):
                self.epoll.unregister(process.pidfd)
            os.close(process.pidfd)
            process.pidfd = -1

    def _forget(self, job: Job) -> None:
        """Only now that its end is on disk: until then the store would say it still runs."""
        if self.by_id.get(job.job_id) is job:  # else it was taken back
            del self.by_id[job.job_id]
