"""Vocabulary: what a job is, the states it moves through, how it ends, and what can be wrong with it.

Pure: no I/O, standard library only, and light, since the supervisor imports it (hence NamedTuple: `dataclasses` would
cost it a megabyte).
"""

from worker_svc.job.cgroup_limits import CgroupLimits
from worker_svc.job.errors import (
    ERRORS,
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
from worker_svc.job.lifecycle import (
    Event,
    Exit,
    IllegalTransition,
    JobState,
    Outcome,
    StopCause,
    error_text,
    exit_text,
    next_state,
    outcome_of,
)
from worker_svc.job.limits import Identity, ProcessLimits, Sandbox
from worker_svc.job.records import JobRecord, Transition
from worker_svc.job.signals import parse_signal, signal_name
from worker_svc.job.spec import (
    ARG_MAX_BYTES,
    ARGS_MAX,
    ARGV_ENV_MAX_BYTES,
    DURATION_MAX_S,
    ENV_MAX,
    LABEL_KEY_MAX_BYTES,
    LABEL_VALUE_MAX_BYTES,
    LABELS_MAX,
    STDIN_MAX_BYTES,
    CheckedFile,
    JobSpec,
    LeaderExit,
    OutputPolicy,
    check_duration,
    check_job_id,
    check_labels,
)
from worker_svc.job.texts import name_of

__all__ = [
    "ARGS_MAX",
    "ARGV_ENV_MAX_BYTES",
    "ARG_MAX_BYTES",
    "DURATION_MAX_S",
    "ENV_MAX",
    "ERRORS",
    "LABELS_MAX",
    "LABEL_KEY_MAX_BYTES",
    "LABEL_VALUE_MAX_BYTES",
    "STDIN_MAX_BYTES",
    "CgroupLimits",
    "CheckedFile",
    "DeadlineExceeded",
    "Event",
    "Exit",
    "Identity",
    "IllegalTransition",
    "InvalidArgument",
    "JobError",
    "JobExists",
    "JobNotFound",
    "JobRecord",
    "JobSpec",
    "JobState",
    "LeaderExit",
    "OutOfRange",
    "Outcome",
    "OutputPolicy",
    "PermissionDenied",
    "PreconditionFailed",
    "ProcessLimits",
    "ResourceExhausted",
    "Sandbox",
    "StopCause",
    "Transition",
    "Unavailable",
    "check_duration",
    "check_job_id",
    "check_labels",
    "error_text",
    "exit_text",
    "name_of",
    "next_state",
    "outcome_of",
    "parse_signal",
    "signal_name",
]
