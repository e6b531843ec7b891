"""Kills worker and supervisor again and again under load, and judges what came of the jobs.

    python -m tests.system.crash_harness [--seed S] [--minutes N | --rounds N] [--jobs N] [--report FILE]

Each round is a state directory of its own with jobs of known outcome; what is random comes from its seed, which is
printed. Where it may, it runs in a pid namespace with few numbers, so that those of dead processes are soon others'.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any, Final

from tests.support.crash.bystanders import Bystanders
from tests.support.crash.chaos import Chaos
from tests.support.crash.driver import Driver, shut_down
from tests.support.crash.jobs import make_jobs
from tests.support.crash.judge import Verdict, fd_problems, judge
from tests.support.crash.reaper import Reaper
from tests.support.waiting import eventually
from tests.support.workers import ROOT, Worker

_AT_ONCE: Final = 48
_SLOTS: Final = 20
_ROUND_TIMEOUT_S: Final = 300.0
# Linux 6.14 counts the numbers of each pid namespace apart.
_PID_MAX: Final = 2500
_CHURN_PACE_S: Final = 0.03
# What an idle one has open at most, by kind.
_SUPERVISOR_FDS: Final = {
    "/dev/null": 11, "supervisor.log": 1, "supervisor.lock": 1, "state": 1, "jobs.sqlite3": 1, "jobs.sqlite3-wal": 1,
    "jobs.sqlite3-shm": 1, "socket": 4, "eventpoll": 3, "eventfd": 3, "pipe": 2, "inotify": 1, "cgroup": 1,
}  # fmt: skip
_WORKER_FDS: Final = {
    "/dev/null": 1, "worker.out": 2, "worker.log": 1, "worker.lock": 1, "worker.cursor": 1, "jobs.sqlite3": 2,
    "jobs.sqlite3-wal": 2, "jobs.sqlite3-shm": 2, "socket": 6, "eventpoll": 1, "eventfd": 1, "inotify": 1,
}  # fmt: skip


class Round:
    def __init__(self, seed: int, jobs: int, reaper: Reaper, folder: Path, *, churn: bool) -> None:
        rng = random.Random(seed)
        self.seed = seed
        self.level = rng.choice(("cgroup", "subreaper"))
        self.spawner = rng.choice(("native", "native", "python"))
        reaper.delay_s = rng.choice((0.0, 0.0, 0.3))
        self._reaper = reaper
        self._reaper.spared.clear()
        self._folder = folder
        self._churn = churn
        self._marks = folder / "marks"
        self._address = f"unix:{folder}/w.sock"
        self.worker = Worker(
            folder,
            GRPC_SERVER_ADDR=self._address,
            JOBS_SLOTS=str(_SLOTS),
            SUPERVISOR_CONTAINMENT=self.level,
            SUPERVISOR_SPAWNER=self.spawner,
            STATE_MIN_FREE_BYTES="0",
        )
        self.worker.environment = {"PYTHONFAULTHANDLER": "1"}
        self.jobs = list(make_jobs(rng, jobs, self._marks))
        self.chaos = Chaos(self.worker, self._address, random.Random(rng.random()), reaper.spare)
        self._driver = Driver(self._address, random.Random(rng.random()))

    def __str__(self) -> str:
        reaping = "a slow init" if self._reaper.delay_s else "a quick init"
        return f"seed {self.seed} ({self.level}, spawner {self.spawner}, {reaping})"

    def run(self) -> Verdict:
        bystanders = Bystanders(self._folder, self._reaper, _CHURN_PACE_S if self._churn else 0.0)
        problems: list[str] = []
        try:
            problems = asyncio.run(self._run())
        finally:
            problems += bystanders.end()
        verdict = judge(self.jobs, self.worker, self._driver.told, self._driver.stop_asked_ns, self._marks)
        verdict.other.extend([*problems, *self._driver.problems, *self._worker_problems()])
        return verdict

    async def _run(self) -> list[str]:
        async with asyncio.timeout(_ROUND_TIMEOUT_S):
            keeper = asyncio.create_task(self.chaos.keep_running())
            rage = asyncio.create_task(self.chaos.rage())
            driving = asyncio.create_task(self._driver.run(self.jobs, _AT_ONCE))
            try:
                await asyncio.wait({keeper, rage, driving}, return_when=asyncio.FIRST_COMPLETED)
                for task in (keeper, rage, driving):
                    if task.done():
                        task.result()
                rage.cancel()
                await asyncio.gather(rage, return_exceptions=True)
                await self.chaos.calm()
                problems = await self._fd_problems()
                self.chaos.is_over()
                return problems + await shut_down(self.worker, self._address, spare=self._reaper.spare)
            finally:
                self.chaos.is_over()
                for task in (keeper, rage, driving):
                    task.cancel()
                await asyncio.gather(keeper, rage, driving, return_exceptions=True)

    async def _fd_problems(self) -> list[str]:
        """Once all is quiet again."""
        found: list[str] = []

        def is_clean() -> bool:
            found[:] = [
                *fd_problems("supervisor", self.worker.supervisor_pid(), _SUPERVISOR_FDS),
                *fd_problems("worker", self.worker.pid, _WORKER_FDS),
            ]
            return not found

        try:
            await eventually(is_clean, 10.0)
        except AssertionError:
            return found
        return []

    def _worker_problems(self) -> list[str]:
        """A worker ends only because it was killed, or asked to leave."""
        ends = Counter(process.poll() for process in self.chaos.workers)
        if set(ends) <= {0, -9} and ends[0] <= 1:
            return []
        printed = (self._folder / "worker.out").read_text()[-3000:]
        return [f"the workers ended with {dict(ends)}: {printed}"]


class Totals:
    def __init__(self) -> None:
        self.began_s = time.monotonic()
        self.rounds = self.jobs = self.kills = self.lost = self.wrong = self.twice = self.missing = self.other = 0
        self.deeds: Counter[str] = Counter()

    def add(self, done: Round, verdict: Verdict) -> None:
        self.rounds += 1
        self.jobs += len(done.jobs)
        self.kills += done.chaos.kills
        self.lost += verdict.lost
        self.wrong += len(verdict.wrong)
        self.twice += len(verdict.twice)
        self.missing += len(verdict.missing)
        self.other += len(verdict.other)
        self.deeds += done.chaos.deeds + Counter(f"at {point}" for point in done.chaos.points_reached())

    def __str__(self) -> str:
        minutes = (time.monotonic() - self.began_s) / 60
        return (
            f"{minutes:.1f} min, {self.rounds} rounds: {self.kills} kills survived, {self.jobs} jobs run, "
            f"{self.lost} LOST, wrong outcomes {self.wrong}, run twice {self.twice}, missing {self.missing}, "
            f"other problems {self.other}"
        )

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "deeds": dict(self.deeds), "minutes": (time.monotonic() - self.began_s) / 60}

    @property
    def is_good(self) -> bool:
        return not (self.wrong or self.twice or self.missing or self.other)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="crash_harness", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    parser.add_argument("--minutes", type=float, default=0.0, help="rounds until so long is over")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=600, help="in a round")
    parser.add_argument("--report", type=Path, help="where to write the figures, as JSON")
    parser.add_argument("--keep", type=Path, help="a folder for the state of rounds that went wrong")
    parser.add_argument("--in-namespace", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not options.in_namespace and _may_unshare():
        command = [
            sys.executable,
            "-m",
            "tests.system.crash_harness",
            "--in-namespace",
            *argv,
            "--seed",
            str(options.seed),
        ]
        return subprocess.call(["unshare", "--pid", "--mount-proc", "--fork", "--kill-child", *command], cwd=ROOT)
    if options.in_namespace:
        Path("/proc/sys/kernel/pid_max").write_text(str(_PID_MAX))
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it tells of each write to a worker that was killed
    reaper = Reaper()
    totals = Totals()
    seeds = random.Random(options.seed)
    print(f"seed {options.seed}", flush=True)
    while True:
        _one_round(seeds.getrandbits(32), options, reaper, totals)
        print(f"  so far {totals}", flush=True)
        if options.report:
            options.report.write_text(json.dumps(totals.to_json()))
        if totals.rounds >= options.rounds if not options.minutes else _minutes(totals) >= options.minutes:
            break
    print(totals)
    print("deeds:", ", ".join(f"{name} {count}" for name, count in sorted(totals.deeds.items())))
    return 0 if totals.is_good else 1


def _minutes(totals: Totals) -> float:
    return (time.monotonic() - totals.began_s) / 60


def _one_round(seed: int, options: argparse.Namespace, reaper: Reaper, totals: Totals) -> None:
    folder = Path(tempfile.mkdtemp(prefix="crash-"))
    is_good = False
    began_s = time.monotonic()
    this = Round(seed, options.jobs, reaper, folder, churn=options.in_namespace)
    try:
        try:
            verdict = this.run()
        except (Exception, asyncio.CancelledError):
            verdict = Verdict([], [], [], [traceback.format_exc()], 0)
        totals.add(this, verdict)
        for problem in verdict.problems:
            print(f"  PROBLEM {problem}", flush=True)
        is_good = not verdict.problems
        print(
            f"round {totals.rounds}: {this}: {len(this.jobs)} jobs, {this.chaos.kills} kills, {verdict.lost} LOST, "
            f"{len(verdict.problems)} problems, {time.monotonic() - began_s:.0f} s",
            flush=True,
        )
    finally:
        this.worker.__exit__(None, None, None)
        if not is_good and options.keep:
            shutil.copytree(folder, options.keep / folder.name, ignore=shutil.ignore_patterns("*.sock"))
        shutil.rmtree(folder, ignore_errors=True)


def _may_unshare() -> bool:
    """Root, and a kernel where pid_max of a namespace is its own."""
    version = tuple(int(word) for word in os.uname().release.split("-")[0].split(".")[:2])
    return os.geteuid() == 0 and version >= (6, 14) and shutil.which("unshare") is not None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
