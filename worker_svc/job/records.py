"""What is on record: transitions, and all that is known of a job."""

from __future__ import annotations

from typing import NamedTuple

from worker_svc.job.lifecycle import JobState, Outcome
from worker_svc.job.spec import JobSpec


class Transition(NamedTuple):
    """One move of one job. Times are nanoseconds since the epoch, durations nanoseconds."""

    sequence: int
    job_id: str
    at_ns: int
    from_state: JobState
    to_state: JobState
    pid: int = 0
    outcome: Outcome = Outcome.NONE
    exit_code: int | None = None
    signal: int | None = None
    reason: str = ""
    queued_ns: int | None = None
    wall_ns: int | None = None
    cpu_ns: int | None = None
    owner: str = ""
    """Whose job it is; here too, since a transition outlives its job."""


class JobRecord(NamedTuple):
    """All that is on record of a job. `ordinal` is its place in the order of acceptance."""

    ordinal: int
    job_id: str
    spec: JobSpec
    state: JobState
    last_sequence: int
    accepted_ns: int
    fingerprint: str = ""
    outcome: Outcome = Outcome.NONE
    exit_code: int | None = None
    signal: int | None = None
    reason: str = ""
    pid: int = 0
    started_ns: int | None = None
    finished_ns: int | None = None
    wall_ns: int | None = None
    cpu_ns: int | None = None
    peak_memory_bytes: int | None = None
    output_size_bytes: int | None = None
    stderr_size_bytes: int | None = None
    paused: int = 0
    stuck: str = ""
    """What of it does not die in spite of SIGKILL: pid, state, what it waits in."""
    owner: str = ""
    """The identity that started it."""
    started_monotonic_ns: int = 0
    """When it started, on the clock that nobody can set: of a running job, how long it runs is told by that."""
    output_loss: str = ""
    """What is known to be lost of its output, but for what the cap dropped."""
    is_brief: bool = False
    """Whether the spec is without `args` and `env`, which are large."""


class KnownJob(NamedTuple):
    """What a start with the id of an earlier one must know of that; also of some that are not on record any more."""

    owner: str
    fingerprint: str
    state: JobState
    outcome: Outcome
    reason: str
