"""The processes of the demo: the scheduler (inside this one), the worker, and its supervisor."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, STDOUT, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, Self

from grpclib.server import Server

import worker_svc
from worker_svc.cli.command import Failure
from worker_svc.pb.jobscheduler import DeregisterReq, DeregisterRes, RegisterReq, RegisterRes, SchedulerBase

_LAST_RESORT_S: Final = 5.0


class DemoScheduler(SchedulerBase):
    """As much of a scheduler as a worker needs: it gives out an id, and remembers who is there."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.worker_address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.deregistered = False

    @classmethod
    @asynccontextmanager
    async def serving(cls) -> AsyncIterator[Self]:
        listener = socket.create_server(("127.0.0.1", 0))
        host, port = listener.getsockname()
        scheduler = cls(f"{host}:{port}")
        server = Server([scheduler])
        await server.start(sock=listener)
        try:
            yield scheduler
        finally:
            server.close()
            await server.wait_closed()

    async def register_worker(self, register_req: RegisterReq) -> RegisterRes:
        if not self.worker_address.done():
            self.worker_address.set_result(register_req.address)
        return RegisterRes(success=True, worker_id="demo-worker")

    async def deregister_worker(self, deregister_req: DeregisterReq) -> DeregisterRes:
        self.deregistered = deregister_req.worker_id == "demo-worker"
        return DeregisterRes(success=self.deregistered)


class DemoWorker:
    """`worker-svc serve` as a process of its own."""

    def __init__(self, process: Process, state_dir: Path, scheduler: DemoScheduler) -> None:
        self._process = process
        self._state_dir = state_dir
        self._scheduler = scheduler
        self.pid = process.pid
        self.address = ""
        self.supervisor_pid = 0

    @classmethod
    @asynccontextmanager
    async def running(cls, directory: Path, log: Path, scheduler: DemoScheduler) -> AsyncIterator[Self]:
        """Neither the worker nor its supervisor outlives this, whatever happens inside."""
        state_dir = directory / "state"
        flags = {
            "--grpc-server-addr": "127.0.0.1:0",
            "--scheduler-addr": scheduler.address,
            "--state-dir": str(state_dir),
            "--supervisor-idle-exit-s": "0.2",
            "--log-format": "console",
        }
        with log.open("wb") as log_file:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "worker_svc", "serve"),
                *(word for flag in flags.items() for word in flag),
                cwd=directory,
                env=_environment(),
                stdin=DEVNULL,
                stdout=log_file,
                stderr=STDOUT,
                # Ctrl-C in the terminal is for the demo, which ends the worker in its own time.
                start_new_session=True,
            )
        worker = cls(process, state_dir, scheduler)
        try:
            yield worker
        finally:
            await asyncio.shield(worker._leave_nothing())

    async def registered(self, limit_s: float) -> None:
        """Waits until the worker registered, which tells its address."""
        ended = asyncio.create_task(self._process.wait())
        try:
            async with asyncio.timeout(limit_s):
                await asyncio.wait((ended, self._scheduler.worker_address), return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            raise Failure(f"the worker did not register within {limit_s:g} s") from None
        finally:
            ended.cancel()
        if not self._scheduler.worker_address.done():
            raise Failure(f"the worker ended with exit status {self._process.returncode} before it registered")
        self.address = self._scheduler.worker_address.result()

    async def end(self, limit_s: float) -> int | None:
        """Asks it to end; its exit status, negative for a signal, None if it does not end in time."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            async with asyncio.timeout(limit_s):
                return await self._process.wait()
        except TimeoutError:
            return None

    async def _leave_nothing(self) -> None:
        if self._process.returncode is None and await self.end(_LAST_RESORT_S) is None:
            self._process.kill()
            await self._process.wait()
        for pid in _supervisors(self._state_dir):
            if not await has_ended(pid, _LAST_RESORT_S):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _supervisors(state_dir: Path) -> list[int]:
    """The supervisors of a state directory, also those that the worker never told us of."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        # Processes come and go while one looks, and some are not ours to look at.
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if b"worker_svc.supervisor" in words and os.fsencode(state_dir) in words:
                found.append(int(process.name))
    return found


def _environment() -> dict[str, str]:
    """What this process has, without settings meant for another worker."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WORKER_SVC_")}
    # In a checkout that is not installed, the package is found only from where this process was started.
    package_home = str(Path(worker_svc.__file__).parent.parent)
    inherited = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = f"{package_home}{os.pathsep}{inherited}" if inherited else package_home
    return environment


async def has_ended(pid: int, limit_s: float) -> bool:
    """Whether the process, which need not be a child, is gone or goes within `limit_s`."""
    try:
        pidfd = os.pidfd_open(pid) if pid else None
    except ProcessLookupError:
        return True
    if pidfd is None:
        return True
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        async with asyncio.timeout(limit_s):
            await ended.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
    return True
