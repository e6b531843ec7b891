"""The states a job moves through, as a table, and how it ends."""

from __future__ import annotations

from enum import IntEnum
from typing import Final, NamedTuple

from worker_svc.job.signals import SIGNAL_WORDS


class JobState(IntEnum):
    """Where a job is in its life; the numbers are those of the wire and of the store."""

    NEW = 0
    QUEUED = 1
    STARTING = 2
    RUNNING = 3
    STOPPING = 4
    FINISHED = 5


class Outcome(IntEnum):
    """How a finished job ended; NONE of one that is not finished."""

    NONE = 0
    SUCCEEDED = 1
    FAILED = 2
    SIGNALED = 3
    STOPPED = 4
    TIMED_OUT = 5
    OOM_KILLED = 6
    START_FAILED = 7
    LOST = 8
    OUTPUT_LIMIT = 9


class Event(IntEnum):
    """What can happen to a job."""

    ENQUEUE = 0  # accepted, no slot is free
    LAUNCH = 1  # given a slot
    SPAWNED = 2  # its process runs
    SPAWN_FAILED = 3
    STOP = 4  # asked to stop: by a client, its timeout, a limit
    EXIT = 5  # its process ended
    LOSE = 6  # what became of it cannot be known
    PAUSE = 7
    RESUME = 8
    REMARK = 9  # something is to be told of it


# The whole life of a job. None: the event changes nothing in this state. A pair that is missing cannot happen.
_TABLE: Final[dict[JobState, dict[Event, JobState | None]]] = {
    JobState.NEW: {
        Event.ENQUEUE: JobState.QUEUED,
        Event.LAUNCH: JobState.STARTING,
    },
    JobState.QUEUED: {
        Event.LAUNCH: JobState.STARTING,
        Event.STOP: JobState.FINISHED,
        Event.LOSE: JobState.FINISHED,
    },
    JobState.STARTING: {
        Event.SPAWNED: JobState.RUNNING,
        Event.SPAWN_FAILED: JobState.FINISHED,
        Event.STOP: None,  # remembered; it takes effect once the process is there
        Event.LOSE: JobState.FINISHED,
    },
    JobState.RUNNING: {
        Event.STOP: JobState.STOPPING,
        Event.PAUSE: JobState.RUNNING,
        Event.RESUME: JobState.RUNNING,
        Event.REMARK: JobState.RUNNING,
        Event.EXIT: JobState.FINISHED,
        Event.LOSE: JobState.FINISHED,
    },
    JobState.STOPPING: {
        Event.STOP: None,
        Event.REMARK: JobState.STOPPING,
        Event.EXIT: JobState.FINISHED,
        Event.LOSE: JobState.FINISHED,
    },
    JobState.FINISHED: {
        Event.STOP: None,
    },
}


class IllegalTransition(Exception):
    """A fault of ours: an event that cannot happen in the state the job is in."""


def next_state(state: JobState, event: Event) -> JobState | None:
    """The state that follows, or None if nothing changes.

    Raises IllegalTransition, naming both ends, for a pair that cannot happen.
    """
    try:
        return _TABLE[state][event]
    except KeyError:
        raise IllegalTransition(f"{event.name} cannot happen to a job that is {state.name}") from None


class Exit(NamedTuple):
    """How a process ended: `exit_code` (0 to 255) or `signal` (a number), and what it used, when known."""

    exit_code: int | None
    signal: int | None
    cpu_ns: int | None = None
    peak_memory_bytes: int | None = None

    @classmethod
    def from_wait_status(cls, status: int, *, cpu_ns: int | None = None, peak_memory_bytes: int | None = None) -> Exit:
        """From the status word of wait(2): the low seven bits are the signal, the next byte the exit status."""
        number = status & 0x7F
        if number:
            return cls(None, number, cpu_ns, peak_memory_bytes)
        return cls(status >> 8 & 0xFF, None, cpu_ns, peak_memory_bytes)


class StopCause(IntEnum):
    """Why a job was asked to end; NONE of one that ended by itself."""

    NONE = 0
    REQUEST = 1
    TIMEOUT = 2
    OUTPUT = 3


_OUTCOME_OF_CAUSE: Final = {
    StopCause.REQUEST: Outcome.STOPPED,
    StopCause.TIMEOUT: Outcome.TIMED_OUT,
    StopCause.OUTPUT: Outcome.OUTPUT_LIMIT,
}


def outcome_of(ended: Exit, cause: StopCause) -> Outcome:
    if cause is not StopCause.NONE:
        return _OUTCOME_OF_CAUSE[cause]
    if ended.signal is not None:
        return Outcome.SIGNALED
    return Outcome.SUCCEEDED if ended.exit_code == 0 else Outcome.FAILED


def exit_text(ended: Exit) -> str:
    """`exit status 3` or `signal: killed`, as the original worker said it."""
    if ended.signal is not None:
        known = ended.signal < len(SIGNAL_WORDS)
        return f"signal: {SIGNAL_WORDS[ended.signal] if known else f'signal {ended.signal}'}"
    return f"exit status {ended.exit_code}"


def error_text(ended: Exit, outcome: Outcome, limit: str = "") -> str:
    """Why a job that ran and ended did not succeed; empty if it did. `limit` names the one that it ran into."""
    if outcome is Outcome.SUCCEEDED:
        return ""
    if limit:
        return f"{limit} ({exit_text(ended)})"
    if outcome is Outcome.STOPPED and ended.signal is None:
        return f"stopped ({exit_text(ended)})"
    return exit_text(ended)
