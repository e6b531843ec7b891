"""The life of every job that is not finished: accepted, started, watched, ended; and taken over from an earlier
supervisor."""

from __future__ import annotations

import os
import select
import sqlite3
import time
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from typing import Any

from worker_svc.job import (
    Event,
    Exit,
    JobError,
    JobSpec,
    JobState,
    Limits,
    Outcome,
    PreconditionFailed,
    ResourceExhausted,
    SecretEnv,
    StopCause,
    error_message,
    fault_text,
)
from worker_svc.linux import failpoints
from worker_svc.linux.clocks import NS_PER_S, boot_id, wall_ns
from worker_svc.record.store import JobStore, LiveRow, output_path, stderr_path
from worker_svc.supervisor.containment import Containment, ContainmentError
from worker_svc.supervisor.endings import Endings
from worker_svc.supervisor.journal import note
from worker_svc.supervisor.ledger import Ledger
from worker_svc.supervisor.livejob import LiveJob
from worker_svc.supervisor.mailbox import Mailbox
from worker_svc.supervisor.outputs import Outputs
from worker_svc.supervisor.reserve import Reserve
from worker_svc.supervisor.retention import Retention, check_floor
from worker_svc.supervisor.settings import Settings
from worker_svc.supervisor.spawn import IMPLEMENTATION, LaunchPlan, Spawned, Spawner, SpawnFailed
from worker_svc.supervisor.stops import Stops
from worker_svc.supervisor.timers import Timers, is_passing
from worker_svc.supervisor.transitions import Transitions


