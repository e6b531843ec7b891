"""worker-svc: runs jobs for a scheduler over gRPC, and keeps them when it dies.

`from worker_svc import WorkerClient, StartJobReq` works: `worker_svc.public` is the table of all public names. It is
loaded when the first of them is asked for, not before, because the supervisor imports modules of this package too and
must stay small.
"""

__version__ = "0.1.0"

# Type checkers take the name for true, whatever it is set to; `typing` itself would cost an import.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from worker_svc.public import *  # noqa: F403
else:

    def __getattr__(name):
        # Public names are classes. What is written small is a module, which the import system finds by itself.
        if name == "__all__" or name[0].isupper():
            from importlib import import_module

            public = vars(import_module("worker_svc.public"))
            names = [known for known in public if known[0].isupper()]
            globals().update({known: public[known] for known in names}, __all__=[*names, "__version__"])
            if name in globals():
                return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__getattr__("__all__")})
