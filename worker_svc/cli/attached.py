"""A job bound to a terminal, for `run`."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from typing import IO, TYPE_CHECKING

from worker_svc.cli.command import AGENT_FAILED_STATUS, CANCELLED_STATUS, Failure, program
from worker_svc.cli.console import CannotWrite, complain
from worker_svc.cli.job_options import start
from worker_svc.cli.output import gap_text, write
from worker_svc.job import JobError, Unavailable

if TYPE_CHECKING:
    from worker_svc.client import WorkerClient
    from worker_svc.pb.jobscheduler import Job


class Attached:
    """One job bound to this terminal: its output, and the signals that end it."""

    def __init__(self, client: WorkerClient) -> None:
        self._client = client
        self._job_id = ""
        self._presses = 0
        self._output_failed: OSError | None = None
        self._stops: set[asyncio.Task[None]] = set()

    async def run(self, arguments: argparse.Namespace) -> tuple[Job, bool]:
        """The finished job, and whether it was asked to stop from here. Raises Failure, and JobError."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._asked_to_end)
        started = await start(self._client, arguments)
        self._job_id = started.job_id
        if self._presses:
            self._stop()
        try:
            await self._show_output(separate_stderr=arguments.separate_stderr)
            job = await self._client.wait(self._job_id)
        except Unavailable as error:
            later = f"the job may well run on; when the worker is back: {program()} logs -f {self._job_id}"
            raise Failure(str(error), AGENT_FAILED_STATUS, hint=f"  {later}") from error
        if self._output_failed is not None:
            await asyncio.gather(*self._stops)
            raise self._output_failed
        return job, self._presses > 0

    async def _show_output(self, *, separate_stderr: bool) -> None:
        from worker_svc.pb.jobscheduler import OutputStream

        if separate_stderr:
            await asyncio.gather(
                self._copy(OutputStream.STDOUT, sys.stdout.buffer),
                self._copy(OutputStream.STDERR, sys.stderr.buffer),
            )
        else:
            await self._copy(OutputStream.UNSPECIFIED, sys.stdout.buffer)

    async def _copy(self, stream: int, target: IO[bytes]) -> None:
        async for chunk in self._client.output(self._job_id, stream=stream, follow=True):
            if chunk.gap_bytes:
                complain("run", gap_text(chunk))
            elif self._output_failed is None:
                try:
                    # In a thread: Ctrl-C must work while a pager holds the output up.
                    await asyncio.to_thread(write, target, chunk.data)
                except (BrokenPipeError, CannotWrite) as error:
                    # A program of this terminal would end by SIGPIPE now, or complain and end.
                    self._output_failed = error
                    self._stop()

    def _asked_to_end(self) -> None:
        self._presses += 1
        if self._presses > 2:
            # The job was killed or its worker is out of reach; a write that nobody takes may hold a thread
            # up.
            os._exit(CANCELLED_STATUS)
        if self._job_id:
            self._stop()

    def _stop(self) -> None:
        task = asyncio.get_running_loop().create_task(self._ask_to_stop(kill=self._presses > 1))
        self._stops.add(task)
        task.add_done_callback(self._stops.discard)

    async def _ask_to_stop(self, *, kill: bool) -> None:
        try:
            if kill:
                await self._client.stop(self._job_id, signal="SIGKILL", grace_s=0)
                return
            await self._client.stop(self._job_id)
            if self._presses:
                complain("run", "asked the job to stop; Ctrl-C again kills it")
        except JobError as error:
            complain("run", f"cannot stop the job: {error.message}")
