"""What worker and supervisor say to each other on the unix socket: each message a type, one encoder and one decoder.

A message travels as a frame (frames.py). Its header is a JSON object of `op`, which says what message it is, `r`, the
number that the worker gave the request, which the answer has too, and the message's fields by name; of a field of bytes
it has the size, and the bytes are in the frame's body, in the order of the fields. A field that is missing, unknown or
of another kind is an error, never a default.

Any two versions understand so much of each other: of a hello `op`, `r` and `protocol`; and a refusal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar, get_type_hints

from worker_svc.ipc.frames import Frame, encode_frame
from worker_svc.job import InvalidArgument, JobError, name_of

# Raised whenever either side could misread the other; worker and supervisor refuse to mix.
PROTOCOL_VERSION: Final = 2
# What a supervisor exits with when another one has the state directory.
EXIT_LOCKED: Final = 3
# Codes of a refusal beside those of job.ERRORS: this worker and this supervisor do not go together.
VERSION_MISMATCH: Final = "version"
SECOND_WORKER: Final = "second_worker"

# What SQLite can hold.
_WHOLE_MAX: Final = 2**63 - 1


class Settings(NamedTuple):
    """What the worker's configuration tells the supervisor, which keeps it for the time when no worker is there."""

    slots: int
    queue_length: int
    base_env: dict[str, str]
    user_env: tuple[str, ...]
    """Which of HOME, USER, LOGNAME and SHELL a job of another user gets from the user database."""
    idle_exit_s: float
    min_free_bytes: int
    min_free_inodes: int
    keep_age_s: float
    """For each limit on what is kept, zero means that there is none."""
    keep_jobs: int
    keep_bytes: int
    keep_events: int
    keep_ids: int
    """How many ids are remembered of jobs that retention took."""
    on_reboot: str


class Hello(NamedTuple):
    """The first request. `key` is what the supervisor's key file holds (keyfile.py)."""

    protocol: int
    version: str
    key: str
    settings: Settings
    exclusive: bool
    """Whether it is a worker, of which there is one: another that is still there is an error."""


class Start(NamedTuple):
    job_id: str
    fingerprint: str
    owner: str = ""
    is_new: bool = False
    """Whether the worker has just made the id up: it cannot be on record."""
    spec: bytes = b""
    """The job's spec as it is stored; empty: the job must be there already."""
    stdin: bytes = b""
    secrets: bytes = b""
    """As SecretEnv packs them."""


# Where requests about a job have an owner, they find no other owner's job.
class Stop(NamedTuple):
    job_id: str
    owner: str | None = None
    signal: int | None = None
    """None, and as well of the grace: the job's own."""
    grace_s: float | None = None


class SendSignal(NamedTuple):
    job_id: str
    owner: str | None = None
    signal: int = 0


class Pause(NamedTuple):
    job_id: str
    owner: str | None = None


class Resume(NamedTuple):
    job_id: str
    owner: str | None = None


class Delete(NamedTuple):
    job_id: str
    owner: str | None = None
    remember: bool = False
    """Whether its id is remembered, so that it does not run again."""


class GetStatus(NamedTuple):
    pass


class Shutdown(NamedTuple):
    stop_jobs: bool = False


class Welcome(NamedTuple):
    """The answer to Hello: who the supervisor is."""

    protocol: int
    pid: int
    started_ns: int
    state_id: str
    cgroup: str
    """Which holds the jobs' groups, as in /proc/PID/cgroup; empty: there is none."""
    sequence: int
    is_shutting_down: bool


class Started(NamedTuple):
    state: int
    existed: bool


class Status(NamedTuple):
    """What GetWorker tells of the supervisor."""

    running: int
    queued: int
    sequence: int
    uptime_ns: int
    pid: int
    containment: str
    containment_reason: str
    spawner: str
    unenforceable: dict[str, str]
    can_drop_head: bool
    output_degraded: str
    is_shutting_down: bool


class Leaving(NamedTuple):
    """The answer to Shutdown."""

    jobs: int
    """How many it waits for before it leaves."""


class Done(NamedTuple):
    """The answer to every other request."""


class Refused(NamedTuple):
    """The answer to a request that is not carried out: a code, of job.ERRORS as a rule, and what to tell the user."""

    error: str
    text: str

    @classmethod
    def by(cls, error: JobError) -> Refused:
        return cls(error.code, error.message)


class Doorbell(NamedTuple):
    """Sent unasked: all transitions up to this one are in the store, where the worker reads them. So a worker that is
    slow, stopped or gone costs the supervisor no memory, and catching up is the same code as living on."""

    sequence: int


OfJob: TypeAlias = Stop | SendSignal | Pause | Resume | Delete
Request: TypeAlias = Hello | Start | OfJob | GetStatus | Shutdown
Answer: TypeAlias = Welcome | Started | Status | Leaving | Done | Refused
Message: TypeAlias = Request | Answer | Doorbell

