"""Kills, stops and trips the worker and the supervisor at random moments, and starts the worker again as systemd would.

All that is random comes from one seeded generator; when it hits is a matter of the machine.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from tests.support.programs import children_of
from tests.support.workers import Worker
from worker_svc import JobError, WorkerClient
from worker_svc.linux import failpoints
from worker_svc.supervisor.life.adoption import open_pidfd
from worker_svc.supervisor.spawn import start_ticks_of

# Point → at which pass at the latest.
SUPERVISOR_POINTS: Final = {
    "before-commit": 60,
    "after-commit": 60,
    "before-spawn": 12,
    "after-spawn": 12,
    "after-reap": 12,
    "in-recovery": 1,
}
WORKER_POINTS: Final = {
    "line-announced": 30,
    "line-written": 30,
    "batch-logged": 20,
    "request-sent": 40,
    "answer-received": 60,
    "supervisor-started": 1,
}
_HEALTHY_WITHIN_S: Final = 45.0
_PAUSE_MAX_S: Final = 0.5


class Chaos:
    def __init__(
        self,
        worker: Worker,
        address: str,
        rng: random.Random,
        spare: Callable[[int], None] = lambda pid: None,
    ) -> None:
        """`spare` is told of each worker that is started: the reaper must leave it alone."""
        self._worker = worker
        self._address = address
        self._spare = spare
        self._rng = rng
        self._is_over = False
        self.deeds: Counter[str] = Counter()
        self.stopped_s = 0.0
        self.workers: list[subprocess.Popen[bytes]] = []

    @property
    def kills(self) -> int:
        """Processes killed, by us or at a crash point."""
        return self.deeds["worker"] + self.deeds["supervisor"] + len(self.points_reached())

    def points_reached(self) -> list[str]:
        path = self._worker.path / failpoints.REACHED_NAME
        return [line.split()[1] for line in path.read_text().splitlines()] if path.exists() else []

    async def keep_running(self) -> None:
        """A service manager: a worker that ended is started again."""
        while not self._is_over:
            if self._worker.process is None or self._worker.process.poll() is not None:
                self.workers.append(self._worker.spawn())
                self._spare(self.workers[-1].pid)
            await asyncio.sleep(0.02)

    async def rage(self) -> None:
        """Until cancelled."""
        actions = {
            self.kill_worker: 14,
            self.kill_supervisor: 46,
            self.kill_both: 12,
            self._stop_worker: 4,
            self._stop_supervisor: 4,
            self._trip_supervisor: 14,
            self._trip_worker: 12,
        }
        await self.wait_healthy()
        while True:
            await asyncio.sleep(self._rng.uniform(0, _PAUSE_MAX_S) * self._rng.random())
            await self._rng.choices(list(actions), list(actions.values()))[0]()
            if self._rng.random() < 0.25:
                await self.wait_healthy()

    async def calm(self) -> None:
        """Nothing more is done; both run."""
        for name in (failpoints.FILE_NAME, failpoints.WORKER_FILE_NAME):
            with suppress(FileNotFoundError):
                (self._worker.path / name).unlink()
        await self.wait_healthy()

    def is_over(self) -> None:
        """From now on a worker that ends is not started again."""
        self._is_over = True

    async def wait_healthy(self) -> None:
        deadline_s = time.monotonic() + _HEALTHY_WITHIN_S
        while True:
            async with WorkerClient(self._address) as client:
                try:
                    async with asyncio.timeout(2):
                        await client.worker(deadline_s=2)
                        return
                except (JobError, TimeoutError) as error:
                    if time.monotonic() >= deadline_s:
                        raise AssertionError("the worker does not come back") from error
            await asyncio.sleep(0.02)

    # Deeds

    async def kill_worker(self) -> None:
        process = self._worker.process
        if process is not None and process.poll() is None:
            process.kill()
            self.deeds["worker"] += 1

    async def kill_supervisor(self) -> None:
        if self.signal_supervisor(signal.SIGKILL):
            self.deeds["supervisor"] += 1

    async def kill_both(self) -> None:
        first, second = self._rng.sample([self.kill_worker, self.kill_supervisor], 2)
        await first()
        await second()

    async def _stop_worker(self) -> None:
        process = self._worker.process
        if process is None or process.poll() is not None:
            return
        self.deeds["worker stopped"] += 1
        await self._stop_for_a_while(process)

    async def _stop_for_a_while(self, process: subprocess.Popen[bytes]) -> None:
        process.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(self._rng.uniform(0.05, 1.5))
            if self._rng.random() < 0.3:
                await self.kill_worker()
        finally:
            process.send_signal(signal.SIGCONT)

    async def _stop_supervisor(self) -> None:
        if not self.signal_supervisor(signal.SIGSTOP):
            return
        self.deeds["supervisor stopped"] += 1
        try:
            await asyncio.sleep(self._rng.uniform(0.05, 1.5))
            if self._rng.random() < 0.3:
                await self.kill_supervisor()
        finally:
            self.signal_supervisor(signal.SIGCONT)

    async def _trip_supervisor(self) -> None:
        point = self._rng.choice(list(SUPERVISOR_POINTS))
        self.arm(failpoints.FILE_NAME, {point: self._rng.randint(1, SUPERVISOR_POINTS[point])})
        await self.kill_supervisor()

    async def _trip_worker(self) -> None:
        point = self._rng.choice(list(WORKER_POINTS))
        self.arm(failpoints.WORKER_FILE_NAME, {point: self._rng.randint(1, WORKER_POINTS[point])})
        await self.kill_worker()
        if point == "supervisor-started":
            await self.kill_supervisor()

    def arm(self, name: str, points: dict[str, int]) -> None:
        aside = self._worker.path / f"{name}.new"
        aside.write_text(json.dumps(points))
        aside.rename(self._worker.path / name)

    def signal_supervisor(self, number: signal.Signals) -> bool:
        """The one that has the lock, or one that is just starting. False: there was none to be had."""
        worker = self._worker.process
        candidates = [*(children_of(worker.pid) if worker else ()), self._worker.supervisor_pid()]
        for pid in candidates:
            ticks = start_ticks_of(pid) if pid else None
            pidfd = open_pidfd(pid, ticks) if ticks is not None else None
            if pidfd is None:
                continue
            try:
                if _is_supervisor(pid, self._worker.path):
                    signal.pidfd_send_signal(pidfd, number)
                    return True
            except ProcessLookupError:
                continue
            finally:
                os.close(pidfd)
        return False


def _is_supervisor(pid: int, state_dir: Path) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"worker_svc.supervisor" in words and str(state_dir).encode() in words
