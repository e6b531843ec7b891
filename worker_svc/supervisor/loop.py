"""The supervisor's loop.

One turn: wait for what is ready (requests, exits, spawn results, timers) → move jobs by the pure table → one SQLite
transaction for all of it → only then the effects: spawns, answers, doorbells.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable
from typing import Final

from worker_svc.supervisor.connections import Connection, peer_is_trusted
from worker_svc.supervisor.journal import note
from worker_svc.supervisor.jobs import Jobs
from worker_svc.supervisor.ledger import Ledger
from worker_svc.supervisor.requests import Requests
from worker_svc.supervisor.store import JobStore
from worker_svc.supervisor.timers import NS_PER_S, Timers

_COMMIT_RETRY_NS: Final = NS_PER_S // 4


class Supervisor:
    def __init__(
        self, state_dir: str, store: JobStore, listener: socket.socket, signals: int, *, owns_processes: bool
    ) -> None:
        """`signals` is readable when the process was asked to leave (the read end of signal.set_wakeup_fd)."""
        self._store = store
        self._listener = listener
        self._signals = signals
        self._ledger = Ledger(store)
        self._timers = Timers()
        self._epoll = select.epoll(flags=select.EPOLL_CLOEXEC)
        self._jobs = Jobs(state_dir, store, self._ledger, self._epoll, self._timers)
        self._requests = Requests(self._jobs, store, self._ledger)
        self._connections: dict[int, Connection] = {}
        self._idle_since_ns = time.monotonic_ns()
        self._handlers: dict[int, Callable[[], None]] = {
            listener.fileno(): self._accept,
            signals: self._on_signal,
            self._jobs.spawned_bell: self._jobs.take_spawned,
        }
        for fd in self._handlers:
            self._epoll.register(fd, select.EPOLLIN)
        self._jobs.recover(owns_processes=owns_processes)
        self._settle()

    def run(self) -> None:
        """Returns when there is nothing left to supervise."""
        while not self._is_done():
            self._turn()
        for connection in list(self._connections.values()):
            connection.close()
        self._epoll.close()

    def _turn(self) -> None:
        for fd, events in self._epoll.poll(self._patience_s()):
            self._on_ready(fd, events)
        self._timers.fire_due()
        self._settle()

    def _on_ready(self, fd: int, events: int) -> None:
        job = self._jobs.with_pidfd(fd)
        if job is not None:
            self._jobs.on_exit(job, events)
        elif fd in self._handlers:
            self._handlers[fd]()
        else:
            self._on_connection(self._connections[fd], events)

    def _settle(self) -> None:
        """What was decided goes to disk, then what follows from it goes out."""
        self._jobs.promote()
        before = self._store.sequence
        if self._ledger.commit():
            for effect in self._ledger.take_effects():
                effect()
        else:
            note("store.failed", reason=self._ledger.failure)
            for job in self._ledger.take_back_new():
                self._jobs.take_back(job)
        is_new = self._store.sequence != before
        for connection in list(self._connections.values()):
            if is_new:
                connection.ring(self._store.sequence)
            connection.flush()
            if connection.closed:
                self._forget(connection)
        if not self._is_idle():
            self._idle_since_ns = time.monotonic_ns()

    def _patience_s(self) -> float:
        """How long to wait for something to happen: -1 without end."""
        now_ns = time.monotonic_ns()
        due: list[int] = []
        if self._timers.next_ns is not None:
            due.append(self._timers.next_ns)
        if self._ledger.is_behind:
            due.append(now_ns + _COMMIT_RETRY_NS)
        if self._is_idle():
            due.append(self._idle_since_ns + self._idle_exit_ns)
        # Rounded up by a tick of epoll: to wake just before a timer would be a turn for nothing.
        return max(0, min(due) - now_ns) / NS_PER_S + 0.001 if due else -1

    @property
    def _idle_exit_ns(self) -> int:
        return int(self._jobs.settings.idle_exit_s * NS_PER_S)

    def _is_idle(self) -> bool:
        return not self._jobs and not self._connections and not self._ledger.is_behind

    def _is_done(self) -> bool:
        if self._requests.leave_when_idle:
            return not self._jobs and not self._ledger.is_behind
        return self._is_idle() and time.monotonic_ns() - self._idle_since_ns >= self._idle_exit_ns

    def _on_signal(self) -> None:
        os.read(self._signals, 64)
        note("supervisor.asked_to_leave", jobs=len(self._jobs))
        self._requests.leave_when_idle = True

    def _accept(self) -> None:
        try:
            connected, _ = self._listener.accept()
        except OSError as error:  # the peer has gone again, or no fd is free: the others go on
            note("connection.not_accepted", reason=str(error))
            return
        if not peer_is_trusted(connected):
            note("connection.refused", reason="the peer is another user")
            connected.close()
            return
        connection = Connection(connected, self._epoll)
        self._connections[connection.fd] = connection

    def _on_connection(self, connection: Connection, events: int) -> None:
        if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
            for frame in connection.receive():
                self._requests.handle(connection, frame)
        if connection.closed:
            self._forget(connection)

    def _forget(self, connection: Connection) -> None:
        # By identity: the number of its fd may be another connection's by now.
        if self._connections.get(connection.fd) is connection:
            del self._connections[connection.fd]
