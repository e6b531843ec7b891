"""A job that waits for a slot, and one that is about to have a process."""

from __future__ import annotations

import sqlite3
import time
from functools import partial
from typing import Final

from worker_svc.job import (
    Event,
    JobSpec,
    JobState,
    Outcome,
    PreconditionFailed,
    SecretEnv,
    StopCause,
    fault_text,
)
from worker_svc.linux import failpoints
from worker_svc.linux.clocks import wall_ns
from worker_svc.record.paths import output_path, stderr_path
from worker_svc.supervisor.containment import Container, ContainmentError
from worker_svc.supervisor.life.house import House
from worker_svc.supervisor.life.job import NO_TERMS, Ask, Job, Live, Terms
from worker_svc.supervisor.life.process import Process
from worker_svc.supervisor.life.running import Running
from worker_svc.supervisor.spawn import LaunchPlan, Spawned, SpawnFailed
from worker_svc.supervisor.timers import is_passing

# A start that has no process yet waits for a thread, since others hang.
_BREAK_OFF_AGAIN_S: Final = 1.0


class Queued(Live):
    """Its spec is read back from the store when its turn comes: there may be very many."""

    __slots__ = ("_since_ns", "secrets")
    state = JobState.QUEUED

    def __init__(self, house: House, job: Job, secrets: bytes = b"", *, waited_ns: int = 0) -> None:
        super().__init__(house, job)
        self.secrets = secrets
        """Its secret variables, as SecretEnv.pack has them, until the spawn: they are nowhere else."""
        self._since_ns = time.monotonic_ns() - waited_ns

    def stop(self, ask: Ask) -> None:
        self.house.finish(self.job, Event.STOP, Outcome.STOPPED, "stopped before it started")

    def launch(self) -> None:
        Starting(self.house, self.job, self.secrets).launch(queued_ns=time.monotonic_ns() - self._since_ns)

    def answer(self) -> None:
        if self.job.state is not JobState.STARTING:  # else a slot fell free in the same turn: the spawn will answer
            self.job.answer()


