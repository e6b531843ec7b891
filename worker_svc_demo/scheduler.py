"""The two processes of the example: the scheduler, inside this one, and the worker."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import sys
from asyncio.subprocess import DEVNULL, STDOUT, Process
from collections.abc import AsyncIterator
from pathlib import Path

from grpclib.server import Server

import worker_svc
from worker_svc import DeregisterReq, DeregisterRes, RegisterReq, RegisterRes, SchedulerBase


class Scheduler(SchedulerBase):
    """Gives out an id to the worker that registers, and remembers where it is."""

    def __init__(self) -> None:
        self.address = ""
        self.worker_address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.deregistered = False

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        server = Server([self])
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.address = "{}:{}".format(*listener.getsockname())
            await server.start(sock=listener)
            try:
                yield
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


@contextlib.asynccontextmanager
async def worker_process(directory: Path, scheduler: Scheduler) -> AsyncIterator[Process]:
    """`worker-svc serve`, with `state` and `worker.log` in `directory`; it does not outlive this."""
    flags = {
        "--grpc-server-addr": "127.0.0.1:0",
        "--scheduler-addr": scheduler.address,
        "--state-dir": str(directory / "state"),
        "--supervisor-idle-exit-s": "0.2",
        "--log-format": "console",
    }
    # Settings meant for another worker stay away from this one. A checkout is found from wherever it runs.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WORKER_SVC_")}
    paths = (str(Path(worker_svc.__file__).parent.parent), environment.get("PYTHONPATH"))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    with (directory / "worker.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "worker_svc", "serve"),
            *(word for flag in flags.items() for word in flag),
            cwd=directory,
            env=environment,
            stdin=DEVNULL,
            stdout=log,
            stderr=STDOUT,
            start_new_session=True,  # Ctrl-C in the terminal is for the demo, which ends the worker in its own time
        )
    try:
        yield process
    finally:
        await asyncio.shield(_end(process, directory / "state"))


async def _end(process: Process, state_dir: Path) -> None:
    for end in (process.terminate, process.kill):
        if process.returncode is None:
            end()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), 5)
    await supervisor_is_gone(state_dir, 5)


async def supervisor_is_gone(state_dir: Path, limit_s: float) -> bool:
    """Whether the supervisor, no child of ours, ends within `limit_s`: it holds a lock for as long as it lives."""
    if not state_dir.exists():
        return True
    directory = os.open(state_dir, os.O_RDONLY)
    try:
        async with asyncio.timeout(limit_s):
            while True:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(directory, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    return True
                await asyncio.sleep(0.05)
    except TimeoutError:
        return False
    finally:
        os.close(directory)
