"""What the supervisor keeps in memory of a job that is not finished. Of a finished one it keeps nothing."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from worker_svc.ipc.messages import Refused, Started
from worker_svc.job import (
    JobError,
    JobSpec,
    JobState,
    LeaderExit,
    OutputPolicy,
    OutputVia,
    PreconditionFailed,
    StopCause,
)

if TYPE_CHECKING:
    from worker_svc.supervisor.connections import Connection
    from worker_svc.supervisor.containment import Container
    from worker_svc.supervisor.life.house import House
    from worker_svc.supervisor.life.process import Process


class Terms(NamedTuple):
    """What of its spec a job goes by once it is started."""

    timeout_s: float = 0.0
    stop_signal: int = 0
    stop_grace_s: float = 0.0
    separate_stderr: bool = False
    output_max_bytes: int = 0
    output_policy: OutputPolicy = OutputPolicy.NONE
    output_via: OutputVia = OutputVia.FILE
    waits_for_tree: bool = False
    """Whether the job goes on when its leader has exited, until all of it is gone."""

    @classmethod
    def of(cls, spec: JobSpec) -> Terms:
        return cls(
            spec.timeout_s,
            spec.stop_signal,
            spec.stop_grace_s,
            spec.separate_stderr,
            spec.output_max_bytes,
            spec.output_policy,
            spec.output_via,
            spec.leader_exit is LeaderExit.WAIT,
        )


NO_TERMS = Terms()


class Ask(NamedTuple):
    """A stop that is asked for; None: what the job's own terms say."""

    signal: int | None = None
    grace_s: float | None = None
    cause: StopCause = StopCause.REQUEST


class Output:
    """How a job's output is looked after, from the spawn to the end."""

    __slots__ = ("is_taken_up", "job", "loss", "pipes", "terms")

    def __init__(self, job: Job, terms: Terms) -> None:
        self.job = job
        self.terms = terms
        self.is_taken_up = False
        self.pipes: list[Any] = []
        """What the pump knows it by; empty where it goes to the files by itself."""
        self.loss = ""
        """What of it is lost, as last recorded."""

    @property
    def pid(self) -> int:
        """The pid of the job's first process; zero: it is gone."""
        return self.job.now.pid


class Stage:
    """The record of one state. Here is what is so in most of them, and what they make of most events: nothing."""

    __slots__ = ()
    state = JobState.NEW
    process: Process | None = None
    container: Container | None = None
    """From before the spawn to the end."""
    terms = NO_TERMS
    paused = False
    cause = StopCause.NONE
    """Why it was asked to end."""

    @property
    def pid(self) -> int:
        """The process's; zero: there is none."""
        return self.process.pid if self.process else 0

    @property
    def outlives_leader(self) -> bool:
        """Whether what is left of the job, once its leader has exited, is to be let alone for now."""
        return False

    def stop(self, ask: Ask) -> None:
        """It is asked to end."""

    def on_timeout(self) -> None:
        """It has run for as long as it may."""

    def on_output_exceeded(self) -> None:
        """It wrote more than it may, and is to be stopped for that; again, if that was not enough."""

    def give_up(self, reason: str) -> None:
        """It could not be dealt with, by a fault of ours."""


class Live(Stage):
    """What is so in every state of a job that is accepted and not finished."""

    __slots__ = ("house", "job")

    def __init__(self, house: House, job: Job) -> None:
        self.house = house
        self.job = job

    def give_up(self, reason: str) -> None:
        self.house.lose(self.job, reason)
        self.house.ledger.then(partial(self.job.answer, PreconditionFailed(f"lost: {reason}")))


class _Finished(Stage):
    __slots__ = ()
    state = JobState.FINISHED


NEW = Stage()
"""The record of a job that is not accepted yet, or was taken back."""
FINISHED = _Finished()
"""One record for all: of a finished job nothing is kept."""


class Job:
    """Who a job is, in all of its states; and the record of the one that it is in."""

    __slots__ = ("accepted_ns", "fingerprint", "job_id", "now", "ordinal", "owner", "waiting")

    def __init__(self, job_id: str, fingerprint: str, accepted_ns: int, owner: str = "") -> None:
        self.job_id = job_id
        self.fingerprint = fingerprint
        self.accepted_ns = accepted_ns
        self.owner = owner
        self.ordinal = 0
        self.now: Stage = NEW
        """Only `Moves` sets it."""
        self.waiting: list[tuple[Connection, int, bool]] | None = None
        """Who waits for the answer to a start: connection, request number, whether the job existed already."""

    @property
    def state(self) -> JobState:
        return self.now.state

    # What timers and threads tell it, whatever state it is in by then

    def on_timeout(self) -> None:
        self.now.on_timeout()

    def on_output_exceeded(self) -> None:
        self.now.on_output_exceeded()

    def answer(self, error: JobError | None = None) -> None:
        """To all who wait for its start."""
        waiting, self.waiting = self.waiting or [], None
        for connection, number, existed in waiting:
            connection.send(number, Refused.by(error) if error is not None else Started(int(self.state), existed))