class Starting(Live):
    __slots__ = (
        "_fault",
        "_is_breaking_off",
        "_is_broken_off",
        "_is_spawning",
        "_secrets",
        "_spec",
        "_stdin",
        "asked",
        "container",
        "process",
        "terms",
    )
    state = JobState.STARTING

    def __init__(
        self, house: House, job: Job, secrets: bytes = b"", spec: JobSpec | None = None, stdin: bytes = b""
    ) -> None:
        """`spec`: that of a job that starts at once; a queued one's is read back from the store."""
        super().__init__(house, job)
        self._secrets = secrets
        self._spec = spec
        self._stdin = stdin
        self.terms = Terms.of(spec) if spec else NO_TERMS
        self.container: Container | None = None
        self.process: Process | None = None
        self._is_spawning = False
        """Whether a spawner has its plan, and has not told what came of it."""
        self._fault = ""
        """Why it is lost once it has."""
        self.asked: Ask | None = None
        """A stop that takes effect once there is a process."""
        self._is_broken_off = False
        """Whether its start was broken off for that."""
        self._is_breaking_off = False
        """Whether that is to be tried again: there was no process yet."""

    def launch(self, *, queued_ns: int) -> None:
        self.house.moves.move(self.job, Event.LAUNCH, self, queued_ns=queued_ns)
        self.house.ledger.then(self._spawn)

    def _spawn(self) -> None:
        if self.job.now is not self:  # taken back
            return
        try:
            plan = self._prepare()
        except Exception as error:
            if is_passing(error):
                raise
            self.house.mailbox.post(partial(self.on_spawned, SpawnFailed(_why(error))), self.job)
            return
        if failpoints.is_armed:
            failpoints.reach("before-spawn")
        self._is_spawning = True
        self.house.spawner.submit(self, plan)
        if self.terms.timeout_s > 0:
            self.house.timers.after(self.terms.timeout_s, self._on_start_timeout, self.job)

    def _prepare(self) -> LaunchPlan:
        """Raises sqlite3.Error, ContainmentError, SpawnFailed."""
        house, job = self.house, self.job
        spec = self._spec or house.store.spec_of(job.ordinal)
        stdin = self._stdin or (house.store.stdin_of(job.ordinal) if spec.stdin_size_bytes else b"")
        self.terms = Terms.of(spec)
        if spec.secret_env and not self._secrets:
            raise SpawnFailed("secret_env: its values were lost with the supervisor that held them: start another job")
        if self.container is None:
            self.container = house.containment.create(job.job_id, spec.limits, accepted_ns=job.accepted_ns)
        secrets = SecretEnv.unpack(self._secrets)
        self._spec, self._stdin, self._secrets = None, b"", b""
        return LaunchPlan(
            argv=spec.checked_argv,
            env={**house.settings.base_env, **spec.env, **secrets, **house.containment.marks(self.container)},
            cgroup_fd=self.container.cgroup_fd,
            cwd=spec.cwd,
            stdin=stdin,
            stdout_path=output_path(house.state_dir, job.job_id),
            stderr_path=stderr_path(house.state_dir, job.job_id) if spec.separate_stderr else "",
            limits=spec.limits,
            inherited=house.inherited,
            identity=spec.identity,
            sandbox=spec.sandbox,
            hidden=house.hidden,
            user_env=_user_env(spec, house.settings.user_env),
            checked=spec.checked,
            output_via=spec.output_via,
        )

    def on_spawned(self, result: Spawned | SpawnFailed) -> None:
        """What came of it."""
        if failpoints.is_armed:
            failpoints.reach("after-spawn")
        self._is_spawning = False
        if isinstance(result, SpawnFailed):
            self._fail(result)
            return
        assert self.container is not None
        self.house.containment.started(self.container, result.pid, result.pidfd, result.start_ticks)
        self.run(result, wall_ns())

    def _fail(self, failure: SpawnFailed) -> None:
        if self._is_broken_off and self.asked is not None:
            is_late = self.asked.cause is StopCause.TIMEOUT
            outcome = Outcome.TIMED_OUT if is_late else Outcome.STOPPED
            why = f"timed out after {self.terms.timeout_s:g} s" if is_late else "stopped"
            self.house.finish(self.job, Event.SPAWN_FAILED, outcome, f"{why} before it started")
            self.house.ledger.then(self.job.answer)
            return
        self.house.finish(self.job, Event.SPAWN_FAILED, Outcome.START_FAILED, str(failure))
        self.house.ledger.then(partial(self.job.answer, PreconditionFailed(str(failure))))

    def run(self, found: Spawned, started_ns: int) -> None:
        """The job's process is there: just spawned, or found by a new supervisor."""
        assert self.container is not None
        process = Process(self.house, self.job, self.terms, self.container, time.monotonic_ns())
        if self._fault:
            self.process = process
            self.house.outputs.begin(process.output, found.outputs)
            super().give_up(self._fault)
            return
        running = Running(process)
        changes = {
            "pid": process.pid,
            "started_ns": started_ns,
            "boot_id": self.house.boot_id,
            "start_ticks": found.start_ticks,
            "started_monotonic_ns": process.started_monotonic_ns,
        }
        self.house.moves.move(self.job, Event.SPAWNED, running, changes=changes)
        self.house.ledger.then(self.job.answer)
        self.house.timers.attempt(partial(process.watch, found.outputs), self.job)
        if self.asked is not None and self.job.now is running:
            running.stop(self.asked)

    def stop(self, ask: Ask) -> None:
        """By the table nothing moves: it takes effect once there is a process. Until then it is on record, and there
        may never be one: a program on a dead file system."""
        self.house.moves.move(self.job, Event.STOP)
        if self.asked is not None:
            number, grace_s, cause = self.asked
            nearer_s = min(self._grace_s(grace_s), self._grace_s(ask.grace_s))
            ask = Ask(number if ask.signal is None else ask.signal, nearer_s, cause)
        self.asked = ask
        self.house.ledger.annotate(self.job, {"stop_cause": int(ask.cause)})
        self.house.timers.after(self._grace_s(ask.grace_s), self._break_off, self.job)

    def _grace_s(self, asked_s: float | None) -> float:
        return self.terms.stop_grace_s if asked_s is None else asked_s

    def _break_off(self) -> None:
        if self.job.now is not self:
            return
        self._is_broken_off = self.house.spawner.kill(self) or self._is_broken_off
        if not self._is_broken_off and not self._is_breaking_off:
            self._is_breaking_off = True
            self.house.timers.after(_BREAK_OFF_AGAIN_S, self._break_off_again, self.job)

    def _break_off_again(self) -> None:
        self._is_breaking_off = False
        self._break_off()

    def _on_start_timeout(self) -> None:
        """Its time has passed since it was launched. Once it runs, time is counted from then."""
        if self.job.now is self:
            self.stop(Ask(cause=StopCause.TIMEOUT))
            self._break_off()

    def give_up(self, reason: str) -> None:
        if self._is_spawning:
            self._fault = reason  # for when its process is there, or not
            self.house.spawner.kill(self)
        else:
            super().give_up(reason)


def _user_env(spec: JobSpec, names: tuple[str, ...]) -> tuple[str, ...]:
    """A job of another user is not to find our HOME; what the spec itself sets stays."""
    return tuple(name for name in names if name not in spec.variables) if spec.identity.user else ()


def _why(error: Exception) -> str:
    if isinstance(error, ContainmentError):
        return text_of(error)
    if isinstance(error, SpawnFailed):
        return str(error)
    if isinstance(error, sqlite3.Error):
        return f"the job's record could not be read: {error}"
    return f"the supervisor could not prepare it: {fault_text(error)}"


def text_of(error: ContainmentError) -> str:
    """In the words of the API, where the limits are fields of `limits`."""
    return f"limits.{error.message}" if error.limit else error.message
