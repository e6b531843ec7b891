"""The gRPC server: grpclib's calls behind a transport of our own, which reads strictly, keeps to limits and leaves
well.
"""

from worker_svc.server.grpc_server import GrpcServer
from worker_svc.server.listener import close_sockets, open_sockets

__all__ = ["GrpcServer", "close_sockets", "open_sockets"]
