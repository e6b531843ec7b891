"""What the jobs of one supervisor share, whatever state they are in."""

from __future__ import annotations

import os
import select
from functools import partial
from typing import TYPE_CHECKING

from worker_svc.job import Limits
from worker_svc.linux.clocks import boot_id
from worker_svc.record.writer import JobStore
from worker_svc.supervisor.containment import Containment
from worker_svc.supervisor.ledger import Ledger
from worker_svc.supervisor.life.job import Job
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
