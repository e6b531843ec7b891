"""What a worker can ask: each request decoded, decided and answered."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from functools import partial

from worker_svc.ipc.frames import Frame
from worker_svc.ipc.messages import (
    PROTOCOL_VERSION,
    SECOND_WORKER,
    VERSION_MISMATCH,
    Delete,
    Done,
    GetStatus,
    Hello,
    Leaving,
    OfJob,
    OtherProtocol,
    Pause,
    Refused,
    Request,
    Resume,
    SendSignal,
    Settings,
    Shutdown,
    Start,
    Started,
    Status,
    Stop,
    Welcome,
    decode,
    number_of,
)
from worker_svc.job import (
    DURATION_MAX_S,
    SPEC_MAX_BYTES,
    InvalidArgument,
    JobError,
    JobExists,
    JobNotFound,
    JobSpec,
    JobState,
    Outcome,
    PreconditionFailed,
    SecretEnv,
    Unavailable,
    check_job_id,
    fault_text,
)
from worker_svc.linux.clocks import wall_ns
from worker_svc.record.paths import KEY_NAME
from worker_svc.record.writer import JobStore
from worker_svc.supervisor.connections import Connection, Key
from worker_svc.supervisor.journal import note
from worker_svc.supervisor.ledger import Ledger
from worker_svc.supervisor.life.job import Ask, Job
from worker_svc.supervisor.life.jobs import Jobs
from worker_svc.supervisor.life.running import Alive, Running
from worker_svc.supervisor.life.starting import Queued
from worker_svc.supervisor.settings import keep_settings
from worker_svc.supervisor.spec_check import check_spec


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

    def handle(self, connection: Connection, frame: Frame) -> None:
        number = number_of(frame)
        try:
            request = decode(frame)
            if isinstance(request, Hello):
                connection.send(number, self._hello(connection, request))
            elif not connection.greeted:
                raise InvalidArgument("op", "the first request must be hello")
            elif isinstance(request, Start):
                self._start(connection, number, request)
            elif isinstance(request, GetStatus):
                connection.send(number, self._status())
            elif isinstance(request, Request):
                answer = self._carry_out(request)
                if isinstance(request, SendSignal):  # nothing of it is recorded
                    connection.send(number, answer)
                else:
                    self._ledger.then(partial(connection.send, number, answer))
            else:
                raise InvalidArgument("op", "is no request")
        except OtherProtocol as protocol:
            connection.send(number, _refused(VERSION_MISMATCH, _mismatch_text(protocol)))
        except JobError as error:
            connection.send(number, Refused.by(error))
        except sqlite3.Error as error:
            connection.send(number, Refused(Unavailable.code, f"the store cannot be read now: {error}"))
        except (OSError, MemoryError) as error:  # out of files, as a rule
            text = f"the supervisor cannot do it now: {getattr(error, 'strerror', '') or str(error) or 'out of memory'}"
            connection.send(number, Refused(Unavailable.code, text))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            connection.send(number, Refused.by(InvalidArgument("the request is malformed", fault_text(error))))

    def _hello(self, connection: Connection, hello: Hello) -> Welcome | Refused:
        if not self._key.is_right(hello.key):
            self._key.keep()  # for who reads it next
            raise Unavailable(f"the supervisor (pid {os.getpid()}) was not shown what is in {KEY_NAME}")
        if hello.exclusive:
            other = self._worker
            if other is not None and other.pid != connection.pid and not other.is_hung_up():
                whose = f"{self._jobs.state_dir} is in use by another worker (pid {other.pid})"
                return _refused(SECOND_WORKER, f"state.dir: {whose}: end that one, or set another")
            self._worker = connection
        if hello.settings != self._jobs.settings:
            self._keep(hello.settings)
        connection.greeted = True
        return Welcome(
            PROTOCOL_VERSION,
            os.getpid(),
            self._started_ns,
            self._store.state_id,
            self._jobs.containment.kinship.cgroup,
            self._store.sequence,
            self.is_shutting_down,
        )

    def _keep(self, settings: Settings) -> None:
        self._jobs.settings = settings
        try:
            keep_settings(self._store, settings)
        except sqlite3.Error as error:
            # They hold all the same, for as long as this supervisor lives.
            note("settings.not_kept", reason=str(error))

    def _start(self, connection: Connection, number: int, start: Start) -> None:
        job_id, asked = start.job_id, (start.owner, start.fingerprint)
        check_job_id(job_id, "job_id")
        live = self._jobs.get(job_id)
        if live is not None:
            _check_same(asked, (live.owner, live.fingerprint))
            if isinstance(live.now, Queued) and not live.now.secrets:  # lost with an earlier supervisor
                live.now.secrets = start.secrets
            if live.waiting is not None:
                live.waiting.append((connection, number, True))
            else:
                connection.send(number, Started(int(live.state), existed=True))
            return
        # An id the worker has just made up cannot be on record.
        known = None if start.is_new else self._store.ever_known(job_id)
        if known is not None:
            _check_same(asked, (known.owner, known.fingerprint))
            if known.outcome is Outcome.START_FAILED:  # the same as the first one was told
                raise PreconditionFailed(known.reason)
            connection.send(number, Started(int(known.state), existed=True))
            return
        if self._ledger.failure:
            raise self._ledger.refusal()
        if self.is_shutting_down:
            raise Unavailable(
                f"the supervisor was told to shut down (ShutdownWorker), takes no new job and leaves when the "
                f"{len(self._jobs)} it has have ended: a worker that is started then takes jobs again"
            )
        if not start.spec:  # it was thought to be there
            raise JobNotFound
        spec, text = _spec_of(start)
        job = Job(job_id, start.fingerprint, wall_ns(), start.owner)
        job.waiting = [(connection, number, False)]
        self._jobs.accept(job, spec, start.stdin, start.secrets, text)

    def _carry_out(self, request: OfJob | Shutdown) -> Done | Leaving:
        if isinstance(request, Shutdown):
            return self._shutdown(request)
        job = self._jobs.get(request.job_id)
        owner, state = (job.owner, job.state) if job else self._on_record(request.job_id)
        # The worker has looked whose it is already; the job of this id may be another one by now.
        if request.owner not in (None, owner):
            raise JobNotFound
        match request:
            case Stop():
                _check_signal(request.signal)
                if request.grace_s is not None and not 0 <= request.grace_s <= DURATION_MAX_S:
                    raise InvalidArgument("grace", f"must be from 0 to {DURATION_MAX_S:.0f} s, not {request.grace_s:g}")
                if job is not None and state is not JobState.FINISHED:
                    job.now.stop(Ask(request.signal, request.grace_s))
            case SendSignal():
                _signal(job, state, request.signal)
            case Pause():
                if not (running := _running(job, state, "paused")).paused:
                    running.pause()
            case Resume():
                if (running := _running(job, state, "resumed")).paused:
                    running.resume()
            case Delete():
                self._delete(job, request)
        return Done()

    def _delete(self, job: Job | None, request: Delete) -> None:
        if job is not None:
            raise PreconditionFailed(f"the job is {job.state.name}: stop it first, then delete it")
        row = self._store.finished(request.job_id)
        if row is None:
            raise JobNotFound
        self._jobs.retention.delete(row, self._jobs.settings.keep_ids if request.remember else 0)

    def _shutdown(self, request: Shutdown) -> Leaving:
        note("supervisor.asked_to_leave", jobs=len(self._jobs), stop_jobs=request.stop_jobs)
        self.is_shutting_down = True
        if request.stop_jobs:
            self._jobs.stop_all()
        return Leaving(len(self._jobs))

    def _status(self) -> Status:
        jobs = self._jobs
        return Status(
            running=jobs.running,
            queued=jobs.queued,
            sequence=self._store.sequence,
            uptime_ns=time.monotonic_ns() - self._started_monotonic_ns,
            pid=os.getpid(),
            containment=jobs.containment.level,
            containment_reason=jobs.containment.reason,
            spawner=jobs.spawner.implementation,
            unenforceable=jobs.containment.unenforceable(),
            can_drop_head=jobs.outputs.can_drop_head,
            output_degraded=jobs.outputs.degraded,
            is_shutting_down=self.is_shutting_down,
        )

    def _on_record(self, job_id: str) -> tuple[str, JobState]:
        """Owner and state."""
        known = self._store.known(job_id)
        if known is None:
            raise JobNotFound
        return known.owner, known.state


def _spec_of(start: Start) -> tuple[JobSpec, str]:
    """The spec, and its text. Raises ValueError, TypeError, InvalidArgument."""
    if len(start.spec) > SPEC_MAX_BYTES:
        raise InvalidArgument("spec", f"must be at most {SPEC_MAX_BYTES} bytes, not {len(start.spec)}")
    text = start.spec.decode("ascii")
    spec = JobSpec.from_text(text)
    check_spec(spec)
    if len(start.stdin) != spec.stdin_size_bytes:
        raise InvalidArgument("stdin", f"is {len(start.stdin)} bytes, not {spec.stdin_size_bytes}")
    if [*SecretEnv.unpack(start.secrets)] != [*spec.secret_env]:
        raise InvalidArgument("secret_env", "its values are not those of its names")
    return spec, text


def _check_signal(number: int | None) -> None:
    """Before anything moves: a half-made stop cannot be undone."""
    if number is not None and number not in signal.valid_signals():
        raise InvalidArgument("signal", f"there is no signal {number}")


def _signal(job: Job | None, state: JobState, number: int) -> None:
    if job is None or not isinstance(job.now, Alive):
        raise PreconditionFailed(f"the job is {state.name}: only a running one can be signalled")
    _check_signal(number)
    if job.now.paused and number == signal.SIGCONT:
        raise PreconditionFailed("the job is paused: ResumeJob lets it go on, SIGCONT would behind the record's back")
    job.now.process.signal(number)


def _running(job: Job | None, state: JobState, verb: str) -> Running:
    if job is None or not isinstance(job.now, Running):
        raise PreconditionFailed(f"the job is {state.name}: only a running one can be {verb}")
    return job.now


def _check_same(asked: tuple[str, str], existing: tuple[str, str]) -> None:
    if asked != existing:
        raise JobExists("job_id: belongs to a job with another spec: choose another id")


def _mismatch_text(protocol: OtherProtocol) -> str:
    return (
        f"the supervisor (pid {os.getpid()}) speaks protocol {PROTOCOL_VERSION}, the worker {protocol}: run a worker "
        "of the supervisor's version, or end the supervisor once its jobs are done"
    )


def _refused(code: str, text: str) -> Refused:
    """The answer that turns a whole worker away, which the operator is told too."""
    note("connection.refused", reason=text)
    return Refused(code, text)
