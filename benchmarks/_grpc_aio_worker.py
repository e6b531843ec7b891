"""The yardstick for calls: what one would write by hand, grpc.aio and asyncio's subprocesses, no record, no checks.

Prints its port. StartJob starts the command with its output in a fresh file, QueryJob looks into a dict.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

import grpc
from google.protobuf import descriptor_pool, message_factory

from worker_svc.pb.descriptors import FILES


def _messages() -> dict[str, Any]:
    pool = descriptor_pool.DescriptorPool()
    for file in FILES.values():
        pool.AddSerializedFile(file)
    names = ("StartJobReq", "StartJobRes", "QueryJobReq", "QueryJobRes")
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"jobscheduler.{name}")) for name in names}


class Worker:
    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._pb = _messages()
        self._done: dict[str, bool] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._number = 0

    async def start_job(self, request: Any, context: Any) -> Any:
        self._number += 1
        job_id = f"job-{self._number}"
        argv = [request.command, *([request.path] if request.path else []), *request.args]
        with open(f"{self._folder}/{job_id}", "wb") as output:  # noqa: ASYNC230
            process = await asyncio.create_subprocess_exec(
                *argv, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output
            )
        self._done[job_id] = False
        task = asyncio.create_task(self._wait(job_id, process))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return self._pb["StartJobRes"](jobID=job_id)

    async def _wait(self, job_id: str, process: asyncio.subprocess.Process) -> None:
        await process.wait()
        self._done[job_id] = True

    async def query_job(self, request: Any, context: Any) -> Any:
        return self._pb["QueryJobRes"](done=self._done.get(request.jobID, True))

    def handlers(self) -> grpc.GenericRpcHandler:
        rpcs = {"StartJob": self.start_job, "QueryJob": self.query_job}
        return grpc.method_handlers_generic_handler(
            "jobscheduler.Worker",
            {
                name: grpc.unary_unary_rpc_method_handler(
                    method,
                    request_deserializer=self._pb[f"{name}Req"].FromString,
                    response_serializer=self._pb[f"{name}Res"].SerializeToString,
                )
                for name, method in rpcs.items()
            },
        )


async def main(folder: str) -> None:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Worker(folder).handlers(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(0)


if __name__ == "__main__":
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    asyncio.run(main(sys.argv[1]))
