"""A worker that comes and goes under many followers."""

from __future__ import annotations

import asyncio
import hashlib
import json
import mmap
import os
import subprocess
import sys
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support import programs
from tests.support.streams import MIB, Following, Teller, collect, held, joined, start
from tests.support.waiting import eventually_sync
from tests.support.workers import PATIENCE_S, ROOT, Worker
from worker_svc.client import WorkerClient
from worker_svc.job import Outcome, Unavailable
from worker_svc.record.paths import output_path

pytestmark = pytest.mark.timeout(180)


# A worker that comes and goes


async def test_a_worker_that_leaves_sends_its_followers_on(tmp_path: Path) -> None:
    with Worker(tmp_path, GRPC_SERVER_ADDR=f"unix:{tmp_path}/w") as worker, Teller(tmp_path, "t") as teller:
        async with worker.client() as client:
            job_id = await start(client, teller.argv)
            teller.tell(b"one ")
            follower = Following(client, job_id)
            await follower.until(b"one ")
            assert await asyncio.to_thread(worker.terminate) == 0
            with pytest.raises(Unavailable):
                await follower.end()
            teller.tell(b"two ")
            await asyncio.to_thread(worker.start)
            resumed = Following(client, job_id, offset=4)
            await resumed.until(b"two ")
            await asyncio.to_thread(worker.kill)
            with pytest.raises(Unavailable):
                await resumed.end()
            teller.tell(b"three")
            teller.end()  # it ends while no worker is there
            await asyncio.to_thread(eventually_sync, lambda: not programs.is_alive(worker.record(job_id).pid))
            await asyncio.to_thread(worker.start)
            assert joined(await collect(client, job_id, offset=8, follow=True), 8) == b"three"


# So many, and a worker killed under them

# Writes all but the last argv[2] bytes of argv[1], then waits for the file argv[3]: blocks of 64 KiB that differ.
_WRITER: Final = """
import os, random, sys, time
total, last, go = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
block = random.Random(1).randbytes(65528)
for at in range(0, total, 65536):
    while at >= total - last and not os.path.exists(go): time.sleep(0.005)
    data = at.to_bytes(8, "little") + block
    while data: data = data[os.write(1, data):]
"""


def expected_digest(total: int) -> bytes:
    import random

    block = random.Random(1).randbytes(65528)
    digest = hashlib.sha256()
    for at in range(0, total, 65536):
        digest.update(at.to_bytes(8, "little"))
        digest.update(block)
    return digest.digest()


# Kinds of followers: "whole" reads all of it; "live" begins just before the end as it is; "slow" is as "whole", but
# after its first chunk reads nothing until the others of its process have ended; "leaver" goes after its first chunk.
def follower_process(given: dict[str, Any]) -> None:
    """The body of a client process: follows the job as told, over as many connections as that takes, and says how it
    went, one line for each follower."""
    with open(given["file"], "rb") as file:
        asyncio.run(_Followers(given, file.fileno()).run())


class _Followers:
    def __init__(self, given: dict[str, Any], fd: int) -> None:
        self._given = given
        self._fd = fd
        self._busy = sum(kind in ("whole", "live") for kind in given["kinds"])
        self._others_done = asyncio.Event()
        self._unready = len(given["kinds"])

    async def run(self) -> None:
        kinds: list[str] = self._given["kinds"]
        groups = [[kind] for kind in kinds if kind == "slow"]
        rest = [kind for kind in kinds if kind != "slow"]
        groups += [rest[at : at + 90] for at in range(0, len(rest), 90)]
        async with asyncio.TaskGroup() as tasks:
            for group in groups:
                tasks.create_task(self._over_one_connection(group))

    async def _over_one_connection(self, kinds: list[str]) -> None:
        async with WorkerClient(self._given["address"]) as client, asyncio.TaskGroup() as tasks:
            for kind in kinds:
                tasks.create_task(self._follow(client, kind))

    async def _follow(self, client: WorkerClient, kind: str) -> None:
        begin = at = self._given["live_from"] if kind == "live" else 0
        resumed = 0
        while True:
            try:
                async with aclosing(client.output(self._given["job"], offset=at, follow=True)) as chunks:
                    async for chunk in chunks:
                        assert chunk.offset == at, f"{chunk.offset} after {at}"
                        assert not chunk.gap_bytes
                        assert chunk.data == os.pread(self._fd, len(chunk.data), at), f"at {at}"
                        is_first = at == begin
                        at += len(chunk.data)
                        if is_first:
                            self._on_first()
                            if kind == "leaver":
                                break
                            if kind == "slow":
                                await self._others_done.wait()
                break
            except Unavailable:
                resumed += 1
                await asyncio.sleep(0.05)  # the worker is away
        if kind in ("whole", "live"):
            self._busy -= 1
            if not self._busy:
                self._others_done.set()
        print(json.dumps({"kind": kind, "begin": begin, "end": at, "resumed": resumed}), flush=True)

    def _on_first(self) -> None:
        self._unready -= 1
        if not self._unready:
            print(json.dumps("ready"), flush=True)


