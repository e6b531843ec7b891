"""What a worker can ask: each request decoded, decided and answered."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from worker_svc.ipc import frames
from worker_svc.job import (
    DURATION_MAX_S,
    SPEC_MAX_BYTES,
    InvalidArgument,
    JobError,
    JobExists,
    JobNotFound,
    JobSpec,
    JobState,
    KnownJob,
    Outcome,
    PreconditionFailed,
    SecretEnv,
    Unavailable,
    check_job_id,
    error_message,
    fault_text,
)
from worker_svc.linux.clocks import wall_ns
from worker_svc.record.store import JobStore
from worker_svc.supervisor.connections import Connection, Key
from worker_svc.supervisor.journal import note
from worker_svc.supervisor.ledger import Ledger
from worker_svc.supervisor.life.job import Ask, Job
from worker_svc.supervisor.life.jobs import Jobs
from worker_svc.supervisor.life.running import Alive, Running
from worker_svc.supervisor.life.starting import Queued
from worker_svc.supervisor.settings import Settings
from worker_svc.supervisor.spec_check import check_spec

VERSION_MISMATCH: Final = "version"
SECOND_WORKER: Final = "second_worker"


class Requests:
    def __init__(self, jobs: Jobs, store: JobStore, ledger: Ledger, key: Key) -> None:
        self._jobs = jobs
        self._key = key
        self._started_ns, self._started_monotonic_ns = wall_ns(), time.monotonic_ns()
        self.is_shutting_down = False
        """Whether it goes away once no job is left, and takes none."""
        self._worker: Connection | None = None
        self._store = store
        self._ledger = ledger
        self._handlers = {
            "start": self._start,
            "stop": self._stop,
            "signal": self._signal,
            "pause": self._pause,
            "resume": self._resume,
            "delete": self._delete,
            "status": self._status,
            "shutdown": self._shutdown,
        }

    def handle(self, connection: Connection, frame: frames.Frame) -> None:
        request = frame.header.get("r", 0)
        op = frame.header.get("op")
        try:
            if op == "hello":
                self._hello(connection, request, frame.header)
                return
            if not connection.greeted:
                raise InvalidArgument("op", "the first request must be hello")
            handler = self._handlers.get(op) if isinstance(op, str) else None
            if handler is None:
                raise InvalidArgument("op", f"there is no request {op!r}")
            _check_owner(frame.header, self._owner_of)
            handler(connection, request, frame)
        except JobError as error:
            connection.send({"r": request, "error": error.code, "text": error.message})
        except sqlite3.Error as error:
            connection.send({"r": request, "error": Unavailable.code, "text": f"the store cannot be read now: {error}"})
        except (OSError, MemoryError) as error:  # out of files, as a rule
            text = f"the supervisor cannot do it now: {getattr(error, 'strerror', '') or str(error) or 'out of memory'}"
            connection.send({"r": request, "error": Unavailable.code, "text": text})
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            text = error_message(f"malformed {op}: {fault_text(error)}")
            connection.send({"r": request, "error": InvalidArgument.code, "text": text})

    def _hello(self, connection: Connection, request: int, header: dict[str, Any]) -> None:
        if header["protocol"] != frames.PROTOCOL_VERSION:
            text = (
                f"the supervisor (pid {os.getpid()}) speaks protocol {frames.PROTOCOL_VERSION}, the worker "
                f"{header['protocol']}: run a worker of the supervisor's version, or end the supervisor once its "
                "jobs are done"
            )
            note("connection.refused", reason=text)
            connection.send({"r": request, "error": VERSION_MISMATCH, "text": text})
            return
        if not self._key.is_right(header["key"]):
            self._key.keep()  # for who reads it next
            raise Unavailable(f"the supervisor (pid {os.getpid()}) was not shown what is in {frames.KEY_NAME}")
        if header.get("exclusive"):
            other = self._worker
            if other is not None and other.pid != connection.pid and not other.is_hung_up():
                whose = f"{self._jobs.state_dir} is in use by another worker (pid {other.pid})"
                text = f"state.dir: {whose}: end that one, or set another"
                note("connection.refused", reason=text)
                connection.send({"r": request, "error": SECOND_WORKER, "text": text})
                return
            self._worker = connection
        settings = Settings.from_json(header["settings"])
        if settings != self._jobs.settings:
            self._keep(settings)
        connection.greeted = True
        ok = {
            "protocol": frames.PROTOCOL_VERSION,
            "pid": os.getpid(),
            "started_ns": self._started_ns,
            "state_id": self._store.state_id,
            "cgroup": self._jobs.containment.kinship.cgroup,
            "seq": self._store.sequence,
            "is_shutting_down": self.is_shutting_down,
        }
        connection.send({"r": request, "ok": ok})

    def _keep(self, settings: Settings) -> None:
        self._jobs.settings = settings
        try:
            settings.to_store(self._store)
        except sqlite3.Error as error:
            # They hold all the same, for as long as this supervisor lives.
            note("settings.not_kept", reason=str(error))

    def _start(self, connection: Connection, request: int, frame: frames.Frame) -> None:
        job_id, fingerprint = str(frame.header["id"]), str(frame.header["fp"])
        owner = str(frame.header.get("owner", ""))
        check_job_id(job_id, "job_id")
        live = self._jobs.get(job_id)
        if live is not None:
            _check_same((owner, fingerprint), (live.owner, live.fingerprint))
            if isinstance(live.now, Queued) and not live.now.secrets:  # lost with an earlier supervisor
                live.now.secrets = _secrets_of(frame)
            self._join(live, connection, request)
            return
        # An id the worker has just made up cannot be on record.
        if not frame.header.get("new"):
            known = self._store.ever_known(job_id)
            if known is not None:
                _check_same((owner, fingerprint), (known.owner, known.fingerprint))
                connection.send({"r": request, **_answer_of(known)})
                return
        if self._ledger.failure:
            raise self._ledger.refusal()
        if self.is_shutting_down:
            raise Unavailable(
                f"the supervisor was told to shut down (ShutdownWorker), takes no new job and leaves when the "
                f"{len(self._jobs)} it has have ended: a worker that is started then takes jobs again"
            )
        if "spec_bytes" not in frame.header:  # it was thought to be there
            raise JobNotFound
        spec, text, rest = _spec_of(frame)
        stdin, secrets = rest[: spec.stdin_size_bytes], rest[spec.stdin_size_bytes :]
        if [*SecretEnv.unpack(secrets)] != [*spec.secret_env]:
            raise InvalidArgument("secret_env", "its values are not those of its names")
        job = Job(job_id, fingerprint, wall_ns(), owner)
        job.waiting = [(connection, request, False)]
        self._jobs.accept(job, spec, stdin, secrets, text)

    def _join(self, job: Job, connection: Connection, request: int) -> None:
        if job.waiting is not None:
            job.waiting.append((connection, request, True))
        else:
            connection.send({"r": request, "ok": {"state": int(job.state), "existed": True}})

    def _stop(self, connection: Connection, request: int, frame: frames.Frame) -> None:
        job = self._jobs.get(frame.header["id"])
        if job is None:
            self._on_record(frame.header["id"])
        elif job.state is not JobState.FINISHED:
            job.now.stop(Ask(_signal_of(frame.header), _grace_of(frame.header)))
        self._ledger.then(partial(connection.send, {"r": request, "ok": {}}))

    def _signal(self, connection: Connection, request: int, frame: frames.Frame) -> None:
        job = self._jobs.get(frame.header["id"])
        state = job.state if job else self._on_record(frame.header["id"]).state
        if job is None or not isinstance(job.now, Alive):
            raise PreconditionFailed(f"the job is {state.name}: only a running one can be signalled")
        number = _signal_of(frame.header)
        if number is None:
            raise InvalidArgument("signal", "must not be empty")
        if job.now.paused and number == signal.SIGCONT:
            raise PreconditionFailed(
                "the job is paused: ResumeJob lets it go on, SIGCONT would behind the record's back"
            )
        job.now.process.signal(number)
        connection.send({"r": request, "ok": {}})

    def _pause(self, connection: Connection, request: int, frame: frames.Frame) -> None:
        running = self._running(frame.header["id"], "paused")
        if not running.paused:
            running.pause()
        self._ledger.then(partial(connection.send, {"r": request, "ok": {}}))

    def _resume(self, connection: Connection, request: int, frame: frames.Frame) -> None:
        running = self._running(frame.header["id"], "resumed")
        if running.paused:
            running.resume()
        self._ledger.then(partial(connection.send, {"r": request, "ok": {}}))

    def _running(self, job_id: str, verb: str) -> Running:
        job = self._jobs.get(job_id)
        state = job.state if job else self._on_record(job_id).state
        if job is None or not isinstance(job.now, Running):
            raise PreconditionFailed(f"the job is {state.name}: only a running one can be {verb}")
        return job.now

    def _delete(self, connection: Connection, request: int, frame: frames.Frame) -> None:
        job_id = frame.header["id"]
        job = self._jobs.get(job_id)
        if job is not None:
            raise PreconditionFailed(f"the job is {job.state.name}: stop it first, then delete it")
        row = self._store.finished(job_id)
        if row is None:
            raise JobNotFound
        self._jobs.retention.delete(row, self._jobs.settings.keep_ids if frame.header.get("remember") else 0)
        self._ledger.then(partial(connection.send, {"r": request, "ok": {}}))

    def _status(self, connection: Connection, request: int, frame: frames.Frame) -> None:
        ok = {
            "running": self._jobs.running,
            "queued": self._jobs.queued,
            "seq": self._store.sequence,
            "uptime_ns": time.monotonic_ns() - self._started_monotonic_ns,
            "pid": os.getpid(),
            "containment": self._jobs.containment.level,
            "containment_reason": self._jobs.containment.reason,
            "spawner": self._jobs.spawner.implementation,
            "unenforceable": self._jobs.containment.unenforceable(),
            "can_drop_head": self._jobs.outputs.can_drop_head,
            "output_degraded": self._jobs.outputs.degraded,
            "is_shutting_down": self.is_shutting_down,
        }
        connection.send({"r": request, "ok": ok})

    def _shutdown(self, connection: Connection, request: int, frame: frames.Frame) -> None:
        note("supervisor.asked_to_leave", jobs=len(self._jobs), stop_jobs=bool(frame.header.get("stop_jobs")))
        self.is_shutting_down = True
        if frame.header.get("stop_jobs"):
            self._jobs.stop_all()
        self._ledger.then(partial(connection.send, {"r": request, "ok": {"jobs": len(self._jobs)}}))

    def _owner_of(self, job_id: str) -> str:
        live = self._jobs.get(job_id)
        return live.owner if live else self._on_record(job_id).owner

    def _on_record(self, job_id: str) -> KnownJob:
        known = self._store.known(job_id)
        if known is None:
            raise JobNotFound
        return known


def _spec_of(frame: frames.Frame) -> tuple[JobSpec, str, bytes]:
    """The spec, its text, and what comes after that. Raises ValueError, TypeError, InvalidArgument."""
    size = frame.header["spec_bytes"]
    if not 0 <= size <= SPEC_MAX_BYTES:
        raise InvalidArgument("spec_bytes", f"must be from 0 to {SPEC_MAX_BYTES}, not {size}")
    text = frame.body[:size].decode("ascii")
    spec = JobSpec.from_text(text)
    check_spec(spec)
    return spec, text, frame.body[size:]


def _secrets_of(frame: frames.Frame) -> bytes:
    if "spec_bytes" not in frame.header:
        return frame.body
    spec, _, rest = _spec_of(frame)
    return rest[spec.stdin_size_bytes :]


def _signal_of(header: dict[str, Any]) -> int | None:
    """Checked before anything moves: a half-made stop cannot be undone."""
    number = header.get("signal")
    if number is None:
        return None
    if not isinstance(number, int) or number not in signal.valid_signals():
        raise InvalidArgument("signal", f"there is no signal {number!r}")
    return number


def _grace_of(header: dict[str, Any]) -> float | None:
    grace_s = header.get("grace_s")
    if grace_s is None:
        return None
    if not isinstance(grace_s, int | float) or not 0 <= grace_s <= DURATION_MAX_S:
        raise InvalidArgument("grace", f"must be from 0 to {DURATION_MAX_S:.0f} s, not {grace_s!r}")
    return float(grace_s)


def _check_owner(header: dict[str, Any], owner_of: Callable[[str], str]) -> None:
    """A request that is for the jobs of one owner only finds no others. (The worker has looked already; the job may be
    another one by now.)"""
    whose = header.get("of")
    if whose is not None and owner_of(header["id"]) != whose:
        raise JobNotFound


def _check_same(asked: tuple[str, str], existing: tuple[str, str]) -> None:
    if asked != existing:
        raise JobExists("job_id: belongs to a job with another spec: choose another id")


def _answer_of(known: KnownJob) -> dict[str, Any]:
    """What a start is told of a job that is finished already: the same as the first one was."""
    if known.outcome is Outcome.START_FAILED:
        return {"error": PreconditionFailed.code, "text": known.reason}
    return {"ok": {"state": int(known.state), "existed": True}}
