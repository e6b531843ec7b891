"""Before any test imports grpcio: its handlers of fork(2) end some children of a process with its threads.

They run in what `subprocess` forks, since the pure-Python spawner turns vfork off (a child then ends with SIGABRT,
"epoll_wait error: Bad file descriptor", once in some thousand starts).
"""

import os

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