class _ClientProcess:
    def __init__(self, given: dict[str, Any]) -> None:
        code = (
            "import json, sys\n"
            f"from {__name__.removeprefix('main.')} import follower_process\n"
            "follower_process(json.loads(sys.argv[1]))"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(given)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> _ClientProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def wait_ready(self) -> list[dict[str, Any]]:
        """Every follower has had something. Returns the reports of those that left already."""
        assert self._process.stdout is not None
        reports: list[dict[str, Any]] = []
        while True:
            line = self._process.stdout.readline()
            assert line, f"a client process ended with {self._process.wait()}"
            if (said := json.loads(line)) == "ready":
                return reports
            reports.append(said)

    def wait_reports(self) -> list[dict[str, Any]]:
        with self._process:
            out, _ = self._process.communicate()
        assert self._process.returncode == 0
        return [json.loads(line) for line in out.splitlines()]


@pytest.mark.parametrize("followers, size_mib", [(40, 20), pytest.param(1000, 200, marks=pytest.mark.long)])
def test_many_followers_and_a_worker_killed_under_them(tmp_path: Path, followers: int, size_mib: int) -> None:
    """A thousand that read all of 200 MB would be 200 GB, so most of them follow its last part, live.

    WHOLE_FOLLOWERS=N has N of them read all.
    """
    whole = int(os.environ.get("WHOLE_FOLLOWERS", "4"))
    total, last, go = size_mib * MIB, MIB // 2, tmp_path / "go"
    with Worker(tmp_path, GRPC_SERVER_ADDR=f"unix:{tmp_path}/w", OUTPUT_MAX_BYTES="0") as worker:
        argv = programs.python(_WRITER, str(total), str(last), str(go))
        asyncio.run(_start(worker, argv))
        path = Path(output_path(str(worker.path), "written"))
        eventually_sync(lambda: path.stat().st_size == total - last, 60, "the job does not write")
        common = {"address": worker.address, "job": "written", "file": str(path), "live_from": total - last - 65536}
        kinds = ["whole"] * whole + ["slow"] * 2 + ["leaver"] * (followers // 20)
        kinds += ["live"] * (followers - len(kinds))
        with (
            _ClientProcess({**common, "kinds": kinds[::2]}) as one,
            _ClientProcess({**common, "kinds": kinds[1::2]}) as two,
        ):
            reports = one.wait_ready() + two.wait_ready()
            worker.kill()
            go.touch()  # the job writes on with no worker there
            worker.start()
            reports += one.wait_reports() + two.wait_reports()
        record = worker.wait_finished("written")
        assert (record.outcome, record.output_size_bytes) == (Outcome.SUCCEEDED, total)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            assert hashlib.sha256(content).digest() == expected_digest(total)
        assert len(reports) == followers
        for report in reports:
            if report["kind"] == "leaver":
                assert report["end"] > 0
            else:
                assert report["end"] == total, report
        # They were under way when it was killed.
        assert sum(report["resumed"] > 0 for report in reports) >= followers * 0.9
        eventually_sync(lambda: held(worker, str(path)) == (0, 0), PATIENCE_S, "something is still held")


async def _start(worker: Worker, argv: list[str]) -> None:
    async with worker.client() as client:
        await start(client, argv, job_id="written")
