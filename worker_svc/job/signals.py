"""Signals by name, by number and in words."""

from __future__ import annotations

import signal
from typing import Final

from worker_svc.job.texts import name_of

# The words of Go's syscall.Signal.String() on Linux, which the original worker put into errorText.
SIGNAL_WORDS: Final = [
    "signal 0",
    "hangup",
    "interrupt",
    "quit",
    "illegal instruction",
    "trace/breakpoint trap",
    "aborted",
    "bus error",
    "floating point exception",
    "killed",
    "user defined signal 1",
    "segmentation fault",
    "user defined signal 2",
    "broken pipe",
    "alarm clock",
    "terminated",
    "stack fault",
    "child exited",
    "continued",
    "stopped (signal)",
    "stopped",
    "stopped (tty input)",
    "stopped (tty output)",
    "urgent I/O condition",
    "CPU time limit exceeded",
    "file size limit exceeded",
    "virtual timer expired",
    "profiling timer expired",
    "window changed",
    "I/O possible",
    "power failure",
    "bad system call",
]


def parse_signal(text: str) -> int:
    """A signal's number from "SIGTERM", "term" or "15". Raises ValueError with a text for the user."""
    name = text.strip().upper()
    if name.isascii() and name.isdigit():
        number = int(name)
        if number not in signal.valid_signals():
            raise ValueError(f"there is no signal {number}")
        return number
    known = signal.Signals.__members__.get(name if name.startswith("SIG") else f"SIG{name}")
    if known is None:
        raise ValueError(f"there is no signal {name_of(text)!r}: use a name such as SIGTERM, or a number")
    return int(known)


def signal_name(number: int) -> str:
    """`SIGTERM`; real-time signals between the ends have no name and are told as `SIG35`."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIG{number}"
