"""Vocabulary: what a job is, the states it moves through, how it ends, and what can be wrong with it.

Pure: no I/O, standard library only, and light, since the supervisor imports it (hence NamedTuple: `dataclasses` would
cost it a megabyte).
"""

from __future__ import annotations

import re
import signal as _signal
from enum import IntEnum
from typing import Any, ClassVar, Final, NamedTuple

STDIN_MAX_BYTES: Final = 1024 * 1024
ARGS_MAX: Final = 4096
LABELS_MAX: Final = 64
LABEL_KEY_MAX_BYTES: Final = 128
LABEL_VALUE_MAX_BYTES: Final = 1024
# One argument or environment string: MAX_ARG_STRLEN of execve(2), with its NUL.
ARG_MAX_BYTES: Final = 128 * 1024 - 1
# All of them together: a quarter of the usual 8 MiB stack is what execve(2) allows.
ARGV_ENV_MAX_BYTES: Final = 2 * 1024 * 1024 - 64 * 1024
DURATION_MAX_S: Final = 10 * 366 * 24 * 3600.0

_JOB_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")


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


class Event(IntEnum):
    """What can happen to a job."""

    ENQUEUE = 0  # accepted, no slot is free
    LAUNCH = 1  # given a slot
    SPAWNED = 2  # its process runs
    SPAWN_FAILED = 3
    STOP = 4  # asked to stop: by a client, or by a limit
    TIME_OUT = 5
    EXIT = 6  # its process ended
    LOSE = 7  # what became of it cannot be known


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
        Event.TIME_OUT: JobState.STOPPING,
        Event.EXIT: JobState.FINISHED,
        Event.LOSE: JobState.FINISHED,
    },
    JobState.STOPPING: {
        Event.STOP: None,
        Event.TIME_OUT: None,
        Event.EXIT: JobState.FINISHED,
        Event.LOSE: JobState.FINISHED,
    },
    JobState.FINISHED: {
        Event.STOP: None,
    },
}


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
    def from_wait_status(
        cls, status: int, *, cpu_ns: int | None = None, peak_memory_bytes: int | None = None
    ) -> Exit:
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


def outcome_of(ended: Exit, cause: StopCause) -> Outcome:
    if cause is StopCause.TIMEOUT:
        return Outcome.TIMED_OUT
    if cause is StopCause.REQUEST:
        return Outcome.STOPPED
    if ended.signal is not None:
        return Outcome.SIGNALED
    return Outcome.SUCCEEDED if ended.exit_code == 0 else Outcome.FAILED


# The words of Go's syscall.Signal.String() on Linux, which the original worker put into errorText.
_SIGNAL_WORDS: Final = (
    "signal 0|hangup|interrupt|quit|illegal instruction|trace/breakpoint trap|aborted|bus error|"
    "floating point exception|killed|user defined signal 1|segmentation fault|user defined signal 2|broken pipe|"
    "alarm clock|terminated|stack fault|child exited|continued|stopped (signal)|stopped|stopped (tty input)|"
    "stopped (tty output)|urgent I/O condition|CPU time limit exceeded|file size limit exceeded|"
    "virtual timer expired|profiling timer expired|window changed|I/O possible|power failure|bad system call"
).split("|")


def exit_text(ended: Exit) -> str:
    """`exit status 3` or `signal: killed`, as the original worker said it."""
    if ended.signal is not None:
        known = ended.signal < len(_SIGNAL_WORDS)
        return f"signal: {_SIGNAL_WORDS[ended.signal] if known else f'signal {ended.signal}'}"
    return f"exit status {ended.exit_code}"


def error_text(ended: Exit, outcome: Outcome, timeout_s: float = 0.0) -> str:
    """Why a job that ran and ended did not succeed; empty if it did."""
    if outcome is Outcome.SUCCEEDED:
        return ""
    if outcome is Outcome.TIMED_OUT:
        return f"timed out after {timeout_s:g} s ({exit_text(ended)})"
    if outcome is Outcome.STOPPED and ended.signal is None:
        return f"stopped ({exit_text(ended)})"
    return exit_text(ended)


def parse_signal(text: str) -> int:
    """A signal's number from "SIGTERM", "term" or "15". Raises ValueError with a text for the user."""
    name = text.strip().upper()
    if name.isascii() and name.isdigit():
        number = int(name)
        if number not in _signal.valid_signals():
            raise ValueError(f"there is no signal {number}")
        return number
    known = _signal.Signals.__members__.get(name if name.startswith("SIG") else f"SIG{name}")
    if known is None:
        raise ValueError(f"there is no signal {text!r}: use a name such as SIGTERM, or a number")
    return int(known)


def signal_name(number: int) -> str:
    """`SIGTERM`; real-time signals between the ends have no name and are told as `SIG35`."""
    try:
        return _signal.Signals(number).name
    except ValueError:
        return f"SIG{number}"


def check_job_id(job_id: str, field: str = "jobID") -> None:
    """Raises InvalidArgument unless the id is well-formed (it becomes a file name)."""
    if not job_id:
        raise InvalidArgument(field, "must not be empty")
    if not _JOB_ID.match(job_id):
        raise InvalidArgument(
            field, "must be 1 to 128 letters, digits, '.', '_' or '-', and start with a letter or digit"
        )