class Jobs:
    """All jobs that are not finished, their slots and their queue."""

    def __init__(
        self,
        state_dir: str,
        store: JobStore,
        ledger: Ledger,
        epoll: select.epoll,
        timers: Timers,
        mailbox: Mailbox,
        containment: Containment,
        spawner: str,
        inherited: Limits,
    ) -> None:
        """`inherited` is what jobs have of the limits that the supervisor changed for itself."""
        self.state_dir = state_dir
        self._hidden = os.path.realpath(state_dir)
        self.settings = Settings.from_store(store)
        self._store = store
        self._ledger = ledger
        self._epoll = epoll
        self._timers = timers
        self._transitions = Transitions(ledger)
        self.retention = Retention(state_dir, store, ledger)
        self.reserve = Reserve()
        self._boot_id = boot_id()
        self._by_id: dict[str, LiveJob] = {}
        self._by_pidfd: dict[int, LiveJob] = {}
        self._queue: OrderedDict[str, LiveJob] = OrderedDict()
        self.queued = 0
        self.running = 0
        self._mailbox = mailbox
        self._inherited = inherited
        self.containment = containment
        self.spawner = Spawner(
            lambda job, result: mailbox.post(partial(self._on_spawned, job, result), job), spawner or IMPLEMENTATION
        )
        self.outputs = Outputs(
            state_dir, self.spawner.implementation, mailbox, ledger, self._transitions, self._on_output_exceeded
        )
        self.stops = Stops(
            self._transitions,
            timers,
            containment,
            self._end_queued,
            self._on_unkillable,
            lambda job: self.spawner.kill(job),
            # In this turn, but after what is under way.
            lambda job: timers.after(0.0, partial(self.endings.look_again, job), job),
        )
        self.endings = Endings(containment, epoll, timers, self._end, self.lose)

    def __len__(self) -> int:
        return len(self._by_id)

    def stop_all(self) -> None:
        for job in list(self._by_id.values()):
            if job.state is not JobState.FINISHED:
                self.stops.stop(job)

    def get(self, job_id: str) -> LiveJob | None:
        return self._by_id.get(job_id)

    def with_pidfd(self, fd: int) -> LiveJob | None:
        return self._by_pidfd.get(fd)

    def accept(self, job: LiveJob, spec: JobSpec, stdin: bytes, text: str = "") -> None:
        """Takes a new job: into a slot, or into the queue. Raises ResourceExhausted, PreconditionFailed."""
        if not self.reserve.refill():
            raise ResourceExhausted("the supervisor is short of memory or of open files: try again later")
        check_floor(self.state_dir, self.settings)
        self._check_limits(spec)
        self.outputs.check(spec)
        has_slot = self.running < self.settings.slots and not self.queued
        if not has_slot and self.queued >= self.settings.queue_length:
            raise ResourceExhausted(
                f"all {self.settings.slots} slots are taken and {self.queued} jobs wait, which is as many as may "
                "(jobs.queue_length): try again later"
            )
        job.take(spec)
        self._by_id[job.job_id] = job
        self._ledger.add(job, spec, stdin, text)
        if has_slot:
            job.spec, job.stdin = spec, stdin
            self._launch(job)
        else:
            self._transitions.move(job, Event.ENQUEUE)
            self._queue[job.job_id] = job
            self.queued += 1
            self._ledger.then(partial(self._answer_queued, job))

    def _check_limits(self, spec: JobSpec) -> None:
        """Refused now rather than recorded and refused later, when its turn comes."""
        try:
            self.containment.check(spec.limits)
        except ContainmentError as error:
            raise PreconditionFailed(_text_of(error)) from error

    def take_back(self, job: LiveJob, error: JobError) -> None:
        """Its acceptance could not be recorded: it never was."""
        if job.state is JobState.FINISHED:  # stopped in the same turn: it holds nothing any more
            self.retention.on_deleted(0)
        elif job.state is JobState.QUEUED:
            self.queued -= 1
            del self._queue[job.job_id]
        else:
            self.running -= 1
        job.state = JobState.NEW
        del self._by_id[job.job_id]
        self._answer_start(job, error)

    def give_up(self, job: LiveJob, error: Exception, is_new: bool = False) -> None:
        """What fails in an unforeseen way for one job ends that job. `is_new`: it is not on record, and never was."""
        reason = error_message(f"the supervisor failed on it: {fault_text(error)}")
        if is_new:
            self.take_back(job, PreconditionFailed(f"the job cannot be recorded: {fault_text(error)}"))
        elif job.state is JobState.FINISHED:
            self._transitions.end_otherwise(job, f"lost: {reason}")
        elif job.is_spawning:
            job.fault = reason  # for when its process is there, or not
            self.spawner.kill(job)
        else:
            self._lose_and_answer(job, reason)

    def _lose_and_answer(self, job: LiveJob, reason: str) -> None:
        self.lose(job, reason)
        self._ledger.then(partial(self._answer_start, job, PreconditionFailed(f"lost: {reason}")))

    def promote(self) -> None:
        while self._queue and self.running < self.settings.slots and self.reserve.refill():
            _, job = self._queue.popitem(last=False)
            self.queued -= 1
            self._launch(job)

    def _launch(self, job: LiveJob) -> None:
        self.running += 1
        self._transitions.move(job, Event.LAUNCH, queued_ns=time.monotonic_ns() - job.waits_since_ns)
        self._ledger.then(partial(self._spawn, job))

    def _spawn(self, job: LiveJob) -> None:
        if job.state is not JobState.STARTING:  # taken back
            return
        try:
            plan = self._prepare(job)
        except Exception as error:
            if is_passing(error):
                raise
            self._mailbox.post(partial(self._on_spawned, job, SpawnFailed(_why(error))), job)
            return
        if failpoints.is_armed:
            failpoints.reach("before-spawn")
        job.is_spawning = True
        self.spawner.submit(job, plan)
        if job.timeout_s > 0:
            self._timers.after(job.timeout_s, partial(self.stops.on_start_timeout, job), job)

    def _prepare(self, job: LiveJob) -> LaunchPlan:
        """Raises sqlite3.Error, ContainmentError, SpawnFailed."""
        spec = job.spec or self._store.spec_of(job.ordinal)
        stdin = job.stdin or (self._store.stdin_of(job.ordinal) if spec.stdin_size_bytes else b"")
        job.take(spec)
        if spec.secret_env and not job.secrets:
            raise SpawnFailed("secret_env: its values were lost with the supervisor that held them: start another job")
        if job.container is None:
            job.container = self.containment.create(job.job_id, spec.limits, accepted_ns=job.accepted_ns)
        secrets, job.secrets = SecretEnv.unpack(job.secrets), b""
        job.spec, job.stdin = None, b""
        return LaunchPlan(
            argv=spec.checked_argv,
            env={
                **self.settings.base_env,
                **spec.env,
                **secrets,
                **self.containment.marks(job.container),
            },
            cgroup_fd=job.container.cgroup_fd,
            cwd=spec.cwd,
            stdin=stdin,
            stdout_path=output_path(self.state_dir, job.job_id),
            stderr_path=stderr_path(self.state_dir, job.job_id) if spec.separate_stderr else "",
            limits=spec.limits,
            inherited=self._inherited,
            identity=spec.identity,
            sandbox=spec.sandbox,
            hidden=self._hidden,
            user_env=self._user_env(spec),
            checked=spec.checked,
            output_via=spec.output_via,
        )

    def _user_env(self, spec: JobSpec) -> tuple[str, ...]:
        """A job of another user is not to find our HOME; what the spec itself sets stays."""
        if not spec.identity.user:
            return ()
        return tuple(name for name in self.settings.user_env if name not in spec.variables)

    def _on_spawned(self, job: LiveJob, result: Spawned | SpawnFailed) -> None:
        if failpoints.is_armed:
            failpoints.reach("after-spawn")
        job.is_spawning = False
        if isinstance(result, SpawnFailed) and job.given_up:
            timed_out = job.asked_cause is StopCause.TIMEOUT
            outcome = Outcome.TIMED_OUT if timed_out else Outcome.STOPPED
            why = f"timed out after {job.timeout_s:g} s" if timed_out else "stopped"
            self._finish(job, Event.SPAWN_FAILED, outcome=outcome, reason=f"{why} before it started")
            self._ledger.then(partial(self._answer_start, job))
            return
        if isinstance(result, SpawnFailed):
            self._finish(job, Event.SPAWN_FAILED, outcome=Outcome.START_FAILED, reason=str(result))
            self._ledger.then(partial(self._answer_start, job, PreconditionFailed(str(result))))
            return
        assert job.container is not None
        self.containment.started(job.container, result.pid, result.pidfd, result.start_ticks)
        if job.fault:
            job.pid, job.pidfd = result.pid, result.pidfd
            self.outputs.begin(job, result.outputs)
            self._lose_and_answer(job, job.fault)
            return
        self.go_on_running(job, result, wall_ns())

    def go_on_running(self, job: LiveJob, found: Spawned, started_ns: int) -> None:
        """The job's process is there: just spawned, or found by a new supervisor."""
        job.pid, job.pidfd = found.pid, found.pidfd
        job.started_monotonic_ns = time.monotonic_ns()
        changes = {
            "pid": job.pid,
            "started_ns": started_ns,
            "boot_id": self._boot_id,
            "start_ticks": found.start_ticks,
            "started_monotonic_ns": job.started_monotonic_ns,
        }
        self._transitions.move(job, Event.SPAWNED, changes=changes)
        self._ledger.then(partial(self._answer_start, job))
        self._timers.attempt(partial(self.watch, job, found.outputs), job)
        if job.asked is not None:
            self.stops.stop(job, *job.asked, cause=job.asked_cause)

    def watch(self, job: LiveJob, pipes: tuple[tuple[int, int], ...] = ()) -> None:
        """From now on its exit, its timeout and its output are looked after."""
        if job.state is JobState.FINISHED:  # before this could be tried again
            return
        if not job.has_outputs:
            if job.adopted:
                self.outputs.take_up(job, self.pids(job))
            else:
                self.outputs.begin(job, pipes)
        if job.pidfd not in self._by_pidfd:
            self._epoll.register(job.pidfd, select.EPOLLIN)
            self._by_pidfd[job.pidfd] = job
        if job.timeout_s > 0:
            age_s = (time.monotonic_ns() - job.started_monotonic_ns) / NS_PER_S
            self._timers.after(max(0.0, job.timeout_s - age_s), partial(self.stops.on_timeout, job), job)

    def pids(self, job: LiveJob) -> Iterator[int]:
        """Its processes: the first one, if that is there, and then, if one is not enough, all others."""
        if job.pidfd >= 0:
            yield job.pid
        assert job.container is not None
        yield from (one.pid for one in self.containment.survivors(job.container) if one.pid != job.pid)

    def _on_output_exceeded(self, job: LiveJob) -> None:
        if job.state is JobState.RUNNING:
            self.stops.stop(job, cause=StopCause.OUTPUT)
        elif job.state is JobState.STOPPING:  # it writes on, and its head cannot be dropped
            self.stops.kill_after(job, 0.0)

    def _on_unkillable(self, job: LiveJob) -> None:
        stuck = self.endings.survivors_text(job)
        if stuck != job.stuck:
            job.stuck = stuck
            note("job.unkillable", job_id=job.job_id, stuck=stuck)
            self._ledger.annotate(job, {"stuck": stuck})

    def _end(self, job: LiveJob, ended: Exit, outcome: Outcome, reason: str, stuck: str) -> None:
        self._finish(
            job,
            Event.EXIT,
            outcome=outcome,
            exit_code=ended.exit_code,
            signal=ended.signal,
            reason=reason,
            cpu_ns=ended.cpu_ns,
            changes={"peak_memory_bytes": ended.peak_memory_bytes, "stuck": stuck},
        )

    def lose(self, job: LiveJob, reason: str) -> None:
        self._finish(job, Event.LOSE, outcome=Outcome.LOST, reason=f"lost: {reason}")

    def _finish(self, job: LiveJob, event: Event, *, changes: dict[str, Any] | None = None, **fields: Any) -> None:
        """The one way out of life: records how it ended and lets go of all that it held."""
        ran_ns = time.monotonic_ns() - job.started_monotonic_ns if job.started_monotonic_ns else None
        if event is Event.LOSE:
            ran_ns = None  # nobody saw when it ended
        columns = {
            **(changes or {}),
            **{name: fields.get(name) for name in ("exit_code", "signal", "cpu_ns")},
            "outcome": int(fields["outcome"]),
            "reason": fields["reason"],
            "finished_ns": wall_ns(),
            "wall_ns": ran_ns,
            **({"paused": 0} if job.paused else {}),
            **self.outputs.end(job),
        }
        self.retention.on_finished(columns["stored_bytes"])
        if job.state is JobState.QUEUED:
            self.queued -= 1
            del self._queue[job.job_id]
        else:
            self.running -= 1
        self._transitions.move(job, event, changes=columns, wall_ns=ran_ns, **fields)
        if job.container is not None:
            self.endings.let_go(job.container)
            job.container = None
        if job.pidfd >= 0:
            # Before closing: epoll was seen to report a closed pidfd.
            if self._by_pidfd.pop(job.pidfd, None):
                self._epoll.unregister(job.pidfd)
            os.close(job.pidfd)
            job.pidfd = -1
        self._ledger.then(partial(self._let_go, job))

    def _end_queued(self, job: LiveJob) -> None:
        self._finish(job, Event.STOP, outcome=Outcome.STOPPED, reason="stopped before it started")

    def _let_go(self, job: LiveJob) -> None:
        """Only now that its end is on disk: until then the store would say it still runs."""
        if self._by_id.get(job.job_id) is job:  # else it was taken back
            del self._by_id[job.job_id]

    def _answer_queued(self, job: LiveJob) -> None:
        if job.state is not JobState.STARTING:  # else a slot fell free in the same turn: the spawn will answer
            self._answer_start(job)

    def _answer_start(self, job: LiveJob, error: JobError | None = None) -> None:
        waiting, job.waiting = job.waiting or [], None
        for connection, request, existed in waiting:
            if error is not None:
                connection.send({"r": request, "error": error.code, "text": error.message})
            else:
                connection.send({"r": request, "ok": {"state": int(job.state), "existed": existed}})

    def put_back(self, row: LiveRow) -> LiveJob:
        """A job that an earlier supervisor left, as it was recorded; not watched yet."""
        job = LiveJob(row.job_id, row.fingerprint, row.accepted_ns, row.owner)
        job.ordinal, job.state = row.ordinal, row.state
        job.waits_since_ns -= max(0, wall_ns() - row.accepted_ns)
        job.stop_cause = StopCause(row.stop_cause)
        job.started_monotonic_ns = row.started_monotonic_ns
        job.pid, job.paused = row.pid, bool(row.paused)
        self._by_id[job.job_id] = job
        if row.state is JobState.QUEUED:
            self._queue[job.job_id] = job
            self.queued += 1
        else:
            self.running += 1
        return job


def _why(error: Exception) -> str:
    if isinstance(error, ContainmentError):
        return _text_of(error)
    if isinstance(error, SpawnFailed):
        return str(error)
    if isinstance(error, sqlite3.Error):
        return f"the job's record could not be read: {error}"
    return f"the supervisor could not prepare it: {fault_text(error)}"


def _text_of(error: ContainmentError) -> str:
    """In the words of the API, where the limits are fields of `limits`."""
    return f"limits.{error.message}" if error.limit else error.message
