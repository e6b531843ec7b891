"""The clients for schedulers and for the command line, and the errors that only they raise.

`WorkerClient` is asynchronous and typed, and is loaded when it is first asked for: grpclib and betterproto take longer
to import than a short command takes in all. `blocking` does without both.

Runs wherever Python does: nothing here, or imported here, is specific to Linux.
"""

from typing import TYPE_CHECKING

from worker_svc.client.errors import Unreachable, Untrusted

if TYPE_CHECKING:
    from worker_svc.client.many import RunResult
    from worker_svc.client.worker_client import WorkerClient
else:

    def __getattr__(name):
        if name == "RunResult":
            from worker_svc.client.many import RunResult

            return RunResult
        if name != "WorkerClient":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from worker_svc.client.worker_client import WorkerClient

        return WorkerClient


__all__ = ["RunResult", "Unreachable", "Untrusted", "WorkerClient"]
