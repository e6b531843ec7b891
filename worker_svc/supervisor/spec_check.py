"""Whether what came as JSON is of the kind it should be: what is not must end with its request, not with the loop."""

from __future__ import annotations

import math
from typing import Any, Final

from worker_svc.job import JobSpec
from worker_svc.job.limits import check_limits

# What SQLite can hold.
_WHOLE_MAX: Final = 2**63 - 1
_EXAMPLE: Final = JobSpec(command="")


def check_kind(name: str, value: Any, example: Any) -> None:
    """Raises TypeError or ValueError unless `value` is of the kind of `example`."""
    match example:
        case bool():
            is_right = isinstance(value, bool)
        case int():
            is_right = isinstance(value, int) and not isinstance(value, bool)
            if is_right and abs(value) > _WHOLE_MAX:
                raise ValueError(f"{name} is too large")
        case float():
            is_right = isinstance(value, int | float) and not isinstance(value, bool)
            if is_right and not (abs(value) <= _WHOLE_MAX and math.isfinite(value)):
                raise ValueError(f"{name} is too large, or no number")
        case dict():
            is_right = isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
        case tuple() if type(example) is tuple:
            is_right = isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)
        case str():
            is_right = isinstance(value, str)
        case _:
            return
    if not is_right:
        raise TypeError(f"{name} must be of type {type(example).__name__}, not {type(value).__name__}")


def check_spec(spec: JobSpec) -> None:
    """Raises TypeError, ValueError or InvalidArgument."""
    for name, value, example in zip(_EXAMPLE._fields, spec, _EXAMPLE, strict=True):
        # What was not sent is the default itself. The files of a policy are made from JSON by a type of their own.
        if value is not example and name not in ("checked", "limits"):
            check_kind(name, value, example)
    check_limits(spec.limits)
