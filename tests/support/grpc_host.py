"""The gRPC server alone, in a process of its own, over a service that only plays: `with GrpcHost() as host`.

As a program: `python -m tests.support.grpc_host '{"max_streams": 8}'`.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.workers import PATIENCE_S, ROOT
from worker_svc.config import Address, TransportConfig
from worker_svc.pb import jobscheduler as pb
from worker_svc.server import GrpcServer


class PlayService(pb.WorkerBase):
    """StartJob echoes, QueryJob takes a while, StreamJob sends and then, with `follow`, waits for ever."""

    is_draining = False

    async def start_job(self, message: pb.StartJobReq) -> pb.StartJobRes:
        return pb.StartJobRes(job_id=message.command)

    async def stop_job(self, message: pb.StopJobReq) -> pb.StopJobRes:
        return pb.StopJobRes()

    async def query_job(self, message: pb.QueryJobReq) -> pb.QueryJobRes:
        await asyncio.sleep(float(message.job_id or 0))
        return pb.QueryJobRes(done=True)

    async def wait_job(self, message: pb.WaitJobReq) -> pb.WaitJobRes:
        await asyncio.Event().wait()
        raise AssertionError

    async def delete_job(self, message: pb.DeleteJobReq) -> pb.DeleteJobRes:
        raise RuntimeError("a fault of ours")

    async def stream_job(self, message: pb.StreamJobReq) -> AsyncIterator[pb.OutputChunk]:
        for number in range(message.tail_lines or 0):
            yield pb.OutputChunk(offset=number, data=b"x" * 16384)
        if message.follow:
            await asyncio.Event().wait()

    async def drain(self, grace_s: float) -> None:
        await asyncio.sleep(grace_s)


async def _serve(limits: TransportConfig, address: Address) -> None:
    server = GrpcServer(PlayService(), limits)
    address = await server.listen(address, None)
    gc.freeze()  # as the worker does
    print(address, flush=True)
    loop = asyncio.get_running_loop()
    while command := await loop.run_in_executor(None, sys.stdin.readline):
        name, _, argument = command.strip().partition(" ")
        if name == "leave":
            await server.leave(float(argument))
            print(server.connections, flush=True)
            return
        if name == "connections":
            print(server.connections, flush=True)
        if name == "garbage":
            gc.disable()
            print(gc.collect(), flush=True)
        if name == "sending":
            print(server._shared.sending.taken_bytes, flush=True)
        if name == "claimed":
            print(server._shared.receiving.claimed_bytes, flush=True)
    server.close()
    await server.wait_closed()


class GrpcHost:
    def __init__(self, *, python: str = sys.executable, address: str = "127.0.0.1:0", **limits: Any) -> None:
        self._command = [python, "-m", "tests.support.grpc_host", json.dumps(limits), address]
        self.address = ""
        self.warns = ""
        """A part of what it is expected to warn of; empty: of nothing."""
        self.errors = ""
        """What it said on standard error: warnings and tracebacks; known once it has ended."""

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            self._command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        assert self.address, self.process.communicate()[1]
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _, self.errors = self.process.communicate(timeout=PATIENCE_S)  # the end of its input is the end of it
        if exc_type is None:
            assert (self.warns in self.errors) if self.warns else not self.errors, self.errors

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def ask(self, command: str) -> str:
        self.tell(command)
        return self.answer()

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss_bytes(self, peak: bool = False) -> int:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM" if peak else "VmRSS"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no such process")


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(_serve(TransportConfig(**json.loads(sys.argv[1])), Address.parse(sys.argv[2])))


if __name__ == "__main__":
    main()
