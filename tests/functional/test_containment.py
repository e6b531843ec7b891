"""Containers at every level that this machine has: the same promises, whatever the means.

WORKER_TEST_REPEATS says how often each escape is tried.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
from pathlib import Path
from typing import Final

import pytest

from tests.support.contained import (
    ESCAPEES,
    LEAVE_CGROUP,
    apart,
    bystanders,
    end,
    kill,
    run,
    run_until_up,
)
from tests.support.programs import LEAVES_CHILD, SLEEP, is_alive, open_fds, python
from tests.support.waiting import PATIENCE_S, eventually_sync, next_tick, stays
from worker_svc.job.limits import OF_TREE
from worker_svc.linux.processes import process
from worker_svc.supervisor.containment import CGROUP, SUBREAPER, Containment, ContainmentError

REPEATS: Final = int(os.environ.get("WORKER_TEST_REPEATS", "1"))
often = pytest.mark.parametrize("repeats", [REPEATS, pytest.param(200, marks=pytest.mark.long)])


@often
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ESCAPEES)
def test_nothing_escapes_a_kill_and_nobody_else_is_touched(containment: Containment, name: str, repeats: int) -> None:
    with bystanders(containment._marks._state_id) as others:
        for _ in range(repeats):
            running = run_until_up(containment, ESCAPEES[name])
            if name == "leader first":
                running.wait_for_leader()
            kill(containment, running.container)
            assert running.oracle.is_gone(PATIENCE_S), containment.survivors(running.container)
            assert containment.is_empty(running.container)
            assert containment.survivors(running.container) == []
            end(containment, running)
        assert all(is_alive(pid) for pid in others)
    assert not containment._containers


SLEEP_UP: Final = ["sh", "-c", "echo up; exec sleep 1000"]
# Where there is no cgroup, nothing tells whose it is.
DOUBTFUL: Final = "unmarked, its parents gone"


@often
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ESCAPEES)
def test_nothing_escapes_while_other_jobs_run_and_they_run_on(
    containment: Containment, name: str, repeats: int
) -> None:
    for _ in range(repeats):
        older = run_until_up(containment, ESCAPEES["double fork"], "older")
        next_tick()
        running = run_until_up(containment, ESCAPEES[name])
        newer = run_until_up(containment, SLEEP_UP, "newer")
        if name == "leader first":
            running.wait_for_leader()
        kill(containment, running.container)
        is_doubtful = name == DOUBTFUL and containment.level == SUBREAPER
        assert running.oracle.is_gone(0.0 if is_doubtful else PATIENCE_S) is not is_doubtful
        assert len(containment.doubtful(running.container)) == is_doubtful
        end(containment, running, is_gone=not is_doubtful)
        assert not older.oracle.is_gone()
        assert not newer.oracle.is_gone()
        for other in (newer, older):
            kill(containment, other.container)
            assert other.oracle.is_gone(PATIENCE_S)
            end(containment, other)
        if is_doubtful:
            assert running.oracle.is_gone(PATIENCE_S)
            running.oracle.close()


def test_one_job_is_killed_and_the_others_run_on(containment: Containment) -> None:
    doomed, spared = (run_until_up(containment, ESCAPEES["double fork"], job_id) for job_id in ("a", "b"))
    eventually_sync(lambda: len(containment._members(spared.container)) == 3)  # the go-between has gone
    before = {one.pid for one in containment._members(spared.container)}
    kill(containment, doomed.container)
    assert doomed.oracle.is_gone(PATIENCE_S)
    assert {one.pid for one in containment._members(spared.container)} == before
    kill(containment, spared.container)
    for running in (doomed, spared):
        end(containment, running)


def test_orphans_without_marks_are_ended_with_the_last_job_that_can_have_left_them(containment: Containment) -> None:
    """Both could be the orphan's origin, as far as /proc tells: a running job is never hurt by the other's end."""
    first = run_until_up(containment, SLEEP_UP, "first")
    next_tick()
    second = run_until_up(containment, ESCAPEES[DOUBTFUL], "second")
    kill(containment, second.container)
    is_doubtful = containment.level == SUBREAPER
    assert second.oracle.is_gone(0.0 if is_doubtful else PATIENCE_S) is not is_doubtful
    assert len(containment.doubtful(second.container)) == is_doubtful
    end(containment, second, is_gone=False)
    next_tick()
    third = run_until_up(containment, SLEEP_UP, "third")
    assert containment.doubtful(third.container) == []
    kill(containment, third.container)
    end(containment, third)
    assert second.oracle.is_gone() is not is_doubtful
    kill(containment, first.container)
    assert second.oracle.is_gone(PATIENCE_S)
    end(containment, first)


def test_an_orphan_without_marks_holds_up_no_other_job(containment: Containment) -> None:
    """Once its own job is gone, a job that waits for its tree does not wait for it."""
    first = run_until_up(containment, SLEEP_UP, "first")
    next_tick()
    second = run_until_up(containment, ESCAPEES[DOUBTFUL], "second")
    kill(containment, second.container)
    end(containment, second, is_gone=False)
    os.kill(first.process.pid, signal.SIGKILL)
    first.wait_for_leader()
    eventually_sync(lambda: containment.is_empty(first.container))
    kill(containment, first.container)
    assert second.oracle.is_gone(PATIENCE_S)
    end(containment, first)


def test_a_process_that_was_seen_below_the_leader_stays_the_jobs(containment: Containment) -> None:
    """Whatever it turns itself into, and although others run that may have started it."""
    others = [run_until_up(containment, SLEEP_UP, "older")]
    next_tick()
    running = run_until_up(containment, apart(f"{LEAVE_CGROUP}; echo up; exec sleep 1000", "env -i", "wait; exit 4"))
    others.append(run_until_up(containment, SLEEP_UP, "newer"))
    containment.signal(running.container, signal.SIGTERM)
    running.wait_for_leader()
    assert not running.oracle.is_gone()
    kill(containment, running.container)
    assert running.oracle.is_gone(PATIENCE_S)
    for one in (running, *others):
        assert one is running or not one.oracle.is_gone()
        kill(containment, one.container)
        end(containment, one)


def test_a_copied_mark_is_no_help_to_what_was_seen_or_is_in_the_session(containment: Containment) -> None:
    victim = run_until_up(containment, SLEEP_UP, "victim")
    marks = " ".join(f"{name}={value}" for name, value in containment.marks(victim.container).items())
    running = run_until_up(containment, apart("echo up; exec sleep 1000", f"env {marks}"))
    leader_first = run_until_up(containment, ["sh", "-c", f"env {marks} sleep 1000 & echo up"], "leader-first")
    leader_first.wait_for_leader()
    for one in (running, leader_first):
        kill(containment, one.container)
        assert one.oracle.is_gone(PATIENCE_S)
        end(containment, one)
    os.kill(victim.process.pid, signal.SIGKILL)
    victim.wait_for_leader()
    eventually_sync(lambda: containment.is_empty(victim.container))
    end(containment, victim)


def test_the_leader_exits_first_and_the_rest_is_found(containment: Containment) -> None:
    running = run(containment, LEAVES_CHILD)
    running.wait_for_leader()
    assert containment.has_exited(running.container)
    assert not containment.is_empty(running.container)
    kill(containment, running.container)
    assert running.oracle.is_gone(PATIENCE_S)
    pidfd = running.container.pidfd
    ended = containment.take_exit(running.container)
    os.close(pidfd)
    assert ended is not None
    assert ended.exit_code == 3
    end(containment, running)


def test_a_job_that_left_nothing_is_empty_at_once(containment: Containment) -> None:
    running = run(containment, ["true"])
    running.wait_for_leader()
    # Linux 6.19 unlinks a task from its cgroup only after it told of its exit.
    assert eventually_sync(lambda: containment.kill(running.container))
    end(containment, running)


def test_policy_wait_the_end_of_the_tree_is_told(containment: Containment) -> None:
    """After the leader was reaped; without polling where the kernel tells."""
    running = run(containment, ["sh", "-c", "setsid sleep 0.4 & sleep 0.2 & exit 0"])
    running.wait_for_leader()
    os.close(running.container.pidfd)
    assert containment.take_exit(running.container) is not None
    assert containment.watch(running.container)
    assert not containment.is_empty(running.container)

    def told() -> bool:
        select.select([containment.events_fd], [], [], 0.05)
        changed = [*containment.take_events(), *containment.reap_orphans()]
        return running.container in changed and containment.is_empty(running.container)

    eventually_sync(told)
    assert running.oracle.is_gone()
    end(containment, running)


def test_a_polite_signal_reaches_the_group(containment: Containment) -> None:
    running = run_until_up(containment, ["sh", "-c", "trap 'exit 5' TERM; echo up; while :; do sleep 999 & wait; done"])
    containment.signal(running.container, signal.SIGTERM)
    running.wait_for_leader()
    kill(containment, running.container)
    pidfd = running.container.pidfd
    ended = containment.take_exit(running.container)
    os.close(pidfd)
    assert ended is not None
    assert ended.exit_code == 5
    end(containment, running)


def test_a_signal_reaches_what_is_left_without_the_leader(containment: Containment) -> None:
    running = run(containment, ["sh", "-c", "setsid sleep 999 & exit 0"])
    running.wait_for_leader()
    os.close(running.container.pidfd)
    assert containment.take_exit(running.container) is not None
    eventually_sync(lambda: containment._members(running.container))
    containment.signal(running.container, signal.SIGTERM)
    assert running.oracle.is_gone(PATIENCE_S)
    end(containment, running)


def test_freeze_stops_the_whole_tree_and_thaw_lets_it_go_on(containment: Containment, tmp_path: Path) -> None:
    counts = tmp_path / "counts"
    count = f"while :; do echo >> {counts}; sleep 0.01; done"
    running = run_until_up(containment, ["sh", "-c", f"setsid sh -c 'echo up; {count}' & {count}"])
    if not containment.freeze(running.container):
        eventually_sync(lambda: containment.take_events() and containment.is_frozen(running.container))

    def stands() -> bool:  # soon: SIGSTOP may be under way
        before = counts.stat().st_size
        return stays(lambda: counts.stat().st_size == before, 0.1)

    eventually_sync(stands)
    frozen_at = counts.stat().st_size
    containment.thaw(running.container)
    eventually_sync(lambda: counts.stat().st_size > frozen_at + 2)
    containment.freeze(running.container)
    kill(containment, running.container)  # frozen ones too
    assert running.oracle.is_gone(PATIENCE_S)
    end(containment, running)


def test_usage_is_the_whole_trees(containment: Containment) -> None:
    burn = "import time\nwhile time.process_time() < 0.2: pass"
    running = run(containment, ["sh", "-c", 'setsid "$@" & wait; exit 0', "sh", *python(burn)])
    running.wait_for_leader()
    usage = containment.usage(running.container)
    if containment.level == SUBREAPER:
        assert usage == (None, None, None)
    else:
        assert usage.cpu_ns is not None
        assert usage.cpu_ns > 150_000_000
    end(containment, running)


def test_a_fork_bomb_under_a_pids_limit(containment: Containment) -> None:
    missing = containment.unenforceable().get("pids_max")
    if missing:
        pytest.skip(f"pids_max: {missing} (the bounded fork tree is tested instead)")
    bomb = ["sh", "-c", "echo up; f() { f | f & f; }; f"]
    for _ in range(REPEATS):
        running = run(containment, bomb, limits={"pids_max": 200})
        eventually_sync(lambda of=running.container: len(containment.survivors(of)) > 50)  # type: ignore[misc]
        kill(containment, running.container)
        assert running.oracle.is_gone(PATIENCE_S)
        end(containment, running)


def test_a_limit_that_cannot_be_enforced_is_named_and_nothing_is_left(containment: Containment) -> None:
    missing = containment.unenforceable()
    values = {"memory_max_bytes": 2**26, "swap_max_bytes": 0, "cpu_max_cores": 0.5, "cpu_weight": 50, "pids_max": 9}
    values["io_weight"] = 50
    values["memory_high_bytes"] = 64 * 2**20
    for field in (limit.name for limit in OF_TREE):
        limits = {field: values[field]}
        if field not in missing:
            containment.check(limits)
            containment.remove(containment.create("job", limits))
            continue
        for attempt in (containment.check, lambda limits: containment.create("job", limits)):
            with pytest.raises(ContainmentError, match=f"^{field}: cannot be enforced: ") as caught:
                attempt(limits)
            assert caught.value.limit == field
            assert caught.value.code == "precondition"
    assert not containment._containers
    assert not containment.strangers()


def test_a_spawn_that_failed_leaves_nothing(containment: Containment) -> None:
    fds = len(open_fds(os.getpid()))
    container = containment.create("job")
    assert (container.cgroup_fd >= 0) == (containment.level == CGROUP)
    assert containment.remove(container)
    assert len(open_fds(os.getpid())) == fds
    assert not containment.strangers()


def test_no_fd_is_kept_for_a_running_job(containment: Containment) -> None:
    fds = len(open_fds(os.getpid()))
    running = run(containment, SLEEP)
    assert len(open_fds(os.getpid())) == fds + 2  # its pidfd and the oracle, which are ours
    kill(containment, running.container)
    end(containment, running)
    assert len(open_fds(os.getpid())) == fds


def test_survivors_are_named_with_what_they_wait_in(containment: Containment) -> None:
    running = run_until_up(containment, SLEEP_UP)
    (survivor,) = eventually_sync(
        lambda: [s for s in containment.survivors(running.container) if s.state == "S" and s.wchan]
    )
    assert survivor.pid == running.process.pid
    kill(containment, running.container)
    end(containment, running)


def test_the_exit_status_of_a_leader_is_never_stolen(containment: Containment) -> None:
    """Not while it is known, and not while its spawner has yet to tell of it."""
    starting = containment.create("starting")
    popen = subprocess.Popen(["sh", "-c", "exit 9"], start_new_session=True)
    popen.returncode = 0
    pidfd = os.pidfd_open(popen.pid)
    started = process(popen.pid)
    assert started is not None
    assert select.select([pidfd], [], [], PATIENCE_S)[0]
    for _ in range(3):
        containment.reap_orphans()
    containment.started(starting, popen.pid, pidfd, started.start_ticks)
    containment.reap_orphans()
    ended = containment.take_exit(starting)
    assert ended is not None
    assert ended.exit_code == 9
    os.close(pidfd)
    containment.remove(starting)


def test_orphans_are_reaped(containment: Containment) -> None:
    running = run(containment, ["sh", "-c", "(sleep 0.05 & sleep 0.05 &); exec sleep 1000"])

    def zombies() -> int:
        states = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        return sum(one is not None and one.state == "Z" for one in map(process, map(int, states)))

    eventually_sync(lambda: zombies() == 2)
    containment.reap_orphans()
    assert zombies() == 0
    kill(containment, running.container)
    end(containment, running)


def test_a_group_that_an_earlier_job_of_the_id_left_is_not_joined(containment: Containment) -> None:
    if containment.level != CGROUP:
        pytest.skip("level subreaper: there is no group to be left")
    base = Path(containment.base_path)
    (base / "job-job" / "nested" / "deeper").mkdir(parents=True)
    running = run(containment, SLEEP)
    assert not (base / "job-job" / "nested").exists()
    kill(containment, running.container)
    pidfd = running.container.pidfd
    # Its group is still populated when the next one of the id comes.
    with subprocess.Popen(["sh", "-c", f"echo 0 > {base}/job-job/cgroup.procs; echo up; exec sleep 999"]) as late:
        eventually_sync(lambda: not containment.is_empty(running.container))
        assert not containment.remove(running.container)
        again = containment.create("job")
        assert again.name == "job-job~1"
        late.wait()
    assert late.returncode == -signal.SIGKILL
    os.close(pidfd)
    os.waitpid(running.process.pid, 0)
    assert containment.remove(again)
    assert containment.tidy() == 0


def test_groups_that_the_job_made_are_killed_and_removed_too(containment: Containment) -> None:
    if containment.level != CGROUP:
        pytest.skip("level subreaper: a job's groups are its own affair")
    script = 'g="$0/mine/deeper"; mkdir -p "$g"; (echo 0 > "$g/cgroup.procs"; exec sleep 999) & echo up; exec sleep 999'
    running = run_until_up(containment, ["sh", "-c", script, f"{containment.base_path}/job-job"])
    kill(containment, running.container)
    assert running.oracle.is_gone(PATIENCE_S)
    end(containment, running)
