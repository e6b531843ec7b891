"""The life of every job: sole author of transitions.

Decides by the pure table, writes into the ledger, and acts on processes. What must be durable first is left to the
ledger; signals alone do not wait for the disk: a job that fills it must be stoppable.
"""

from __future__ import annotations

import os
import select
import signal
import sqlite3
import time
from collections import deque
from functools import partial
from typing import Any, Final

from worker_svc.job import (
    DURATION_MAX_S,
    Event,
    Exit,
    JobError,
    JobSpec,
    JobState,
    Outcome,
    PreconditionFailed,
    ResourceExhausted,
    StopCause,
    Transition,
    error_text,
    next_state,
    outcome_of,
)
from worker_svc.supervisor import adoption, containment
from worker_svc.supervisor.journal import note
from worker_svc.supervisor.ledger import Ledger
from worker_svc.supervisor.livejob import LiveJob
from worker_svc.supervisor.settings import Settings
from worker_svc.supervisor.spawn import LaunchPlan, Spawned, Spawner, SpawnFailed
from worker_svc.supervisor.store import JobStore, LiveRow, output_path, stderr_path
from worker_svc.supervisor.timers import NS_PER_S, Timers

# How long after its end an adopted process may wait for its parent to reap it, before we give its status up.
_EXIT_STATUS_WAIT_S: Final = 5.0


