"""A new supervisor goes on with what an earlier one left: once, before the first turn."""

from __future__ import annotations

import os
import sqlite3

from worker_svc.job import JobSpec, JobState, StopCause
from worker_svc.linux import clocks, failpoints
from worker_svc.record.store import JobStore, LiveRow
from worker_svc.supervisor import adoption
from worker_svc.supervisor.jobs import Jobs
from worker_svc.supervisor.journal import note
from worker_svc.supervisor.livejob import LiveJob
from worker_svc.supervisor.spawn import Spawned


def recover(jobs: Jobs, store: JobStore, *, owns_processes: bool) -> None:
    """owns_processes: false for the copy of a state directory, whose jobs are the original's."""
    boot_id = clocks.boot_id()
    rebooted = store.get_meta("boot_id") not in (None, boot_id)
    for row in store.live():
        job = jobs.put_back(row)
        try:
            _recover(jobs, job, row, store, boot_id, rebooted, owns_processes=owns_processes)
        except (KeyError, TypeError, ValueError) as error:  # its record is not what it should be: others' are
            jobs.give_up(job, error)
    jobs.endings.end_strangers()
    if failpoints.is_armed:
        failpoints.reach("in-recovery")
    _remember(store, "boot_id", boot_id)
    _remember(store, "cgroup_base", os.fsencode(jobs.containment.base_path))
    note("supervisor.recovered", running=jobs.running, queued=jobs.queued, sequence=store.sequence)


def _recover(
    jobs: Jobs, job: LiveJob, row: LiveRow, store: JobStore, boot_id: str, rebooted: bool, *, owns_processes: bool
) -> None:
    reason = adoption.lost_reason(row, boot_id, owns_processes)
    if reason:
        jobs.lose(job, reason)
    elif row.state is JobState.QUEUED:
        if rebooted and jobs.settings.on_reboot == "drop":
            jobs.lose(job, "machine rebooted before it started (jobs.on_reboot is drop)")
    elif row.state is JobState.STARTING:
        _find_started(jobs, job, store, rebooted)
    else:
        _adopt(jobs, job, row, store)


def _adopt(jobs: Jobs, job: LiveJob, row: LiveRow, store: JobStore) -> None:
    pidfd = adoption.open_pidfd(row.pid, row.start_ticks)
    job.adopted = True
    if pidfd is None:
        job.container = jobs.containment.adopt(job.job_id, accepted_ns=job.accepted_ns)
        _lose(jobs, job, store.spec_of(job.ordinal), "it ended while no supervisor was there")
        return
    job.pidfd = pidfd
    job.container = jobs.containment.adopt(job.job_id, row.pid, pidfd, row.start_ticks, accepted_ns=job.accepted_ns)
    job.take(store.spec_of(job.ordinal))
    jobs.watch(job)
    jobs.stops.thaw_if_unrecorded(job)
    if job.state is JobState.STOPPING:
        jobs.stops.kill_after(job, job.stop_grace_s)


def _find_started(jobs: Jobs, job: LiveJob, store: JobStore, rebooted: bool) -> None:
    """Takes in a job that was about to start: its process may be there, without a record."""
    if rebooted:
        jobs.lose(job, "machine rebooted while it started; it may or may not have run")
        return
    job.adopted = True
    job.container = jobs.containment.adopt(job.job_id, accepted_ns=job.accepted_ns)
    spec = store.spec_of(job.ordinal)
    leader = jobs.containment.find_leader(job.container)
    # Not just any of it that leads a session: the job's own first process may be gone already, and its end with it.
    is_it = leader is not None and adoption.may_run(leader.pid, spec.argv)
    pidfd = adoption.open_pidfd(leader.pid, leader.start_ticks) if leader and is_it else None
    if leader is None or pidfd is None:
        _lose(jobs, job, spec, "the supervisor died while it started the job, which may or may not have run")
        return
    jobs.containment.take_over(job.container, leader.pid, pidfd, leader.start_ticks)
    job.take(spec)
    if job.stop_cause is not StopCause.NONE:
        job.asked_cause, job.stop_cause, job.asked = job.stop_cause, StopCause.NONE, (None, None)
    jobs.go_on_running(job, Spawned(leader.pid, pidfd, leader.start_ticks), clocks.wall_ns())


def _lose(jobs: Jobs, job: LiveJob, spec: JobSpec, reason: str) -> None:
    """Its first process is gone. What is left of it, which may hold some of its output, is ended with it."""
    assert job.container is not None
    job.take(spec)
    jobs.outputs.take_up(job, jobs.pids(job))
    jobs.containment.kill(job.container)
    jobs.lose(job, reason)


def _remember(store: JobStore, key: str, value: str | bytes) -> None:
    """A full disk must not keep us from taking over."""
    if store.get_meta(key) == value:
        return
    try:
        store.set_meta(key, value)
    except sqlite3.Error as error:
        note("store.failed", reason=str(error))
