"""Jobs in containers, without a supervisor around them; and an oracle for what is left of them that asks no
containment."""

from __future__ import annotations

import functools
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from tests.support.programs import python
from tests.support.waiting import PATIENCE_S, eventually_sync
from worker_svc.job.limits import NO_LIMITS, Limits
from worker_svc.linux.processes import process
from worker_svc.supervisor.containment import CGROUP, SUBREAPER, Container, Containment, ContainmentError
from worker_svc.supervisor.containment.marks import Marks

# "cgroup-each": a cgroup without cgroup.kill, as before Linux 5.14.
LEVELS: Final = (CGROUP, "cgroup-each", SUBREAPER)
SECRET: Final = b"of the tests"
# A real supervisor's last straw, too: what a kill leaves is killed again after a while.
KILL_AGAIN_S: Final = 0.005
_PATH: Final = {"PATH": os.environ.get("PATH", "/usr/bin:/bin")}


def contain(level: str, state_id: str = "", base: str = "") -> Containment:
    """Raises ContainmentError if this machine lacks the level."""
    containment = Containment(state_id or secrets.token_hex(8), SECRET, level=level.removesuffix("-each"), base=base)
    if level.endswith("-each"):
        assert containment._groups
        containment._groups.has_kill = False
    return containment


@functools.cache
def why_unavailable(level: str) -> str:
    """Empty: the level can be had."""
    try:
        contain(level).close()
    except ContainmentError as error:
        return error.message
    finally:
        stop_being_subreaper()
    return ""


def skip_unless(level: str) -> None:
    """The test needs a level that this machine may lack."""
    import pytest

    if why := why_unavailable(level):
        pytest.skip(f"level {level}: {why}")


def stop_being_subreaper() -> None:
    import ctypes

    ctypes.CDLL(None).prctl(36, ctypes.c_ulong(0), 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


class Oracle:
    """Readable to its end when every process that inherited the write end is gone, whatever became of it otherwise."""

    def __init__(self) -> None:
        self.read_fd, self.write_fd = os.pipe()

    def is_gone(self, timeout_s: float = 0.0) -> bool:
        return bool(select.select([self.read_fd], [], [], timeout_s)[0])

    def close(self) -> None:
        os.close(self.read_fd)


class Running(NamedTuple):
    container: Container
    process: subprocess.Popen[bytes]
    oracle: Oracle

    def wait_for_leader(self) -> None:
        """Not reaped: that is the containment's business."""
        assert select.select([self.container.pidfd], [], [], PATIENCE_S)[0]


def run(
    containment: Containment,
    argv: list[str],
    job_id: str = "job",
    *,
    limits: Limits = NO_LIMITS,
    stdout: int | None = None,
) -> Running:
    """Starts a job as a supervisor does, but that it joins its cgroup itself, before exec."""
    container = containment.create(job_id, limits)
    oracle = Oracle()
    if container.name:
        procs = f"{containment.base_path}/{container.name}/cgroup.procs"
        argv = ["sh", "-c", 'echo 0 > "$0" && exec "$@"', procs, *argv]
    popen = subprocess.Popen(
        argv,
        env=_PATH | containment.marks(container),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        start_new_session=True,
        pass_fds=[oracle.write_fd],
    )
    os.close(oracle.write_fd)
    popen.returncode = 0  # not Popen's to reap
    started = process(popen.pid)
    assert started is not None
    containment.started(container, popen.pid, os.pidfd_open(popen.pid), started.start_ticks)
    return Running(container, popen, oracle)


def end(containment: Containment, running: Running, *, is_gone: bool = True) -> None:
    """What a supervisor does at the end of a job. is_gone: the oracle is not needed any more."""
    pidfd = running.container.pidfd
    if pidfd >= 0:
        running.wait_for_leader()
        assert containment.take_exit(running.container) is not None
        os.close(pidfd)
    if is_gone:
        running.oracle.close()
    containment.reap_orphans()
    if not containment.remove(running.container):  # the last one is not quite dead
        eventually_sync(lambda: containment.tidy() == 0)


def kill(containment: Containment, container: Container, timeout_s: float = PATIENCE_S) -> None:
    """Until nothing is left, as a supervisor does: woken by events, and again after a while."""
    deadline_s = time.monotonic() + timeout_s
    while not containment.kill(container):
        assert time.monotonic() < deadline_s, containment.survivors(container)
        select.select([containment.events_fd], [], [], KILL_AGAIN_S)
        containment.take_events()
        containment.reap_orphans()


def run_until_up(containment: Containment, argv: list[str], job_id: str = "job", limits: Limits = NO_LIMITS) -> Running:
    """Started, and as far as to have said "up"."""
    read_fd, write_fd = os.pipe()
    running = run(containment, argv, job_id, limits=limits, stdout=write_fd)
    os.close(write_fd)
    said = b""
    while b"up" not in said:
        part = os.read(read_fd, 64)
        assert part, "it ended before it was up"
        said += part
    os.close(read_fd)
    return running


@contextmanager
def contained(level: str, state_id: str = "", base: str = "") -> Iterator[Containment]:
    """A containment that is cleared at the end, of whatever the test left in it."""
    containment = contain(level, state_id, base)
    try:
        yield containment
    finally:
        for container in list(containment._containers.values()):
            kill(containment, container)
            containment.remove(container)
        containment.reap_orphans()
        eventually_sync(lambda: containment.tidy() == 0)
        made = containment.base_path
        containment.close()
        stop_being_subreaper()
    assert base or not made or not Path(made).exists(), "the base group was left"


# Started by a nanny in our own session, so that they are not children of ours: a supervisor has none but jobs.
_NANNY: Final = """
import os, sys, time
state, mark = sys.argv[1:]
for marks in ({}, {"WORKER_JOB_ID": "job"}, {"WORKER_STATE_ID": state},
              {"WORKER_JOB_ID": "job", "WORKER_STATE_ID": state},
              {"WORKER_JOB_ID": "job", "WORKER_STATE_ID": state, "WORKER_JOB_MARK": "x" + mark[1:]},
              {"WORKER_JOB_ID": "job", "WORKER_STATE_ID": state, "WORKER_JOB_MARK": mark + "2"},
              {"WORKER_JOB_ID": "job", "WORKER_STATE_ID": state, "WORKER_JOB_MARK": mark[:-1]},
              {"X": "WORKER_JOB_MARK=" + mark}):
    pid = os.fork()
    if not pid:
        os.setsid()
        os.execvpe("sleep", ["sleep", "1000"], {**marks, "PATH": os.environ["PATH"]})
    print(pid, flush=True)
print("ready", flush=True)
time.sleep(1000)
"""


@contextmanager
def bystanders(state_id: str) -> Iterator[list[int]]:
    """Processes of ours that look much like those of the job `job` of this state, and are none."""
    mark = Marks(state_id, SECRET).of("job", 0)
    nanny = subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", _NANNY, state_id, mark], env=_PATH, stdout=subprocess.PIPE, text=True
    )
    assert nanny.stdout
    pids = []
    for line in nanny.stdout:
        if line == "ready\n":
            break
        pids.append(int(line))
    try:
        yield [nanny.pid, *pids]
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        nanny.kill()
        nanny.wait()
        nanny.stdout.close()


