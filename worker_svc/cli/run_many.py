"""`worker-svc run-many`: jobs from lines of JSON, run to their end over one stream."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import stat
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import IO, TYPE_CHECKING, Any, Final

from worker_svc.cli.command import AGENT_FAILED_STATUS, Failure, add_address_option, count, make_parser, with_worker
from worker_svc.cli.console import say, warn
from worker_svc.printable import printable

if TYPE_CHECKING:
    from worker_svc.client import RunResult, WorkerClient
    from worker_svc.pb.jobscheduler import StartJobReq

# A spec may have 3 MiB, and standard input besides.
_LINE_MAX_BYTES: Final = 8 * 1024 * 1024
_SHOWN_EVERY_S: Final = 0.1

_EPILOG: Final = (
    'A line is a StartJobReq as JSON (the standard mapping of protobuf): {"command": "sleep", "args": ["1"], '
    '"job_id": "a", "timeout": "60s"}. With a job_id of its own, a job that ran already is not run again; its result '
    "is told. The exit status is 0 if all jobs succeeded, 1 if any did not, 125 if the worker or a line failed."
)


def main(prog: str, argv: Sequence[str]) -> int:
    parser = make_parser(prog, "Run many jobs; say which of them failed, and how many did not.", epilog=_EPILOG)
    add_address_option(parser)
    parser.add_argument("--in-flight", metavar="N", type=count, default=256, help="so many at a time (default: 256)")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each result, as it comes")
    parser.add_argument("file", metavar="FILE", help="a job a line; -: standard input")
    arguments = parser.parse_args(argv)
    with _opened(arguments.file) as (lines, total):
        return with_worker(
            arguments, lambda client: _run(client, arguments, lines, total), failed_status=AGENT_FAILED_STATUS
        )


@contextmanager
def _opened(name: str) -> Iterator[tuple[IO[bytes], int]]:
    """And how many lines there are; 0: that is not known."""
    try:
        file: IO[bytes] = open(0, "rb", closefd=False) if name == "-" else open(name, "rb")  # noqa: SIM115
        with file:
            total = 0
            if _is_regular(file):
                place = file.tell()
                total = sum(1 for line in file if line.strip())
                file.seek(place)
            yield file, total
    except OSError as error:
        if isinstance(error, BrokenPipeError) or error.filename != name:
            raise
        raise Failure(f"{name}: {error.strerror}", AGENT_FAILED_STATUS) from error


def _is_regular(file: IO[bytes]) -> bool:
    return stat.S_ISREG(os.fstat(file.fileno()).st_mode)


async def _run(client: WorkerClient, arguments: argparse.Namespace, lines: IO[bytes], total: int) -> int:
    progress = _Progress(total)
    async with aclosing(client.run_many(_specs(lines, progress), in_flight=arguments.in_flight)) as results:
        try:
            async for result in results:
                progress.add(result)
                if arguments.json:
                    progress.clear()
                    print(json.dumps(_as_json(result)), flush=True)
                elif not result.succeeded:
                    progress.clear()
                    say(f"{result.job_id} {_why(result)}")
                progress.show()
        finally:
            progress.clear()
            warn(progress.summary())
    return 1 if progress.failed else 0


async def _specs(lines: IO[bytes], progress: _Progress) -> AsyncIterator[StartJobReq]:
    """Raises Failure."""
    from google.protobuf.json_format import ParseDict, ParseError

    from worker_svc.job import InvalidArgument
    from worker_svc.pb.jobscheduler import StartJobReq
    from worker_svc.wire.codec.shapes import shape_of
    from worker_svc.wire.pool import message_class

    number, shape, make = 0, shape_of(StartJobReq), message_class("StartJobReq")
    async for line in _read(lines):
        number += 1
        if not line.strip():
            continue
        try:
            spec = shape.fill(ParseDict(json.loads(line), make()))
        except (ValueError, ParseError, InvalidArgument) as error:
            # Those before it have their results first.
            raise Failure(f"line {number}: {error}", AGENT_FAILED_STATUS) from error
        progress.taken += 1
        yield spec


async def _read(lines: IO[bytes]) -> AsyncIterator[bytes]:
    mode = os.fstat(lines.fileno()).st_mode
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        for number, line in enumerate(lines):
            yield line
            if number % 64 == 0:
                await asyncio.sleep(0)
        return
    reader = asyncio.StreamReader(_LINE_MAX_BYTES)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(os.dup(lines.fileno()), "rb")
    )
    try:
        async for line in reader:
            yield line
    finally:
        os.set_blocking(lines.fileno(), True)  # others may read on there
        transport.close()


def _why(result: RunResult) -> str:
    if result.job is None:
        return f"was not run: {getattr(result.error, 'message', result.error)}"
    return f"{result.job.outcome.name}: {result.job.error_text}"


def _as_json(result: RunResult) -> dict[str, Any]:
    job = result.job
    if job is None:
        return {"job_id": result.job_id, "succeeded": False, "error": getattr(result.error, "message", None)}
    return {
        "job_id": result.job_id,
        "succeeded": result.succeeded,
        "outcome": job.outcome.name,
        "exit_code": job.exit_code,
        "signal": job.signal,
        "error": job.error_text,
        "wall_time_s": job.wall_time and job.wall_time.total_seconds(),
        "output_file": job.output_file,
    }


class _Progress:
    """The live line, on a terminal, and the summary."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._began_s = time.monotonic()
        self._shown_s = 0.0
        self._is_shown = False
        self._is_live = sys.stderr.isatty()
        self.taken = self.done = self.failed = 0

    def add(self, result: RunResult) -> None:
        self.done += 1
        self.failed += not result.succeeded

    def _rate(self) -> float:
        return self.done / max(time.monotonic() - self._began_s, 0.001)

    def show(self) -> None:
        now_s = time.monotonic()
        if not self._is_live or now_s - self._shown_s < _SHOWN_EVERY_S:
            return
        self._shown_s, self._is_shown = now_s, True
        eta = f", {(self._total - self.done) / self._rate():.0f} s to go" if self._total else ""
        text = f"{self.done} done, {self.taken - self.done} under way, {self.failed} failed, {self._rate():.0f}/s{eta}"
        print(f"\r\033[K{printable(text)}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._is_shown:
            self._is_shown = False
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def summary(self) -> str:
        took_s = time.monotonic() - self._began_s
        return (
            f"{self.done} jobs: {self.done - self.failed} succeeded, {self.failed} failed,"
            f" in {took_s:.1f} s ({self._rate():.0f}/s)"
        )
