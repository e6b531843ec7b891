"""`python -m worker_svc.supervisor --state-dir DIR --ready-fd N`: started by the worker, outlives it.

On the ready fd it says one line: `ready PID`, or `failed: ` and why.
"""

from __future__ import annotations

import fcntl
import gc
import os
import resource
import signal
import socket
import sqlite3
import sys
from typing import Final

from worker_svc.supervisor.connections import listen
from worker_svc.supervisor.journal import note
from worker_svc.supervisor.loop import Supervisor
from worker_svc.supervisor.store import JobStore, StoreError, directory_identity

LOCK_NAME: Final = "supervisor.lock"
LOG_NAME: Final = "supervisor.log"
_LOG_MAX_BYTES: Final = 1024 * 1024
EXIT_LOCKED: Final = 3


def main(argv: list[str]) -> int:
    options = dict(zip(argv[::2], argv[1::2], strict=True))
    state_dir, ready_fd = options["--state-dir"], int(options["--ready-fd"])
    os.set_inheritable(ready_fd, False)
    try:
        _prepare_process(state_dir)
        lock_fd = _lock(state_dir)
        if lock_fd is None:
            _tell(ready_fd, f"failed: {state_dir} has a supervisor already")
            return EXIT_LOCKED
        store = JobStore(state_dir)
        supervisor = Supervisor(
            state_dir, store, listen(state_dir), _signal_fd(), owns_processes=_is_original(store, state_dir)
        )
        store.set_meta("directory", directory_identity(state_dir))
    except (OSError, StoreError, sqlite3.Error) as error:
        note("supervisor.failed", reason=str(error))
        _tell(ready_fd, f"failed: {error}")
        return 1
    note("supervisor.started", pid=os.getpid())
    _tell(ready_fd, f"ready {os.getpid()}")
    # Whatever start-up made is here to stay: to walk it again and again would be for nothing.
    gc.freeze()
    supervisor.run()
    os.unlink(f"{state_dir}/supervisor.sock")
    store.close()
    note("supervisor.left")
    return 0


def _prepare_process(state_dir: str) -> None:
    """Whatever the worker was given by whoever started it, jobs must not inherit from us."""
    os.umask(0o077)
    os.chdir("/")
    os.makedirs(f"{state_dir}/output", mode=0o700, exist_ok=True)
    log = os.open(f"{state_dir}/{LOG_NAME}", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    if os.fstat(log).st_size > _LOG_MAX_BYTES:
        os.ftruncate(log, 0)
    os.dup2(log, 2)
    os.close(log)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE}:
        if number < signal.SIGRTMIN:
            signal.signal(number, signal.SIG_DFL)
    # Not SIG_IGN, which jobs would inherit through exec (signal(7)).
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, _on_nothing)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _on_nothing(number: int, frame: object) -> None:
    """Jobs outlive a terminal that hangs up and a Ctrl-C meant for the worker."""


def _signal_fd() -> int:
    """Readable after a SIGTERM: the supervisor then leaves as soon as no job is left."""
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    signal.signal(signal.SIGTERM, _on_nothing)
    signal.set_wakeup_fd(sender.detach(), warn_on_full_buffer=False)
    return receiver.detach()


def _lock(state_dir: str) -> int | None:
    """The lock that makes this process the only supervisor of the directory; None if another one has it.

    It is held for the life of the process, and let go by the kernel whatever ends it.
    """
    fd = os.open(f"{state_dir}/{LOCK_NAME}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _is_original(store: JobStore, state_dir: str) -> bool:
    """Whether this is the directory the store was made in, not a copy."""
    return store.get_meta("directory") in (None, directory_identity(state_dir))


def _tell(ready_fd: int, line: str) -> None:
    try:
        os.write(ready_fd, f"{line}\n".encode())
    except BrokenPipeError:
        note("supervisor.nobody_waits")  # the worker died meanwhile; the next one finds us
    os.close(ready_fd)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