# What tries to get away, as argv. Each says on standard output when it is up, in the words "up".
_SLEEP: Final = "sleep 1000"
# Into the group of everybody, for who may (root), as pam_systemd(8) moves who logs in.
LEAVE_CGROUP: Final = (
    "p=$(sed -n 's/^[^ ]* [^ ]* [^ ]* [^ ]* \\([^ ]*\\) .* - cgroup2 .*/\\1/p' /proc/self/mountinfo | head -n 1); "
    '(echo $$ > "$p/cgroup.procs") 2>/dev/null'
)


def apart(script: str, by: str = "", then: str = f"exec {_SLEEP}") -> list[str]:
    """Runs a script in a session of its own, started by a command, and then another one."""
    return ["sh", "-c", f'{by} setsid sh -c "$1" & {then}', "sh", script]


ESCAPEES: Final[dict[str, list[str]]] = {
    "child": ["sh", "-c", f"{_SLEEP} & echo up; exec {_SLEEP}"],
    "setsid": ["sh", "-c", f"setsid sh -c 'echo up; exec {_SLEEP}' & exec {_SLEEP}"],
    "double fork": ["sh", "-c", f"(setsid sh -c '{_SLEEP} & {_SLEEP} & echo up') & exec {_SLEEP}"],
    "cleared environment": ["sh", "-c", f"env -i setsid sh -c '(/bin/sleep 1000 &) ; echo up' & exec {_SLEEP}"],
    "ignores SIGTERM": [
        "sh",
        "-c",
        f"trap '' TERM HUP; setsid sh -c \"trap '' TERM; echo up; {_SLEEP}; {_SLEEP}\" & {_SLEEP}; {_SLEEP}",
    ],
    # 2**6 - 1 processes, every second one in a session of its own
    "fork tree": python(
        "import os, time\n"
        "depth = 0\n"
        "while depth < 5:\n"
        "    depth += 1\n"
        "    for _ in range(2):\n"
        "        if not os.fork():\n"
        "            if _: os.setsid()\n"
        "            break\n"
        "    else:\n"
        "        break\n"
        "else: os.write(1, b'u')\n"
        "if depth == 1: os.write(1, b'up')\n"
        "time.sleep(1000)\n"
    ),
    # Three sessions that fork all the time
    "forks while killed": [
        "sh",
        "-c",
        'f=\'while :; do sleep 0.03 & done\'; setsid sh -c "$f" & setsid sh -c "$f" & echo up; eval "$f"',
    ],
    # One process that is never the same: it forks, exits, and its child goes on in a session of its own.
    "walks away": python(
        "import os\n"
        "if not os.fork():\n"
        "    os.write(1, b'up')\n"
        "    while True:\n"
        "        if os.fork(): os._exit(0)\n"
        "        os.setsid()\n"
        "os.wait()\n"
        "import time; time.sleep(1000)\n"
    ),
    "unmarked": apart(f"echo up; exec {_SLEEP}", "env -i"),
    "unmarked, its parents gone": ["sh", "-c", f"env -i setsid sh -c '(/bin/sleep 1000 &)'; echo up; exec {_SLEEP}"],
    "with another mark": apart(f"echo up; exec {_SLEEP}", "env WORKER_JOB_ID=other WORKER_JOB_MARK=made-up"),
    "leaves its cgroup": apart(f"{LEAVE_CGROUP}; echo up; exec {_SLEEP}"),
    "leaves its cgroup unmarked": apart(f"{LEAVE_CGROUP}; {_SLEEP} & echo up; exec {_SLEEP}", "env -i"),
    "leader first": ["sh", "-c", f"setsid sh -c 'echo up; exec {_SLEEP}' & {_SLEEP} & sleep 0.01"],
}
