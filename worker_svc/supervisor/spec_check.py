"""Whether the spec that came as JSON is one: what is not must end with its request, not with the loop."""

from __future__ import annotations

from typing import Final

from worker_svc.ipc.messages import columns_of
from worker_svc.job import InvalidArgument, JobSpec
from worker_svc.job.limits import check_limits

_EXAMPLE: Final = JobSpec(command="")


def check_spec(spec: JobSpec) -> None:
    """Raises InvalidArgument."""
    for (name, (types, check)), value, default in zip(columns_of(JobSpec).items(), spec, _EXAMPLE, strict=True):
        if value is default:
            continue
        if (types and type(value) not in types) or (check is not None and not check(value)):
            raise InvalidArgument(name, "is of another type than it should be, or too large")
    check_limits(spec.limits)
