"""What must be so before a worker is built: its signals, its files and addresses, its state directory to itself."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from structlog.typing import FilteringBoundLogger

from worker_svc.access import startchecks
from worker_svc.config import Config, GrpcServerConfig
from worker_svc.linux.lockfile import LockFile, LockHeld
from worker_svc.record import paths
from worker_svc.server.sockets import close_sockets, open_sockets


class StartError(Exception):
    """The worker cannot start; the text says why and what to do."""


def take_signals_as_usual() -> None:
    """Whatever whoever started us has blocked or ignored, which all processes inherit: SIGTERM must end us, also before
    there is a loop, and without SIGCHLD how the supervisor ended could not be told."""
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def check_start(config: Config, config_file: Path | None, log: FilteringBoundLogger, *, is_named: bool) -> None:
    """Warns of what others could do to the worker. Raises StartError for what must not be."""
    findings = startchecks.check(config, config_file, is_named=is_named)
    for finding in findings:
        if not finding.is_error:
            log.warning("worker.insecure", reason=finding.text)
    errors = [finding.text for finding in findings if finding.is_error]
    if errors:
        raise StartError("; ".join(errors))


@contextmanager
def worker_lock(state_dir: Path) -> Iterator[None]:
    """Makes the state directory, and this process the only worker on it. Raises StartError."""
    mask = os.umask(0o022)
    os.umask(mask | 0o022)  # of the parents: else the next start would find that others can change them
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = LockFile(str(state_dir / paths.WORKER_LOCK_NAME))
    except OSError as error:
        raise StartError(f"state.dir: {state_dir}: {error.strerror}") from error
    except LockHeld as held:
        raise StartError(
            f"state.dir: {state_dir} is in use by another worker (pid {held.pid}): end that one, or set another"
        ) from None
    finally:
        os.umask(mask)
    try:
        yield
    finally:
        lock.release()


async def bind(config: GrpcServerConfig) -> list[socket.socket]:
    """Raises StartError."""
    sockets: list[socket.socket] = []
    try:
        sockets = await open_sockets(config.addr)
        if config.addr.is_unix:
            startchecks.check_unix_socket(Path(config.addr.unix_path), int(config.unix_mode or "0600", 8))
    except OSError as error:
        close_sockets(config.addr, sockets)
        reason = os.strerror(error.errno).lower() if error.errno and error.errno > 0 else str(error)
        raise StartError(f"grpc_server.addr: {config.addr}: {reason}") from error
    return sockets
