"""The supervisor's loop.

One turn: wait for what is ready (requests, exits, spawn results, timers) → move jobs by the pure table → one SQLite
transaction for all of it → only then the effects: spawns, answers, doorbells.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Final

from worker_svc.job import Limits, fault_text
from worker_svc.linux import failpoints
from worker_svc.linux.clocks import NS_PER_S
from worker_svc.linux.lockfile import LockFile, LockHeld
from worker_svc.record import paths
from worker_svc.record.writer import JobStore
from worker_svc.supervisor.connections import Connection, Key, listen, refusal
from worker_svc.supervisor.containment import Containment
from worker_svc.supervisor.journal import note, use_log
from worker_svc.supervisor.life.job import Job
from worker_svc.supervisor.life.jobs import Jobs
from worker_svc.supervisor.life.recovery import recover
from worker_svc.supervisor.requests import Requests
from worker_svc.supervisor.timers import Timers, is_passing

_ACCEPT_RETRY_S: Final = 0.5
_TROUBLE_PAUSE_S: Final = 0.01
_RETRY_NS: Final = NS_PER_S // 4
# After so many turns in a row that failed, for no want of anything, a supervisor that starts anew may fare better.
_FAULTS_MAX: Final = 100
_REFUSALS_NOTED_NS: Final = NS_PER_S
# epoll takes at most 2**31 ms, some 25 days; a timer can be years away.
_PATIENCE_MAX_S: Final = 3600.0


class Supervisor:
    def __init__(
        self,
        state_dir: str,
        store: JobStore,
        lock: LockFile,
        signals: int,
        containment: Containment,
        *,
        spawner: str,
        inherited: Limits,
        owns_processes: bool,
    ) -> None:
        """`signals` is the read end of signal.set_wakeup_fd; the others are as House has them."""
        self._state_dir = state_dir
        self._store = store
        self._lock = lock
        self._listener: socket.socket | None = None
        self._signals = signals
        self._timers = Timers(self._on_trouble)
        self._jobs = Jobs(state_dir, store, self._timers, containment, spawner, inherited)
        self._ledger, self._epoll, mailbox = self._jobs.ledger, self._jobs.epoll, self._jobs.mailbox
        self._key = Key(state_dir)
        self._requests = Requests(self._jobs, store, self._ledger, self._key)
        self._refusals = 0
        """Since the last that was noted: who runs under us must not fill the disk with them."""
        self._refusal_noted_ns = -_REFUSALS_NOTED_NS
        self._connections: dict[int, Connection] = {}
        self._idle_since_ns = time.monotonic_ns()
        self._noted_trouble = ("", "")
        self._noted_trouble_s = 0.0
        self._noted_failure = ""
        """The last that was said of the store: it is tried again four times a second."""
        self._is_asked_to_leave = False
        self._handlers: dict[int, Callable[[], None]] = {
            signals: self._on_signal,
            mailbox.bell: mailbox.open,
            containment.events_fd: self._jobs.remains.on_tree_events,
            self._jobs.outputs.news_fd: self._jobs.outputs.take_news,
        }
        for fd in self._handlers:
            self._epoll.register(fd, select.EPOLLIN)
        self._listen()
        recover(self._jobs, owns_processes=owns_processes)
        self._settle()

    def run(self) -> None:
        """Returns when there is nothing left to supervise."""
        faults = 0
        while not self._is_done():
            try:
                self._turn()
                faults = 0
            except Exception as error:
                faults += not self._on_trouble(error)
                if faults > _FAULTS_MAX:
                    raise
                time.sleep(_TROUBLE_PAUSE_S)
        for connection in list(self._connections.values()):
            connection.close()
        if self._has_socket():
            os.unlink(self._socket_path)
        self._key.remove()
        self._epoll.close()

    def _turn(self) -> None:
        for fd, events in self._epoll.poll(self._patience_s()):
            process = self._jobs.by_pidfd.get(fd)
            try:
                self._on_ready(fd, events)
            except Exception as error:
                if not self._on_trouble(error, process.job if process else None) and fd in self._connections:
                    self._connections.pop(fd).close()  # the worker connects again, and asks again what it may
                time.sleep(_TROUBLE_PAUSE_S)  # it will be reported again, at once and until it can be dealt with
        self._timers.fire_due()
        self._timers.attempt(partial(self._jobs.retention.step, self._jobs.settings))
        self._settle()

    def _on_trouble(self, error: Exception, job: Job | None = None) -> bool:
        """True: the machine has no more of something, which may pass. Else it is a fault of ours, which ends the job
        that it came with, and neither the others nor the loop."""
        if is_passing(error):
            self._jobs.reserve.spend()
            self._note_trouble("supervisor.exhausted", str(error) or "out of memory")
            return True
        # Not at the top: it is seldom needed, and large.
        from traceback import format_exception

        self._note_trouble("supervisor.fault", "".join(format_exception(error)))
        if job is not None:
            try:
                self._jobs.give_up(job, error)
            except Exception as again:
                self._note_trouble("supervisor.fault", f"{job.job_id} could not be given up: {fault_text(again)}")
        return False

    def _note_trouble(self, event: str, reason: str) -> None:
        """Not again and again: some are met at each turn."""
        now_s = time.monotonic()
        if (event, reason) != self._noted_trouble or now_s - self._noted_trouble_s > 1:
            note(event, reason=reason)
            self._noted_trouble, self._noted_trouble_s = (event, reason), now_s

    def _on_ready(self, fd: int, events: int) -> None:
        process = self._jobs.by_pidfd.get(fd)
        if process is not None:
            process.on_pidfd(events)
        elif fd in self._handlers:
            self._handlers[fd]()
        elif fd in self._connections:
            self._on_connection(self._connections[fd], events)
        # else: closed by what came before it in the same turn, such as a job that another event of it ended

    def _settle(self) -> None:
        """What was decided goes to disk, then what follows from it goes out."""
        self._jobs.promote()
        if failpoints.is_armed:
            failpoints.reach("before-commit")
        before = self._store.sequence
        is_committed = self._ledger.commit(self._jobs.give_up)
        if failpoints.is_armed:
            failpoints.reach("after-commit")
        for effect in self._ledger.take_urgent():
            self._timers.attempt(effect)
        if is_committed:
            self._noted_failure = ""
            for effect in self._ledger.take_effects():
                self._timers.attempt(effect)
        else:
            self._note_failure()
            for job in self._ledger.take_back_new():
                refusal = self._ledger.refusal()
                self._jobs.take_back(job, refusal)
        is_new = self._store.sequence != before
        for connection in list(self._connections.values()):
            if is_new:
                connection.ring(self._store.sequence)
            connection.flush()
            if connection.closed:
                self._forget(connection)
        if not self._is_idle():
            self._idle_since_ns = time.monotonic_ns()

    def _note_failure(self) -> None:
        if self._ledger.failure != self._noted_failure:
            note("store.failed", reason=self._ledger.failure)
        self._noted_failure = self._ledger.failure

    def _patience_s(self) -> float:
        """How long to wait for something to happen: -1 without end."""
        now_ns = time.monotonic_ns()
        due: list[int] = []
        if self._timers.next_ns is not None:
            due.append(self._timers.next_ns)
        if self._ledger.is_behind or not self._jobs.reserve.refill():
            due.append(now_ns + _RETRY_NS)
        if self._jobs.retention.has_work:
            due.append(self._jobs.retention.next_ns)
        if self._is_idle():
            due.append(self._idle_since_ns + self._idle_exit_ns)
        # Rounded up by a tick of epoll: to wake just before a timer would be a turn for nothing.
        return min(_PATIENCE_MAX_S, max(0, min(due) - now_ns) / NS_PER_S + 0.001) if due else -1

    @property
    def _idle_exit_ns(self) -> int:
        return int(self._jobs.settings.idle_exit_s * NS_PER_S)

    def _is_idle(self) -> bool:
        return not self._has_work() and not self._connections

    def _has_work(self) -> bool:
        return bool(self._jobs) or bool(self._jobs.remains) or self._ledger.is_behind

    def _is_done(self) -> bool:
        if self._requests.is_shutting_down or self._is_asked_to_leave:
            return not self._has_work()
        return self._is_idle() and time.monotonic_ns() - self._idle_since_ns >= self._idle_exit_ns

    def _on_signal(self) -> None:
        numbers = os.read(self._signals, 4096)
        if signal.SIGCHLD in numbers:
            self._timers.attempt(self._jobs.remains.on_child_died)
        if signal.SIGHUP in numbers:
            self._mend()
        if signal.SIGTERM in numbers and not self._is_asked_to_leave:
            # Anybody can have sent it, a job's `kill $PPID` too. All goes on until the moment without jobs comes.
            note("supervisor.asked_to_leave", jobs=len(self._jobs))
            self._is_asked_to_leave = True

    def _mend(self) -> None:
        """Makes anew what was removed of the state directory by hand: others must find us there."""
        anew: list[str] = []
        try:
            if not self._has_socket():
                self._listen()
                anew.append(paths.SOCKET_NAME)
            if self._lock.mend():
                anew.append(paths.SUPERVISOR_LOCK_NAME)
            if not _is_at(os.fstat(2), f"{self._state_dir}/{paths.SUPERVISOR_LOG_NAME}"):
                use_log(self._state_dir)
                anew.append(paths.SUPERVISOR_LOG_NAME)
        except (OSError, LockHeld) as error:
            note("supervisor.not_mended", reason=str(error))
        if anew:
            note("supervisor.mended", made_anew=anew)

    @property
    def _socket_path(self) -> str:
        return f"{self._state_dir}/{paths.SOCKET_NAME}"

    def _has_socket(self) -> bool:
        """Whether the socket that others find is ours."""
        return _is_at(self._socket_found, self._socket_path)

    def _listen(self) -> None:
        """In place of an earlier socket. Raises OSError."""
        listener = listen(self._state_dir)
        self._socket_found = os.stat(self._socket_path)
        if self._listener is not None:
            del self._handlers[self._listener.fileno()]
            self._listener.close()  # and epoll forgets it
        self._listener = listener
        self._handlers[listener.fileno()] = self._accept
        self._epoll.register(listener.fileno(), select.EPOLLIN)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connected, _ = self._listener.accept()
        except ConnectionAbortedError:
            return
        except OSError as error:
            # No fd is free. The connection would be reported again at once and for ever: let it wait.
            note("connection.not_accepted", reason=str(error))
            self._epoll.unregister(self._listener.fileno())
            self._timers.after(_ACCEPT_RETRY_S, partial(self._listen_again, self._listener))
            return
        try:
            reason = refusal(connected, self._jobs.containment.kinship)
        except OSError:
            connected.close()
            raise
        if reason:
            connected.close()
            self._note_refusal(reason)
            return
        connection = Connection(connected, self._epoll)
        self._connections[connection.fd] = connection

    def _note_refusal(self, reason: str) -> None:
        self._refusals += 1
        now_ns = time.monotonic_ns()
        if now_ns - self._refusal_noted_ns >= _REFUSALS_NOTED_NS:
            note("connection.refused", reason=reason, count=self._refusals)
            self._refusals, self._refusal_noted_ns = 0, now_ns

    def _listen_again(self, listener: socket.socket) -> None:
        if listener is self._listener:
            self._epoll.register(listener.fileno(), select.EPOLLIN)

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


def _is_at(found: os.stat_result, path: str) -> bool:
    try:
        return os.path.samestat(os.stat(path), found)
    except FileNotFoundError:
        return False
