"""Signals by name, by number and in words."""

from __future__ import annotations

import re
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


_REAL_TIME: Final = re.compile(r"SIG(?:RT(MIN\+|MAX-))?([0-9]{1,2})", re.ASCII)


def parse_signal(text: str) -> int:
    """A signal's number from "SIGTERM", "term" or "15"; from "SIGRTMIN+3", "SIGRTMAX-2" or "SIG37" for the real-time
    signals between the ends, which have no names of their own (signal(7)). Raises ValueError with a text for the user.
    """
    name = text.strip().upper()
    number = int(name) if name.isascii() and name.isdigit() and len(name) <= 3 else _number_of(name)
    if number not in signal.valid_signals():
        raise ValueError(f"there is no signal {name_of(text)!r}: use a name such as SIGTERM, or a number")
    return number


def _number_of(name: str) -> int:
    """0: there is none."""
    name = name if name.startswith("SIG") else f"SIG{name}"
    if found := _REAL_TIME.fullmatch(name):
        end, step = found[1], int(found[2])
        number = {"MIN+": signal.SIGRTMIN + step, "MAX-": signal.SIGRTMAX - step}.get(end or "", step)
        return int(number) if signal.SIGRTMIN <= number <= signal.SIGRTMAX else 0
    known = signal.Signals.__members__.get(name)
    return 0 if known is None else int(known)


def signal_name(number: int) -> str:
    """What `parse_signal` takes back: `SIGTERM`, `SIGRTMIN+3`; of what is no signal of this platform `SIG33`."""
    try:
        return signal.Signals(number).name
    except ValueError:
        is_real_time = signal.SIGRTMIN < number < signal.SIGRTMAX
        return f"SIGRTMIN+{number - signal.SIGRTMIN}" if is_real_time else f"SIG{number}"