class Jobs:
    """All jobs that are not finished, their slots and their queue."""

    def __init__(
        self, state_dir: str, store: JobStore, ledger: Ledger, epoll: select.epoll, timers: Timers
    ) -> None:
        self.state_dir = state_dir
        self.settings = Settings.from_store(store)
        self._store = store
        self._ledger = ledger
        self._epoll = epoll
        self._timers = timers
        self._boot_id = adoption.boot_id()
        self._by_id: dict[str, LiveJob] = {}
        self._by_pidfd: dict[int, LiveJob] = {}
        self._queue: deque[LiveJob] = deque()
        self.queued = 0
        self.running = 0
        self._spawned: deque[tuple[LiveJob, Spawned | SpawnFailed]] = deque()
        self.spawned_bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """Readable when a spawner thread is done with a job: then call `take_spawned`."""
        self._spawner = Spawner(self._on_spawner_thread)

    def __len__(self) -> int:
        return len(self._by_id)

    def get(self, job_id: str) -> LiveJob | None:
        return self._by_id.get(job_id)

    def with_pidfd(self, fd: int) -> LiveJob | None:
        return self._by_pidfd.get(fd)

    def _move(self, job: LiveJob, event: Event, *, changes: dict[str, Any] | None = None, **fields: Any) -> bool:
        """Moves a job by the table. False: the event changes nothing in its state."""
        to_state = next_state(job.state, event)
        if to_state is None:
            return False
        moved = Transition(0, job.job_id, time.time_ns(), job.state, to_state, pid=job.pid, **fields)
        self._ledger.move(job, moved, changes or {})
        job.state = to_state
        return True

    def accept(self, job: LiveJob, spec: JobSpec, stdin: bytes) -> None:
        """Takes a new job: into a slot, or into the queue. Raises ResourceExhausted."""
        has_slot = self.running < self.settings.slots and not self.queued
        if not has_slot and self.queued >= self.settings.queue_length:
            raise ResourceExhausted(
                f"all {self.settings.slots} slots are taken and {self.queued} jobs wait, which is as many as may "
                "(jobs.queue_length): try again later"
            )
        job.take(spec)
        self._by_id[job.job_id] = job
        self._ledger.add(job, spec, stdin)
        if has_slot:
            job.spec, job.stdin = spec, stdin
            self._launch(job)
        else:
            self._move(job, Event.ENQUEUE)
            self._queue.append(job)
            self.queued += 1
            self._ledger.then(partial(self._answer_start, job))

    def take_back(self, job: LiveJob) -> None:
        """Its acceptance could not be recorded: it never was."""
        if job.state is JobState.QUEUED:
            self.queued -= 1
        else:
            self.running -= 1
        job.state = JobState.NEW
        del self._by_id[job.job_id]
        self._answer_start(job, ResourceExhausted(f"the job could not be recorded: {self._ledger.failure}"))

    def promote(self) -> None:
        while self._queue and self.running < self.settings.slots:
            job = self._queue.popleft()
            if job.state is JobState.QUEUED:  # else it was stopped while it waited
                self.queued -= 1
                self._launch(job)

    def _launch(self, job: LiveJob) -> None:
        self.running += 1
        self._move(job, Event.LAUNCH, queued_ns=time.time_ns() - job.accepted_ns)
        self._ledger.then(partial(self._spawn, job))

    def _spawn(self, job: LiveJob) -> None:
        if job.state is not JobState.STARTING:  # taken back
            return
        try:
            spec = job.spec or self._store.spec_of(job.ordinal)
            stdin = job.stdin or (self._store.stdin_of(job.ordinal) if spec.stdin_size_bytes else b"")
        except sqlite3.Error as error:
            self._spawned.append((job, SpawnFailed(f"the job's record could not be read: {error}")))
            os.eventfd_write(self.spawned_bell, 1)
            return
        job.spec, job.stdin = None, b""
        job.take(spec)
        plan = LaunchPlan(
            argv=spec.argv,
            env={**self.settings.base_env, **spec.env, "WORKER_JOB_ID": job.job_id},
            cwd=spec.cwd,
            stdin=stdin,
            stdout_path=output_path(self.state_dir, job.job_id),
            stderr_path=stderr_path(self.state_dir, job.job_id) if spec.separate_stderr else "",
        )
        self._spawner.submit(job, plan)

    def _on_spawner_thread(self, job: LiveJob, result: Spawned | SpawnFailed) -> None:
        self._spawned.append((job, result))
        os.eventfd_write(self.spawned_bell, 1)

    def take_spawned(self) -> None:
        os.eventfd_read(self.spawned_bell)
        while self._spawned:
            self._on_spawned(*self._spawned.popleft())

    def _on_spawned(self, job: LiveJob, result: Spawned | SpawnFailed) -> None:
        if isinstance(result, SpawnFailed):
            self._finish(job, Event.SPAWN_FAILED, outcome=Outcome.START_FAILED, reason=str(result))
            self._ledger.then(partial(self._answer_start, job, PreconditionFailed(str(result))))
            return
        job.pid, job.pidfd = result.pid, result.pidfd
        job.started_monotonic_ns = time.monotonic_ns()
        changes = {
            "pid": job.pid,
            "started_ns": time.time_ns(),
            "boot_id": self._boot_id,
            "start_ticks": result.start_ticks,
            "started_monotonic_ns": job.started_monotonic_ns,
        }
        self._move(job, Event.SPAWNED, changes=changes)
        self._ledger.then(partial(self._answer_start, job))
        self._watch(job)
        if job.asked is not None:
            self.stop(job, *job.asked)

    def _watch(self, job: LiveJob) -> None:
        self._by_pidfd[job.pidfd] = job
        self._epoll.register(job.pidfd, select.EPOLLIN)
        if job.timeout_s > 0:
            age_s = (time.monotonic_ns() - job.started_monotonic_ns) / NS_PER_S
            self._timers.after(max(0.0, job.timeout_s - age_s), job, self._on_timeout)

    def on_exit(self, job: LiveJob, events: int) -> None:
        if job.adopted:
            self._on_adopted_exit(job, events)
            return
        ended = containment.reap(job.pidfd, job.pid)
        if ended is not None:
            self._end(job, ended)

    def _on_adopted_exit(self, job: LiveJob, events: int) -> None:
        """Of a process that is not our child: its status can be had once its parent has reaped it, told by EPOLLHUP."""
        if not job.exited:
            job.exited = True
            containment.signal_job(job.pidfd, job.pid, signal.SIGKILL, is_child=False)
            self._epoll.modify(job.pidfd, 0)  # EPOLLHUP comes all the same, EPOLLIN would come for ever
            self._timers.after(_EXIT_STATUS_WAIT_S, job, self._take_adopted_status)
        if events & select.EPOLLHUP:
            self._take_adopted_status(job)

    def _take_adopted_status(self, job: LiveJob) -> None:
        if job.state is JobState.FINISHED:
            return
        ended = adoption.exit_of(job.pidfd)
        if ended is not None:
            self._end(job, ended)
        else:
            self.lose(job, "it ended after its supervisor had died, and this kernel does not tell its exit status")

    def _end(self, job: LiveJob, ended: Exit) -> None:
        outcome = outcome_of(ended, job.stop_cause)
        self._finish(
            job,
            Event.EXIT,
            outcome=outcome,
            exit_code=ended.exit_code,
            signal=ended.signal,
            reason=error_text(ended, outcome, job.timeout_s),
            cpu_ns=ended.cpu_ns,
            changes={"peak_memory_bytes": ended.peak_memory_bytes},
        )

    def lose(self, job: LiveJob, reason: str) -> None:
        self._finish(job, Event.LOSE, outcome=Outcome.LOST, reason=f"lost: {reason}")

    def _finish(self, job: LiveJob, event: Event, *, changes: dict[str, Any] | None = None, **fields: Any) -> None:
        """The one way out of life: records how it ended and lets go of all that it held."""
        if job.state is JobState.QUEUED:
            self.queued -= 1
        else:
            self.running -= 1
        wall_ns = time.monotonic_ns() - job.started_monotonic_ns if job.started_monotonic_ns else None
        if event is Event.LOSE:
            wall_ns = None  # nobody saw when it ended
        columns = {
            **(changes or {}),
            **{name: fields.get(name) for name in ("exit_code", "signal", "cpu_ns")},
            "outcome": int(fields["outcome"]),
            "reason": fields["reason"],
            "finished_ns": time.time_ns(),
            "wall_ns": wall_ns,
            "output_size_bytes": _size_of(output_path(self.state_dir, job.job_id)),
            "stderr_size_bytes": _size_of(stderr_path(self.state_dir, job.job_id)),
        }
        self._move(job, event, changes=columns, wall_ns=wall_ns, **fields)
        if job.pidfd >= 0:
            # Before closing: epoll was seen to report a closed pidfd.
            if self._by_pidfd.pop(job.pidfd, None):
                self._epoll.unregister(job.pidfd)
            os.close(job.pidfd)
            job.pidfd = -1
        self._ledger.then(partial(self._let_go, job))

    def _let_go(self, job: LiveJob) -> None:
        """Only now that its end is on disk: until then the store would say it still runs."""
        del self._by_id[job.job_id]

    def stop(
        self,
        job: LiveJob,
        number: int | None = None,
        grace_s: float | None = None,
        *,
        event: Event = Event.STOP,
    ) -> None:
        """Asks a job to end. Asked again, it is signalled again if a signal is named, and the nearer end counts."""
        cause = StopCause.TIMEOUT if event is Event.TIME_OUT else StopCause.REQUEST
        if job.state is JobState.STARTING:
            job.asked = (number, grace_s)
            return
        if job.state is JobState.QUEUED:
            job.stop_cause = cause
            self._finish(job, Event.STOP, outcome=Outcome.STOPPED, reason="stopped before it started")
            return
        moved = self._move(
            job,
            event,
            changes={"stop_cause": int(cause)},
            reason="timeout" if cause is StopCause.TIMEOUT else "stop requested",
        )
        if moved:
            job.stop_cause = cause
        if job.state is not JobState.STOPPING:
            return
        if moved or number is not None:
            self._stop_signal(job, job.stop_signal if number is None else number)
        self._kill_after(job, job.stop_grace_s if grace_s is None else grace_s)

    def _kill_after(self, job: LiveJob, grace_s: float) -> None:
        kill_at_ns = time.monotonic_ns() + int(min(grace_s, DURATION_MAX_S) * NS_PER_S)
        if job.kill_at_ns and job.kill_at_ns <= kill_at_ns:
            return
        job.kill_at_ns = kill_at_ns
        if grace_s <= 0:
            self._kill(job)
        else:
            self._timers.after(grace_s, job, self._kill)

    def _kill(self, job: LiveJob) -> None:
        if job.state is JobState.STOPPING and time.monotonic_ns() >= job.kill_at_ns:
            self._stop_signal(job, signal.SIGKILL)

    def _on_timeout(self, job: LiveJob) -> None:
        if job.state is JobState.RUNNING:
            self.stop(job, event=Event.TIME_OUT)

    def signal(self, job: LiveJob, number: int) -> None:
        """Raises PreconditionFailed if the job's processes may not be signalled (they changed their user)."""
        try:
            containment.signal_job(job.pidfd, job.pid, number, is_child=not job.adopted)
        except PermissionError as error:
            raise PreconditionFailed(f"the supervisor may not signal pid {job.pid}: {error.strerror}") from error

    def _stop_signal(self, job: LiveJob, number: int) -> None:
        try:
            self.signal(job, number)
        except PreconditionFailed as error:
            note("job.not_signalled", job_id=job.job_id, signal=number, reason=error.message)

    def _answer_start(self, job: LiveJob, error: JobError | None = None) -> None:
        waiting, job.waiting = job.waiting or [], None
        for connection, request, existed in waiting:
            if error is not None:
                connection.send({"r": request, "error": error.code, "text": error.message})
            else:
                connection.send({"r": request, "ok": {"state": int(job.state), "existed": existed}})

    def recover(self, *, owns_processes: bool) -> None:
        """Goes on with the jobs that an earlier supervisor left: once, before the first turn.

        owns_processes: false for the copy of a state directory, whose processes are the original's.
        """
        for row in self._store.live():
            job = LiveJob(row.job_id, row.fingerprint, row.accepted_ns)
            job.ordinal, job.state = row.ordinal, row.state
            job.stop_cause = StopCause(row.stop_cause)
            job.started_monotonic_ns = row.started_monotonic_ns
            job.pid = row.pid
            self._by_id[job.job_id] = job
            if row.state is JobState.QUEUED:
                self._queue.append(job)
                self.queued += 1
            else:
                self.running += 1
                self._recover_started(job, row, owns_processes)
        note("supervisor.recovered", running=self.running, queued=self.queued, sequence=self._store.sequence)

    def _recover_started(self, job: LiveJob, row: LiveRow, owns_processes: bool) -> None:
        reason = adoption.lost_reason(row, self._boot_id, owns_processes)
        if reason:
            self.lose(job, reason)
            return
        pidfd = adoption.open_pidfd(row.pid, row.start_ticks)
        if pidfd is None:
            self.lose(job, "it ended while no supervisor was there")
            return
        job.pidfd, job.adopted = pidfd, True
        job.take(self._store.spec_of(job.ordinal))
        self._watch(job)
        if job.state is JobState.STOPPING:
            self._kill_after(job, job.stop_grace_s)


def _size_of(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return None