class JobSpec(NamedTuple):
    """What to run, complete: a scheduler's request with the worker's defaults filled in.

    `env` is what the request asked for; the worker's own additions are not part of it. Its values and standard input
    are secrets: they appear in no repr and no log line.
    """

    command: str
    path: str = ""
    args: tuple[str, ...] = ()
    env: dict[str, str] = {}  # noqa: RUF012 - never mutated; NamedTuple has no default_factory
    cwd: str = ""
    stdin_size_bytes: int = 0
    timeout_s: float = 0.0
    stop_signal: int = int(_signal.SIGTERM)
    stop_grace_s: float = 10.0
    labels: dict[str, str] = {}  # noqa: RUF012
    separate_stderr: bool = False

    def __repr__(self) -> str:
        return f"JobSpec(command={self.command!r}, path={self.path!r}, args={len(self.args)}, env={sorted(self.env)})"

    @property
    def argv(self) -> list[str]:
        return [self.command, *([self.path] if self.path else []), *self.args]

    def validate(self) -> None:
        """Raises InvalidArgument for the first field that is malformed, whatever the machine."""
        if not self.command:
            raise InvalidArgument("command", "must not be empty: name a program, such as bash")
        for field, text in (("command", self.command), ("path", self.path), ("cwd", self.cwd)):
            _check_string(field, text)
        if len(self.args) > ARGS_MAX:
            raise InvalidArgument("args", f"must be at most {ARGS_MAX}, not {len(self.args)}")
        for index, text in enumerate(self.args):
            _check_string(f"args[{index}]", text)
        _check_env(self.env)
        total = sum(len(text.encode()) + 9 for text in self.argv)
        total += sum(len(f"{key}={value}".encode()) + 9 for key, value in self.env.items())
        if total > ARGV_ENV_MAX_BYTES:
            raise InvalidArgument("args", f"and env together must be below {ARGV_ENV_MAX_BYTES} bytes, not {total}")
        if self.cwd and not self.cwd.startswith("/"):
            raise InvalidArgument("cwd", f"must be an absolute path, not {self.cwd!r}")
        if self.stdin_size_bytes > STDIN_MAX_BYTES:
            raise InvalidArgument("stdin", f"must be at most {STDIN_MAX_BYTES} bytes, not {self.stdin_size_bytes}")
        check_duration("timeout", self.timeout_s)
        check_duration("stop_grace", self.stop_grace_s)
        _check_labels(self.labels)

    def to_json(self) -> dict[str, Any]:
        """A JSON object of the fields that are not at their defaults, always with `command`."""
        return {k: v for k, v in self._asdict().items() if k == "command" or v != self._field_defaults[k]}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> JobSpec:
        """The inverse of `to_json`; fields of a newer version are an error, TypeError."""
        if "args" in fields:
            fields = {**fields, "args": tuple(fields["args"])}
        return cls(**fields)


def _check_string(field: str, text: str) -> None:
    if "\0" in text:
        raise InvalidArgument(field, "must not contain a NUL character")
    size = len(text.encode())
    if size > ARG_MAX_BYTES:
        raise InvalidArgument(field, f"must be at most {ARG_MAX_BYTES} bytes, not {size}")


def _check_env(env: dict[str, str]) -> None:
    for key, value in env.items():
        if not key:
            raise InvalidArgument("env", "has an empty key")
        if "=" in key or "\0" in key:
            raise InvalidArgument("env", f"key {key!r} must not contain '=' or NUL")
        if "\0" in value:
            raise InvalidArgument("env", f"the value of {key!r} must not contain NUL")
        if len(key.encode()) + len(value.encode()) >= ARG_MAX_BYTES:
            raise InvalidArgument("env", f"{key!r} and its value must be below {ARG_MAX_BYTES} bytes")


def _check_labels(labels: dict[str, str]) -> None:
    if len(labels) > LABELS_MAX:
        raise InvalidArgument("labels", f"must be at most {LABELS_MAX}, not {len(labels)}")
    for key, value in labels.items():
        if not key or len(key.encode()) > LABEL_KEY_MAX_BYTES:
            raise InvalidArgument("labels", f"key {key[:40]!r} must be 1 to {LABEL_KEY_MAX_BYTES} bytes long")
        if len(value.encode()) > LABEL_VALUE_MAX_BYTES:
            raise InvalidArgument("labels", f"the value of {key!r} must be at most {LABEL_VALUE_MAX_BYTES} bytes long")


def check_duration(field: str, seconds: float) -> None:
    """Raises InvalidArgument unless `seconds` is from zero to ten years."""
    if seconds < 0:
        raise InvalidArgument(field, f"must not be negative, not {seconds:g} s")
    if seconds > DURATION_MAX_S:
        raise InvalidArgument(field, f"must be at most {DURATION_MAX_S:.0f} s, not {seconds:g} s")


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


class IllegalTransition(Exception):
    """A fault of ours: an event that cannot happen in the state the job is in."""


class JobError(Exception):
    """What a caller can be told; `code` names the class on the unix socket, the text is for the user."""

    code: ClassVar[str] = ""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidArgument(JobError):
    """A field of the request is malformed; nothing was recorded."""

    code = "invalid"

    def __init__(self, field: str, problem: str = "") -> None:
        super().__init__(f"{field}: {problem}" if problem else field)


class JobNotFound(JobError):
    code = "not_found"

    def __init__(self, message: str = "job not found") -> None:
        super().__init__(message)


class JobExists(JobError):
    """The job id belongs to a job with another spec."""

    code = "exists"


class PreconditionFailed(JobError):
    """The machine or the job is not in a state that allows it."""

    code = "precondition"


class ResourceExhausted(JobError):
    code = "exhausted"


class OutOfRange(JobError):
    code = "out_of_range"


class DeadlineExceeded(JobError):
    code = "deadline"


class Unavailable(JobError):
    """Not now; the same call can succeed later."""

    code = "unavailable"


ERRORS: Final[dict[str, type[JobError]]] = {
    kind.code: kind
    for kind in (
        InvalidArgument,
        JobNotFound,
        JobExists,
        PreconditionFailed,
        ResourceExhausted,
        OutOfRange,
        DeadlineExceeded,
        Unavailable,
    )
}
