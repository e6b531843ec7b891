"""A new supervisor goes on with what an earlier one left: once, before the first turn."""

from __future__ import annotations

import os
import sqlite3

from worker_svc.job import JobState, StopCause
from worker_svc.linux import clocks, failpoints
from worker_svc.record.schema import LiveRow
from worker_svc.record.writer import JobStore
from worker_svc.supervisor.containment import Container
from worker_svc.supervisor.journal import note
from worker_svc.supervisor.life import adoption
from worker_svc.supervisor.life.house import House
from worker_svc.supervisor.life.job import Ask, Job, Live, Terms
from worker_svc.supervisor.life.jobs import Jobs
from worker_svc.supervisor.life.process import Process
from worker_svc.supervisor.life.running import Alive, Running, Stopping
from worker_svc.supervisor.life.starting import Queued, Starting
from worker_svc.supervisor.spawn import Spawned


class Recorded(Live):
    """What the record tells of a job that was not looked for yet, in the state that it has there."""

    __slots__ = ("_pid", "container", "paused", "process", "state")

    def __init__(self, house: House, job: Job, row: LiveRow) -> None:
        super().__init__(house, job)
        self.state = row.state
        self._pid, self.paused = row.pid, bool(row.paused)
        self.container: Container | None = None
        self.process: Process | None = None

    @property
    def pid(self) -> int:
        return self._pid


def recover(jobs: Jobs, *, owns_processes: bool) -> None:
    """owns_processes: false for the copy of a state directory, whose jobs are the original's."""
    store = jobs.store
    rebooted = store.get_meta("boot_id") not in (None, jobs.boot_id)
    for row in store.live():
        job = Job(row.job_id, row.fingerprint, row.accepted_ns, row.owner)
        job.ordinal = row.ordinal
        jobs.by_id[job.job_id] = job
        recorded = Recorded(jobs, job, row)
        jobs.moves.put_back(job, recorded)
        try:
            _recover(jobs, recorded, row, rebooted, owns_processes=owns_processes)
        except (KeyError, TypeError, ValueError) as error:  # its record is not what it should be: others' are
            jobs.give_up(job, error)
    jobs.remains.end_strangers()
    if failpoints.is_armed:
        failpoints.reach("in-recovery")
    _remember(store, "boot_id", jobs.boot_id)
    _remember(store, "cgroup_base", os.fsencode(jobs.containment.base_path))
    note("supervisor.recovered", running=jobs.running, queued=jobs.queued, sequence=store.sequence)


def _recover(jobs: Jobs, recorded: Recorded, row: LiveRow, rebooted: bool, *, owns_processes: bool) -> None:
    job = recorded.job
    reason = adoption.lost_reason(row, jobs.boot_id, owns_processes)
    if reason:
        jobs.lose(job, reason)
    elif row.state is JobState.QUEUED:
        if rebooted and jobs.settings.on_reboot == "drop":
            jobs.lose(job, "machine rebooted before it started (jobs.on_reboot is drop)")
        else:
            waited_ns = max(0, clocks.wall_ns() - row.accepted_ns)
            jobs.moves.put_back(job, Queued(jobs, job, waited_ns=waited_ns))
    elif row.state is JobState.STARTING:
        _find_started(jobs, recorded, StopCause(row.stop_cause), rebooted)
    else:
        _adopt(jobs, recorded, row)


def _adopt(jobs: Jobs, recorded: Recorded, row: LiveRow) -> None:
    job = recorded.job
    container = recorded.container = jobs.containment.adopt(job.job_id, accepted_ns=job.accepted_ns)
    terms = Terms.of(jobs.store.spec_of(job.ordinal))
    pidfd = adoption.open_pidfd(row.pid, row.start_ticks)
    if pidfd is None:
        _lose(jobs, recorded, container, terms, "it ended while no supervisor was there")
        return
    jobs.containment.take_over(container, row.pid, pidfd, row.start_ticks)
    process = Process(jobs, job, terms, container, row.started_monotonic_ns)
    stage: Alive = (
        Stopping(process, StopCause(row.stop_cause))
        if row.state is JobState.STOPPING
        else Running(process, paused=recorded.paused)
    )
    jobs.moves.put_back(job, stage)
    process.watch()
    # The supervisor that froze it may have died before that was on record.
    if not stage.paused and jobs.containment.is_frozen(container):
        jobs.timers.attempt(process.thaw, job)
    if isinstance(stage, Stopping):
        stage.kill_after()


def _find_started(jobs: Jobs, recorded: Recorded, cause: StopCause, rebooted: bool) -> None:
    """Takes in a job that was about to start: its process may be there, without a record."""
    job = recorded.job
    if rebooted:
        jobs.lose(job, "machine rebooted while it started; it may or may not have run")
        return
    container = recorded.container = jobs.containment.adopt(job.job_id, accepted_ns=job.accepted_ns)
    spec = jobs.store.spec_of(job.ordinal)
    leader = jobs.containment.find_leader(container)
    # Not just any of it that leads a session: the job's own first process may be gone already, and its end with it.
    is_it = leader is not None and adoption.may_run(leader.pid, spec.argv)
    pidfd = adoption.open_pidfd(leader.pid, leader.start_ticks) if leader and is_it else None
    if leader is None or pidfd is None:
        reason = "the supervisor died while it started the job, which may or may not have run"
        _lose(jobs, recorded, container, Terms.of(spec), reason)
        return
    jobs.containment.take_over(container, leader.pid, pidfd, leader.start_ticks)
    starting = Starting(jobs, job, spec=spec)
    starting.container = container
    if cause is not StopCause.NONE:
        starting.asked = Ask(cause=cause)
    jobs.moves.put_back(job, starting)
    starting.run(Spawned(leader.pid, pidfd, leader.start_ticks), clocks.wall_ns())


def _lose(jobs: Jobs, recorded: Recorded, container: Container, terms: Terms, reason: str) -> None:
    """Its first process is gone. What is left of it, which may hold some of its output, is ended with it."""
    recorded.process = process = Process(jobs, recorded.job, terms, container, 0)
    jobs.outputs.take_up(process.output, (one.pid for one in jobs.containment.survivors(container)))
    jobs.lose(recorded.job, reason, is_gone=jobs.containment.kill(container))


def _remember(store: JobStore, key: str, value: str | bytes) -> None:
    """A full disk must not keep us from taking over."""
    if store.get_meta(key) == value:
        return
    try:
        store.set_meta(key, value)
    except sqlite3.Error as error:
        note("store.failed", reason=str(error))
