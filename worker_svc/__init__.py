"""worker-svc: runs jobs for a scheduler over gRPC, and keeps them when it dies.

`from worker_svc import WorkerClient, StartJobReq` works, and nothing is imported until then: the supervisor
imports modules of this package too, and must stay small.
"""

__version__ = "0.1.0"

# Type checkers take the name for true, whatever it is set to; `typing` itself would cost an import.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from worker_svc.client import Unreachable, WorkerClient
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
    from worker_svc.pb.jobscheduler import (
        DeleteJobReq,
        DeleteJobRes,
        DeregisterReq,
        DeregisterRes,
        GetWorkerReq,
        GetWorkerRes,
        Groups,
        Identity,
        Job,
        JobSpec,
        JobState,
        JobTransition,
        JobView,
        LeaderExit,
        Limits,
        ListJobsReq,
        ListJobsRes,
        LogState,
        Outcome,
        OutputChunk,
        OutputPolicy,
        OutputStream,
        OutputVia,
        PauseJobReq,
        PauseJobRes,
        PruneJobsReq,
        PruneJobsRes,
        QueryJobReq,
        QueryJobRes,
        RegisterReq,
        RegisterRes,
        ResumeJobReq,
        ResumeJobRes,
        Rlimit,
        Sandbox,
        SchedulerBase,
        SchedulerStub,
        ShutdownWorkerReq,
        ShutdownWorkerRes,
        SignalJobReq,
        SignalJobRes,
        StartJobReq,
        StartJobRes,
        StopJobReq,
        StopJobRes,
        StreamJobReq,
        WaitJobReq,
        WaitJobRes,
        WatchJobsReq,
        WorkerBase,
        WorkerStub,
    )

# What is not named here is a message or a service of the contract.
_HOMES = {
    "worker_svc.client": ("Unreachable", "WorkerClient"),
    "worker_svc.job": (
        "DeadlineExceeded",
        "InvalidArgument",
        "JobError",
        "JobExists",
        "JobNotFound",
        "OutOfRange",
        "PermissionDenied",
        "PreconditionFailed",
        "ResourceExhausted",
        "Unavailable",
    ),
}
_CONTRACT = "worker_svc.pb.jobscheduler"

__all__ = [
    "DeadlineExceeded",
    "DeleteJobReq",
    "DeleteJobRes",
    "DeregisterReq",
    "DeregisterRes",
    "GetWorkerReq",
    "GetWorkerRes",
    "Groups",
    "Identity",
    "InvalidArgument",
    "Job",
    "JobError",
    "JobExists",
    "JobNotFound",
    "JobSpec",
    "JobState",
    "JobTransition",
    "JobView",
    "LeaderExit",
    "Limits",
    "ListJobsReq",
    "ListJobsRes",
    "LogState",
    "OutOfRange",
    "Outcome",
    "OutputChunk",
    "OutputPolicy",
    "OutputStream",
    "OutputVia",
    "PauseJobReq",
    "PauseJobRes",
    "PermissionDenied",
    "PreconditionFailed",
    "PruneJobsReq",
    "PruneJobsRes",
    "QueryJobReq",
    "QueryJobRes",
    "RegisterReq",
    "RegisterRes",
    "ResourceExhausted",
    "ResumeJobReq",
    "ResumeJobRes",
    "Rlimit",
    "Sandbox",
    "SchedulerBase",
    "SchedulerStub",
    "ShutdownWorkerReq",
    "ShutdownWorkerRes",
    "SignalJobReq",
    "SignalJobRes",
    "StartJobReq",
    "StartJobRes",
    "StopJobReq",
    "StopJobRes",
    "StreamJobReq",
    "Unavailable",
    "Unreachable",
    "WaitJobReq",
    "WaitJobRes",
    "WatchJobsReq",
    "WorkerBase",
    "WorkerClient",
    "WorkerStub",
    "__version__",
]

if not TYPE_CHECKING:

    def __getattr__(name):
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        home = next((module for module, names in _HOMES.items() if name in names), _CONTRACT)
        value = globals()[name] = getattr(import_module(home), name)
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
