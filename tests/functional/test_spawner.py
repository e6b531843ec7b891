"""The spawner's threads: a start that hangs delays no other, and can be given up."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.support import stalled_fs
from tests.support.spawning import Launchpad
from tests.support.waiting import eventually_sync, stays
from worker_svc.supervisor.spawn import (
    NATIVE,
    LaunchPlan,
    Spawned,
    Spawner,
    SpawnFailed,
    spawner,
)


class Results:
    """What a spawner reports; each job is awaited at once."""

    def __init__(self) -> None:
        self.of: dict[object, Spawned | SpawnFailed] = {}

    def __call__(self, token: object, result: Spawned | SpawnFailed) -> None:
        if isinstance(result, Spawned):
            os.close(result.pidfd)
            os.waitpid(result.pid, 0)
        self.of[token] = result


def test_reports_each_result_with_its_token(pad: Launchpad) -> None:
    results = Results()
    spawner = Spawner(results, pad.implementation)
    for number in range(20):
        spawner.submit(number, pad.plan("true" if number % 2 else "/no/such"))
    eventually_sync(lambda: len(results.of) == 20)
    for number in range(20):
        assert isinstance(results.of[number], Spawned if number % 2 else SpawnFailed)


def test_a_fault_of_ours_ends_one_job_only(pad: Launchpad) -> None:
    results = Results()
    spawner = Spawner(results, pad.implementation)
    nothing: Any = None
    broken = pad.plan("true")._replace(env=nothing)
    for number in range(5):
        spawner.submit(number, broken)
    spawner.submit("good", pad.plan("true"))
    eventually_sync(lambda: len(results.of) == 6)
    assert isinstance(results.of["good"], Spawned)
    assert "the supervisor could not start it: " in str(results.of[0])


def test_threads_come_when_all_hang(monkeypatch: pytest.MonkeyPatch, pad: Launchpad) -> None:
    """The hanging itself is faked here; below it is real."""
    go_on = threading.Event()

    def hang(plan: LaunchPlan, *_: object) -> Spawned:
        if plan.argv[0] == "hangs":
            go_on.wait()
        raise SpawnFailed("as asked")

    monkeypatch.setattr(spawner, "spawn", hang)
    results = Results()
    pool = Spawner(results, pad.implementation, threads_max=8)
    for number in range(7):
        pool.submit(number, pad.plan("hangs"))
    pool.submit("free", pad.plan("returns"))
    eventually_sync(lambda: "free" in results.of)
    assert pool.threads >= 7
    for number in range(7, 20):  # beyond the bound they wait
        pool.submit(number, pad.plan("hangs"))
    pool.submit("late", pad.plan("returns"))
    eventually_sync(lambda: pool.threads == 8)
    assert stays(lambda: pool.threads == 8 and set(results.of) == {"free"})
    go_on.set()
    eventually_sync(lambda: len(results.of) == 22)
    assert pool.threads == 8


def test_what_more_threads_start_is_none_of_the_main_threads_children(
    monkeypatch: pytest.MonkeyPatch, pad: Launchpad
) -> None:
    """It would become so when such a thread ended, and the list that every exit of a job reads would grow."""
    if pad.implementation != NATIVE:
        pytest.skip("the pure-Python spawner starts each process in a thread that ends")
    go_on, start = threading.Event(), spawner.spawn

    def hang(*arguments: Any) -> Spawned:
        go_on.wait()
        return start(*arguments)

    monkeypatch.setattr(spawner, "spawn", hang)
    found: list[Spawned | SpawnFailed] = []
    pool = Spawner(lambda token, result: found.append(result), pad.implementation, threads_max=8)
    for number in range(20):
        pool.submit(number, pad.plan("sleep", "60"))
    eventually_sync(lambda: pool.threads == 8)
    go_on.set()
    eventually_sync(lambda: len(found) == 20)
    started = {one.pid for one in found if isinstance(one, Spawned)}
    assert len(started) == 20
    main = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert not started & set(map(int, main))
    for pid in started:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    for one in found:
        assert isinstance(one, Spawned)
        os.close(one.pidfd)


class Stalled(NamedTuple):
    program: str
    end: Callable[[], None]


@pytest.fixture
def stalled(tmp_path: Path) -> Iterator[Stalled]:
    with ExitStack() as stack:
        mount_point = stack.enter_context(stalled_fs.mounted_or_skip(tmp_path))
        yield Stalled(str(mount_point / "program"), stack.close)


LIMITS: dict[str, Any] = {"limits": {"umask": 0o22}}


@pytest.mark.parametrize("more", [{}, LIMITS], ids=["plain", "limits"])
def test_a_program_on_a_stalled_file_system_delays_no_other(
    pad: Launchpad, stalled: Stalled, more: dict[str, Any]
) -> None:
    results = Results()
    pool = Spawner(results, pad.implementation)
    hanging = 5
    for number in range(hanging):
        pool.submit(number, pad.plan(stalled.program, **more))
    for number in range(100, 150):  # how much later than without them: scripts/bench stalled
        pool.submit(number, pad.plan("true"))
        eventually_sync(lambda number=number: number in results.of)  # type: ignore[misc]
    assert not set(range(hanging)) & set(results.of)
    assert pool.threads >= hanging + 1
    # Given up: the process that never got to its program dies, and the start fails.
    for number in range(hanging):
        eventually_sync(lambda number=number: pool.kill(number))  # type: ignore[misc]
    eventually_sync(lambda: set(range(hanging)) <= set(results.of))
    if pad.implementation == NATIVE or not more:
        expected = "command: the process was ended before it could run its program (signal SIGKILL)"
        assert {str(results.of[number]) for number in range(hanging)} == {expected}
    assert not pool.kill("never submitted")


def test_what_hung_goes_on_when_the_file_system_does(pad: Launchpad, stalled: Stalled) -> None:
    results = Results()
    pool = Spawner(results, pad.implementation)
    pool.submit("hangs", pad.plan(stalled.program))
    eventually_sync(Path(f"{Path(stalled.program).parent}.asked").exists)
    assert not results.of
    stalled.end()
    eventually_sync(lambda: "hangs" in results.of)
    assert isinstance(results.of["hangs"], SpawnFailed)
