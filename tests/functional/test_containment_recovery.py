"""What a new supervisor makes of the containers of one that died; and numbers that came to be another process's."""

from __future__ import annotations

import os
import secrets
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from tests.support.contained import bystanders, contained, end, kill, run, skip_unless
from tests.support.programs import is_alive
from tests.support.waiting import PATIENCE_S, eventually_sync
from worker_svc.linux.processes import Process, environ_value, process, snapshot
from worker_svc.supervisor.containment import CGROUP, SUBREAPER
from worker_svc.supervisor.containment.signals import signal_job
from worker_svc.supervisor.containment.sweep import send

STATE_ID: Final = secrets.token_hex(8)
ROOT: Final = str(Path(__file__).parents[2])
# A supervisor that starts a job, says so, and is killed.
EARLIER: Final = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from tests.support.contained import contain, run
containment = contain(sys.argv[2], sys.argv[3])
job = run(containment, ["sh", "-c", sys.argv[4]], "job", stdout=2)
print(job.container.pid, job.container.start_ticks, containment.base_path or "-", flush=True)
signal.pause()
"""
TREE: Final = "setsid sh -c 'sleep 1000 & sleep 1000 & exit' & exec sleep 1000"
TREE_SIZE: Final = 3


def members(state_id: str) -> list[int]:
    """By the environment alone, asking no containment."""
    return [
        pid for pid, one in snapshot().items() if one.is_alive and environ_value(pid, b"WORKER_STATE_ID") == state_id
    ]


@contextmanager
def left_by_an_earlier_one(level: str, script: str = TREE) -> Iterator[tuple[int, int, str]]:
    """pid and start time of a running job's leader, whose supervisor is dead, and its base."""
    earlier = subprocess.Popen(
        [sys.executable, "-c", EARLIER, ROOT, level, STATE_ID, script], stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert earlier.stdout
    try:
        pid, start_ticks, base = earlier.stdout.readline().split()
        eventually_sync(lambda: len(members(STATE_ID)) == TREE_SIZE)
        earlier.kill()
        earlier.wait()
        yield int(pid), int(start_ticks), base.replace("-", "", 1) if base == "-" else base
    finally:
        earlier.stdout.close()
        for one in members(STATE_ID):
            os.kill(one, signal.SIGKILL)


def test_a_running_job_is_adopted_and_its_whole_tree_killed(each_level: str) -> None:
    with left_by_an_earlier_one(each_level) as (pid, start_ticks, base), bystanders("other") as others:
        with contained(each_level, STATE_ID, base) as containment:
            pidfd = os.pidfd_open(pid)
            container = containment.adopt("job", pid, pidfd, start_ticks)
            assert not containment.strangers()
            assert not containment.is_empty(container)
            assert len(containment.survivors(container)) == TREE_SIZE
            kill(containment, container)
            assert select.select([pidfd], [], [], PATIENCE_S)[0]
            eventually_sync(lambda: not members(STATE_ID))
            containment.leader_gone(container)
            os.close(pidfd)
            assert containment.remove(container)
        assert all(is_alive(one) for one in others)


def test_a_job_of_another_level_is_adopted_all_the_same() -> None:
    skip_unless(CGROUP)
    with left_by_an_earlier_one(SUBREAPER) as (pid, start_ticks, _), contained("cgroup", STATE_ID) as containment:
        pidfd = os.pidfd_open(pid)
        container = containment.adopt("job", pid, pidfd, start_ticks)
        assert not container.name
        assert len(containment.survivors(container)) == TREE_SIZE
        kill(containment, container)
        eventually_sync(lambda: not members(STATE_ID))
        containment.leader_gone(container)
        os.close(pidfd)


def test_the_tree_of_a_job_that_was_starting_is_found_without_its_pid(each_level: str) -> None:
    with left_by_an_earlier_one(each_level) as (_, _, base), contained(each_level, STATE_ID, base) as containment:
        container = containment.adopt("job")
        assert len(containment.survivors(container)) == TREE_SIZE
        containment.signal(container, signal.SIGTERM)
        eventually_sync(lambda: not members(STATE_ID))
        assert eventually_sync(lambda: containment.kill(container))


def test_orphans_are_the_containers_without_a_job(each_level: str) -> None:
    with left_by_an_earlier_one(each_level) as (_, _, base), contained(each_level, STATE_ID, base) as containment:
        assert containment.strangers() == [("job", 0)]
        for job_id, accepted_ns in containment.strangers():
            container = containment.adopt(job_id, accepted_ns=accepted_ns)
            kill(containment, container)
            containment.remove(container)
        assert not members(STATE_ID)
        assert not containment.strangers()


def test_a_freeze_outlives_its_supervisor_and_is_undone(each_level: str) -> None:
    with (
        left_by_an_earlier_one(each_level) as (pid, start_ticks, base),
        contained(each_level, STATE_ID, base) as containment,
    ):
        pidfd = os.pidfd_open(pid)
        container = containment.adopt("job", pid, pidfd, start_ticks)
        containment.freeze(container)
        containment.thaw(container)
        containment.signal(container, signal.SIGTERM)
        assert select.select([pidfd], [], [], PATIENCE_S)[0]
        containment.leader_gone(container)
        os.close(pidfd)


def test_a_process_that_has_the_number_now_is_never_signalled() -> None:
    with bystanders("other") as others:
        there = process(others[1])
        assert there is not None
        gone = there._replace(start_ticks=there.start_ticks - 1)
        assert not send(gone, signal.SIGKILL)
        assert is_alive(others[1])


def test_the_session_of_a_number_that_was_recycled_is_nobodys(each_level: str) -> None:
    """nomad#23969. The leader is reaped, then its very number leads a foreign session."""
    last_pid = Path("/proc/sys/kernel/ns_last_pid")
    if not os.access(last_pid, os.W_OK):
        pytest.skip(f"{last_pid} cannot be written: no process can be given a chosen number")
    with contained(each_level) as containment:
        running = run(containment, ["true"])
        running.wait_for_leader()
        pid, pidfd = running.container.pid, running.container.pidfd
        assert os.waitpid(pid, 0)[0] == pid
        for keeps_pidfd in (True, False):
            with foreign_session(pid, last_pid) as foreign:
                assert containment.kill(running.container)
                containment.signal(running.container, signal.SIGKILL)
                if keeps_pidfd:
                    signal_job(pidfd, pid, signal.SIGKILL, is_child=False)
                assert containment.survivors(running.container) == []
                assert all(is_alive(one.pid) for one in foreign)
            # The number is free again once nothing at all is in the session.
            eventually_sync(
                lambda: containment.reap_orphans() or not any(s.session == pid for s in snapshot().values())
            )
            if keeps_pidfd:
                os.close(pidfd)
                containment.leader_gone(running.container)
        running.container.is_child = False  # the same, if an earlier supervisor had started it
        with foreign_session(pid, last_pid) as foreign:
            assert containment.kill(running.container)
            assert all(is_alive(one.pid) for one in foreign)
        end(containment, running)


NANNY: Final = """
import os, signal, sys, time
wanted = int(sys.argv[1])
for _ in range(200):
    with open(sys.argv[2], "w") as file:
        file.write(str(wanted - 1))
    pid = os.fork()
    if not pid:
        os.setsid()
        if os.getpid() == wanted:
            os.fork()
        time.sleep(1000)
    if pid == wanted:
        print("ready", flush=True)
        os.wait()
        break
    os.kill(pid, signal.SIGKILL)
    os.wait()
"""


@contextmanager
def foreign_session(pid: int, last_pid: Path) -> Iterator[list[Process]]:
    """Two processes, the first with this number, the leader of its session."""
    with subprocess.Popen(
        [sys.executable, "-S", "-c", NANNY, str(pid), str(last_pid)], stdout=subprocess.PIPE, text=True
    ) as nanny:
        assert nanny.stdout
        if nanny.stdout.readline() != "ready\n":
            pytest.skip("the number could not be had")
        found: list[Process] = []

        def both() -> bool:
            found[:] = [one for one in snapshot().values() if one.session == pid]
            return len(found) == 2

        eventually_sync(both)
        try:
            yield found
        finally:
            for one in found:
                os.kill(one.pid, signal.SIGKILL)
            nanny.wait()