KIND_OF_OP: Final[dict[str, type[Message]]] = {
    "hello": Hello,
    "start": Start,
    "stop": Stop,
    "signal": SendSignal,
    "pause": Pause,
    "resume": Resume,
    "delete": Delete,
    "status": GetStatus,
    "shutdown": Shutdown,
    "welcome": Welcome,
    "started": Started,
    "is": Status,
    "leaving": Leaving,
    "done": Done,
    "refused": Refused,
    "doorbell": Doorbell,
}
OP_OF_KIND: Final = {kind: op for op, kind in KIND_OF_OP.items()}
_Made = TypeVar("_Made", bound=tuple[Any, ...])


class OtherProtocol(Exception):
    """A hello of a version that does not go with this one, which the text is the protocol of."""


def encode(number: int, message: Message) -> bytes:
    """Raises FrameError: what the other side would have to refuse is not sent."""
    kind = type(message)
    header = {"op": OP_OF_KIND[kind], "r": number, **message._asdict()}
    body = b""
    if kind is Start:
        blobs = header["spec"], header["stdin"], header["secrets"]
        header["spec"], header["stdin"], header["secrets"] = map(len, blobs)
        body = b"".join(blobs)
    elif kind is Hello:
        header["settings"] = header["settings"]._asdict()
    return encode_frame(header, body)


def number_of(frame: Frame) -> int:
    """The number of the request; zero of a doorbell, and if it is no number."""
    number = frame.header.get("r")
    return number if type(number) is int else 0


def decode(frame: Frame) -> Message:
    """Raises InvalidArgument, OtherProtocol."""
    fields = frame.header
    op = fields.pop("op", None)
    fields.pop("r", None)
    if op is None and "error" in fields:  # of up to 0.1.0
        op = "refused"
    kind = KIND_OF_OP.get(op) if isinstance(op, str) else None
    if kind is None:
        raise InvalidArgument("op", f"there is no message {name_of(str(op))!r}")
    if kind is Hello and fields.get("protocol") != PROTOCOL_VERSION:
        raise OtherProtocol(name_of(str(fields.get("protocol"))))
    return made_from(kind, fields, op, frame.body)


def made_from(kind: type[_Made], fields: Any, what: str, body: bytes = b"") -> _Made:
    """A message, or what is part of one, from a JSON object and the bytes that go with it. Raises InvalidArgument."""
    columns = columns_of(kind)
    if not isinstance(fields, dict) or fields.keys() != columns.keys():
        raise InvalidArgument(what, f"is to have the fields {', '.join(columns) or '(none)'}, no more and no fewer")
    values: list[Any] = []
    at = 0
    for name, (types, check) in columns.items():
        value = fields[name]
        if type(value) not in types or (check is not None and not check(value)):
            raise InvalidArgument(name, "is of another type than it should be, or too large")
        if check is _is_size:
            begin, at = at, at + value
            value = body[begin:at]
        elif check is _are_fields:
            value = made_from(Settings, value, name)
        elif types is _LIST:
            value = tuple(value)
        values.append(value)
    if at != len(body):
        raise InvalidArgument(what, f"has a body of {len(body)} bytes, not {at}")
    return kind._make(values)  # type: ignore[attr-defined, no-any-return]


_Check: TypeAlias = Callable[[Any], bool]


@cache
def columns_of(kind: type[tuple[Any, ...]]) -> dict[str, tuple[tuple[type, ...], _Check | None]]:
    """By the names of a NamedTuple's fields: of which types their values are in JSON, and what must be true of them
    beside. What is not so must end with its request, not with the loop."""
    return {name: _IN_JSON.get(field, ((), None)) for name, field in get_type_hints(kind).items()}


def _is_storable(value: float | None) -> bool:
    return value is None or -_WHOLE_MAX <= value <= _WHOLE_MAX  # which NaN is not


def _is_size(value: int) -> bool:
    return 0 <= value <= _WHOLE_MAX


def _are_texts(values: Iterable[Any]) -> bool:
    return all(type(text) is str for text in values)


def _have_texts(values: dict[str, Any]) -> bool:
    return _are_texts(values.values())


def _are_fields(value: object) -> bool:
    """The fields of a NamedTuple within are looked at one by one."""
    return True


_NONE: Final = type(None)
_LIST: Final = (list, tuple)
_IN_JSON: Final[dict[Any, tuple[tuple[type, ...], _Check | None]]] = {
    bool: ((bool,), None),
    int: ((int,), _is_storable),
    int | None: ((int, _NONE), _is_storable),
    float: ((float, int), _is_storable),
    float | None: ((float, int, _NONE), _is_storable),
    str: ((str,), None),
    str | None: ((str, _NONE), None),
    bytes: ((int,), _is_size),
    dict[str, str]: ((dict,), _have_texts),
    tuple[str, ...]: (_LIST, _are_texts),
    Settings: ((dict,), _are_fields),
}
