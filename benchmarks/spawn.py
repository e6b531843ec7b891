"""Starts per second of the spawners, beside a C posix_spawn loop, subprocess and asyncio, in one interleaved run.

Each starts /bin/true with its output in a fresh file (on tmpfs), waits for it and removes the file, one at a time; each
in a process of its own, so that none changes another's. Rounds alternate, and ratios are taken within a round.
    scripts/bench spawn [ROUNDS [STARTS_PER_ROUND]]
"""

# What is measured should cost no more than it must:
# ruff: noqa: PTH102, PTH106, PTH108

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from worker_svc.job import Identity, OutputVia
from worker_svc.supervisor.output_pump import OutputPump
from worker_svc.supervisor.spawn import IMPLEMENTATION, NATIVE, PYTHON, LaunchPlan, spawn

YARDSTICK: Final = "C posix_spawn"
LIMITS: Final = {
    "rlimits": {"core": (0, 0), "nofile": (1024, 4096), "fsize": (1 << 30, 1 << 30), "nproc": (4096, 4096)}
}
TRUE: Final = "/bin/true"


def start_by_spawner(folder: str, implementation: str, **fields: Any) -> Callable[[int], None]:
    env = dict(os.environ)

    def start(number: int) -> None:
        path = f"{folder}/{implementation}-{number}"
        plan = LaunchPlan([TRUE], env, "/", b"", path, "", **fields)
        spawned = spawn(plan, implementation)
        pipes = [pump.add(None, *pair, 0, False) for pair in spawned.outputs]
        os.waitpid(spawned.pid, 0)
        for pipe in pipes:
            pump.finish(pipe)
        os.close(spawned.pidfd)
        os.unlink(path)

    pump = OutputPump(implementation, lambda job: None, lambda job, text, is_lost: None)
    return start


def own_cgroup_each(folder: str, cgroup: str) -> Callable[[int], None]:
    def start(number: int) -> None:
        own = f"{cgroup}/{number}"
        os.mkdir(own)
        fd = os.open(own, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        start_by_spawner(folder, NATIVE, limits=LIMITS, cgroup_fd=fd)(number)
        os.close(fd)
        os.rmdir(own)

    return start


def start_by_popen(folder: str) -> Callable[[int], None]:
    def start(number: int) -> None:
        path = f"{folder}/popen-{number}"
        with open(path, "ab") as file:
            assert subprocess.call([TRUE], stdin=subprocess.DEVNULL, stdout=file, stderr=file) == 0
        os.unlink(path)

    return start


def asyncio_turn(folder: str, count: int) -> None:
    async def turn() -> None:
        for number in range(count):
            path = f"{folder}/asyncio-{number}"
            with open(path, "ab") as file:  # noqa: ASYNC230
                process = await asyncio.create_subprocess_exec(TRUE, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
            assert await process.wait() == 0
            os.unlink(path)

    asyncio.run(turn())


def contender(name: str, folder: str, cgroup: str) -> Callable[[int], None]:
    """What starts as many as it is told."""
    if name == "asyncio":
        return lambda count: asyncio_turn(folder, count)
    in_cgroup = {"cgroup_fd": os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)} if cgroup else {}
    makers: dict[str, Callable[[], Callable[[int], None]]] = {
        "native": lambda: start_by_spawner(folder, NATIVE, identity=Identity(no_new_privs=False)),
        "native, cgroup+rlimits+nnp": lambda: start_by_spawner(folder, NATIVE, limits=LIMITS, **in_cgroup),
        "native, a cgroup made for each": lambda: own_cgroup_each(folder, cgroup),
        "native, output by a pipe": lambda: start_by_spawner(
            folder, NATIVE, identity=Identity(no_new_privs=False), output_via=OutputVia.PIPE
        ),
        "Python": lambda: start_by_spawner(folder, PYTHON),
        "Python, cgroup+rlimits+nnp": lambda: start_by_spawner(folder, PYTHON, limits=LIMITS, **in_cgroup),
        "subprocess.Popen": lambda: start_by_popen(folder),
    }
    start = makers[name]()

    def turn(count: int) -> None:
        for number in range(count):
            start(number)

    return turn


def cpu_seconds_used() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def work(name: str, folder: str, cgroup: str) -> None:
    turn = contender(name, folder, cgroup)
    for line in sys.stdin:
        begun, used = time.perf_counter(), cpu_seconds_used()
        turn(int(line))
        print(time.perf_counter() - begun, cpu_seconds_used() - used, flush=True)


def compile_yardstick(folder: Path) -> list[str]:
    compiler = shutil.which("cc")
    if compiler is None:
        sys.exit("a C compiler is needed for the yardstick: apt-get install gcc libc6-dev")
    program = folder / "c-loop"
    subprocess.run([compiler, "-O2", "-o", program, Path(__file__).with_suffix(".c")], check=True)
    return [str(program), str(folder)]


def make_cgroup() -> str:
    for line in Path("/proc/mounts").read_text(errors="surrogateescape").splitlines():
        _, where, kind, *_ = line.split(" ")
        if kind == "cgroup2" and os.access(where, os.W_OK):
            path = Path(where) / f"spawn-bench-{os.getpid()}"  # not worker-svc-*: supervisors clear those away
            path.mkdir()
            return str(path)
    print("(no cgroup v2 hierarchy can be written to: without a cgroup)")
    return ""


def main(rounds: int = 40, count: int = 50) -> None:
    folder = Path(tempfile.mkdtemp(prefix="worker-svc-bench-", dir="/dev/shm"))
    cgroup = make_cgroup()
    names = ["Python", "Python, cgroup+rlimits+nnp", "subprocess.Popen", "asyncio"]
    if IMPLEMENTATION == NATIVE:
        names[:0] = ["native", "native, output by a pipe", "native, cgroup+rlimits+nnp"]
        names[3:3] = ["native, a cgroup made for each"] if cgroup else []
    else:
        print("(the native spawner is not built)")
    commands = {YARDSTICK: compile_yardstick(folder)}
    commands |= {name: [sys.executable, __file__, "--work", name, str(folder), cgroup] for name in names}
    workers = {
        name: subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        for name, command in commands.items()
    }
    rates: dict[str, list[float]] = {name: [] for name in commands}
    cpu_us: dict[str, list[float]] = {name: [] for name in commands}
    try:
        for turn in range(rounds + 1):
            for name, worker in workers.items():
                assert worker.stdin
                assert worker.stdout
                # the slow ones fewer; the first turn warms up
                number = 10 if not turn else count if "Python, " not in name else max(count // 10, 5)
                worker.stdin.write(f"{number}\n")
                seconds, cpu_seconds = map(float, worker.stdout.readline().split())
                if turn:
                    rates[name].append(number / seconds)
                    cpu_us[name].append(cpu_seconds / number * 1e6)
    finally:
        for worker in workers.values():
            worker.communicate()
        shutil.rmtree(folder)
        if cgroup:
            os.rmdir(cgroup)
    print(f"{rounds} interleaved rounds of {count} starts; medians, and the ratio to C within each round\n")
    print(f"{'':32}{'starts/s':>10}{'of C':>8}   {'quartiles':>11}{'CPU µs/start':>14}")
    for name, values in rates.items():
        ratios = [value / yard for value, yard in zip(values, rates[YARDSTICK], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{name:32}{statistics.median(values):>10.0f}{middle:>8.2f}   {low:>6.2f}–{high:.2f}", end="")
        print(f"{statistics.fmean(cpu_us[name]):>14.0f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:5])
    else:
        main(*map(int, sys.argv[1:]))
