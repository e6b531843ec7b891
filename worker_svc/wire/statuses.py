"""The one table between the errors of `job` and gRPC statuses, for the server's side and the client's."""

from __future__ import annotations

from typing import Final

from grpclib.const import Status
from grpclib.exceptions import GRPCError

from worker_svc.job import (
    DeadlineExceeded,
    InvalidArgument,
    JobError,
    JobExists,
    JobNotFound,
    OutOfRange,
    PermissionDenied,
    PreconditionFailed,
    ResourceExhausted,
    Unavailable,
)

# What a call is told that a worker ends, or does not begin, since it leaves.
DRAINING: Final = "the worker is shutting down: connect again, and go on from where you were"
STATUSES: Final[dict[type[JobError], Status]] = {
    InvalidArgument: Status.INVALID_ARGUMENT,
    PermissionDenied: Status.PERMISSION_DENIED,
    JobNotFound: Status.NOT_FOUND,
    JobExists: Status.ALREADY_EXISTS,
    PreconditionFailed: Status.FAILED_PRECONDITION,
    ResourceExhausted: Status.RESOURCE_EXHAUSTED,
    OutOfRange: Status.OUT_OF_RANGE,
    DeadlineExceeded: Status.DEADLINE_EXCEEDED,
    Unavailable: Status.UNAVAILABLE,
}

_ERRORS: Final = {status: kind for kind, status in STATUSES.items()}


def to_grpc(error: JobError) -> GRPCError:
    """What the server answers with; INTERNAL for a kind that is not in the table, which is a fault of
    ours."""
    for kind in type(error).__mro__:
        if status := STATUSES.get(kind):
            return GRPCError(status, error.message)
    return GRPCError(Status.INTERNAL, error.message)


def from_grpc(error: GRPCError) -> JobError | GRPCError:
    """What the client raises: the error behind the status, or `error` itself if the table has none for it."""
    kind = _ERRORS.get(error.status)
    if kind is None:
        return error
    return kind(error.message or error.status.name.lower().replace("_", " "))
