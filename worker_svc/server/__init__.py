"""The gRPC server: grpclib's calls behind a transport of our own, which reads strictly, keeps to limits and leaves
well.

What serves is loaded when it is first asked for: to bind a socket (`sockets`) takes nothing of it.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worker_svc.server.grpc_server import GrpcServer
else:

    def __getattr__(name):
        if name != "GrpcServer":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from worker_svc.server.grpc_server import GrpcServer

        return GrpcServer


__all__ = ["GrpcServer"]
