"""What a caller can be told is wrong."""

from __future__ import annotations

from typing import ClassVar, Final


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


class PermissionDenied(JobError):
    """The caller's role or the worker's policy does not allow it; the text names the rule."""

    code = "denied"


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
        PermissionDenied,
        JobNotFound,
        JobExists,
        PreconditionFailed,
        ResourceExhausted,
        OutOfRange,
        DeadlineExceeded,
        Unavailable,
    )
}
