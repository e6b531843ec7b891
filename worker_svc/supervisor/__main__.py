"""`python -m worker_svc.supervisor --state-dir DIR --ready-fd N [--containment LEVEL] [--spawner NAME]`.

Started by the worker, it outlives it.

On the ready fd it says one line: `ready PID`, or `failed: ` and why.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sqlite3
import sys
from typing import Final

from worker_svc.ipc.messages import EXIT_LOCKED
from worker_svc.linux import failpoints, stdio
from worker_svc.linux.lockfile import LockFile, LockHeld
from worker_svc.record import paths, statedir
from worker_svc.record.paths import output_folder
from worker_svc.record.schema import StoreError
from worker_svc.record.writer import JobStore
from worker_svc.supervisor import disk_reserve, original, raised_limits
from worker_svc.supervisor.containment import Containment, ContainmentError
from worker_svc.supervisor.journal import note, use_log
from worker_svc.supervisor.loop import Supervisor

# What it sends to a process whose own instructions failed: to go on would be to run into them again, without end.
_OF_THE_KERNEL: Final = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL})


def main(argv: list[str]) -> int:
    options = dict(zip(argv[::2], argv[1::2], strict=True))
    state_dir, ready_fd = options["--state-dir"], int(options["--ready-fd"])
    os.set_inheritable(ready_fd, False)
    try:
        _prepare_process(state_dir)
        inherited = raised_limits.claim()
        lock = LockFile(f"{state_dir}/{paths.SUPERVISOR_LOCK_NAME}", with_directory=True)
        note("supervisor.starting", pid=os.getpid())
        failpoints.arm(state_dir)
        wrong = statedir.what_is_wrong(state_dir)
        if wrong:
            raise StoreError(wrong)
        store = disk_reserve.open_store(state_dir)
        is_original = original.is_original(store, state_dir)
        if not is_original:
            store.renew_state_id()  # the processes marked with the old one are the original's
        containment = Containment(
            store.state_id,
            _mark_secret(store),
            level=options.get("--containment", ""),
            base=os.fsdecode(store.get_meta("cgroup_base") or ""),
        )
        signals = _signal_fd()
        supervisor = Supervisor(
            state_dir,
            store,
            lock,
            signals,
            containment,
            spawner=options.get("--spawner", ""),
            inherited=inherited,
            owns_processes=is_original,
        )
        original.remember(store, state_dir)
    except LockHeld as held:
        _tell(ready_fd, f"failed: {state_dir} has a supervisor already (pid {held.pid}){_call(held.pid, state_dir)}")
        return EXIT_LOCKED
    except (OSError, StoreError, ContainmentError, sqlite3.Error, RuntimeError, MemoryError) as error:
        reason = str(error) or "out of memory"
        note("supervisor.failed", reason=reason)
        _tell(ready_fd, f"failed: {reason}")
        return 1
    note("supervisor.started", pid=os.getpid())
    _tell(ready_fd, f"ready {os.getpid()}")
    # Whatever start-up made is here to stay: to walk it again and again would be for nothing.
    gc.freeze()
    supervisor.run()
    containment.close()
    store.close()
    note("supervisor.left")
    lock.release()
    return 0


def _prepare_process(state_dir: str) -> None:
    """Whatever the worker was given by whoever started it, jobs must not inherit from us."""
    stdio.ensure_descriptors()
    os.chdir("/")
    os.makedirs(output_folder(state_dir), mode=0o700, exist_ok=True)
    use_log(state_dir)
    # A job that signals its parent, or an operator whole groups of processes, must not end what holds all jobs. Not
    # SIG_IGN, which jobs would inherit through exec (signal(7)). SIGPIPE is ignored by Python.
    for number in signal.valid_signals() - _OF_THE_KERNEL - {signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE}:
        signal.signal(number, _on_nothing)
    for number in _OF_THE_KERNEL:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def _on_nothing(number: int, frame: object) -> None:
    """What there is to do is done by the loop, which the wakeup fd tells."""


def _signal_fd() -> int:
    """The numbers of the signals that come: the loop knows those that mean something."""
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    signal.set_wakeup_fd(sender.detach(), warn_on_full_buffer=False)
    return receiver.detach()


def _call(pid: str, state_dir: str) -> str:
    """Has the supervisor that holds the directory put back what was removed of it. Returns what to say of it."""
    ours = (paths.SOCKET_NAME, paths.SUPERVISOR_LOCK_NAME)
    gone = [name for name in ours if not os.path.lexists(f"{state_dir}/{name}")]
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            command = file.read()
        if b"worker_svc.supervisor" in command and os.fsencode(state_dir) in command:
            os.kill(int(pid), signal.SIGHUP)
    except (OSError, ValueError):  # it is of another PID namespace, or has just ended
        return ""
    return f": {' and '.join(gone)} was removed, and it has been told to make that anew" if gone else ""


def _mark_secret(store: JobStore) -> bytes:
    """Made once, so that the next supervisor knows the marks that this one gives."""
    kept = store.get_meta("mark_secret")
    if kept is not None:
        return bytes.fromhex(kept)
    secret = os.urandom(32)
    try:
        store.set_meta("mark_secret", secret.hex())
    except sqlite3.Error as error:  # a full disk must not keep us from starting
        note("store.failed", reason=str(error))
    return secret


def _tell(ready_fd: int, line: str) -> None:
    try:
        os.write(ready_fd, f"{line}\n".encode())
    except BrokenPipeError:
        note("supervisor.nobody_waits")  # the worker died meanwhile; the next one finds us
    os.close(ready_fd)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
