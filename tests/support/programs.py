"""Programs for jobs to be, as argv: small, real, and found on any Linux machine."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Final

TRUE: Final = ["true"]
FALSE: Final = ["false"]
SLEEP: Final = ["sleep", "999"]
# Copies standard input to standard output.
CAT_STDIN: Final = ["cat"]
# One variable a line, as the job has them.
PRINT_ENV: Final = ["env"]
PRINT_CWD: Final = ["pwd", "-P"]
# One line on each of standard output and standard error.
BOTH_OUTPUTS: Final = ["sh", "-c", "echo to stdout; echo to stderr >&2"]
# Exits at once with 3, leaving a child in its group.
LEAVES_CHILD: Final = ["sh", "-c", "sleep 999 & exit 3"]
# Ignores SIGTERM; says so first, so that a test can wait for it.
IGNORE_TERM: Final = ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 999; done"]
# Ends with status 7 when it gets SIGUSR1, and says when it is ready for that.
EXIT_ON_USR1: Final = ["sh", "-c", "trap 'exit 7' USR1; echo ready; while :; do sleep 999 & wait; done"]
# Ends with status 5 when it gets SIGTERM.
EXIT_ON_TERM: Final = ["sh", "-c", "trap 'exit 5' TERM; echo ready; while :; do sleep 999 & wait; done"]


def exits(status: int) -> list[str]:
    return ["sh", "-c", f"exit {status}"]


def echo(text: str) -> list[str]:
    return ["printf", "%s", text]


def kills_self(number: int) -> list[str]:
    """Ended by this signal. Without a core file, which would take its time."""
    return ["sh", "-c", f"ulimit -c 0; kill -{number} $$; sleep 999"]


def flood(size_bytes: int) -> list[str]:
    return ["head", "-c", str(size_bytes), "/dev/zero"]


def sleeps(seconds: float) -> list[str]:
    return ["sleep", f"{seconds:g}"]


def until_exists(path: Path, status: int = 0) -> list[str]:
    """Runs until the test makes this file, then exits with `status`: ends when a test says so, and not by luck."""
    return ["sh", "-c", f'until [ -e "$1" ]; do sleep 0.02; done; exit {status}', "sh", str(path)]


def python(code: str, *args: str) -> list[str]:
    return [sys.executable, "-S", "-E", "-c", code, *args]


# Signals whose default action ends a process.
DEADLY: Final = (signal.SIGHUP, signal.SIGINT, signal.SIGKILL, signal.SIGUSR1, signal.SIGPIPE, signal.SIGTERM)


def is_alive(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    return state_of(pid) not in ("", "Z", "X")


def state_of(pid: int) -> str:
    """The letter of proc_pid_stat(5); empty: there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0].decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def children_of(pid: int) -> list[int]:
    """All of them, zombies too."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_bytes().rpartition(b")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[1]) == pid:
                found.append(int(entry.name))
    return found


def group_of(pgid: int) -> list[int]:
    """The living members of a process group."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_bytes().rpartition(b")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[2]) == pgid and fields[0] not in (b"Z", b"X"):
                found.append(int(entry.name))
    return found


def open_fds(pid: int) -> list[int]:
    return sorted(int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir())


def sleeps_for(pid: int, seconds: float) -> bool:
    """Whether the process waits so long for something to happen, all its threads. However busy the machine is, one that
    has nothing to do comes to do so; one that spins, or looks again and again, never does.
    """

    def look() -> list[tuple[str, str, list[str]]]:
        found = []
        for task in sorted(Path(f"/proc/{pid}/task").iterdir()):
            state = (task / "stat").read_bytes().rpartition(b")")[2].split()[0].decode()
            lines = (task / "status").read_text().splitlines()
            found.append((task.name, state, [line for line in lines if "ctxt_switches" in line]))
        return found

    before = look()
    time.sleep(seconds)
    return before == look() and all(state == "S" for _, state, _ in before)


def rss_bytes(pid: int) -> int:
    return status_field(pid, "VmRSS", 10) * 1024


def status_field(pid: int, name: str, base: int = 16) -> int:
    """A number of /proc/PID/status, such as SigIgn."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1], base)
    raise AssertionError(f"/proc/{pid}/status has no {name}")
