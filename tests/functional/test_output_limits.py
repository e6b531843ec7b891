"""Caps on output, while jobs write."""

from __future__ import annotations

import asyncio
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support import programs
from tests.support.capped import MIB, capped, writes
from tests.support.filesystems import mounted
from tests.support.output_files import pattern
from tests.support.waiting import eventually_sync
from tests.support.workers import PATIENCE_S, SupervisorProcess, Worker
from worker_svc.client import WorkerClient
from worker_svc.job import (
    InvalidArgument,
    JobState,
    Outcome,
    OutputPolicy,
    OutputVia,
)
from worker_svc.pb.jobscheduler import OutputChunk, OutputStream
from worker_svc.pb.jobscheduler import OutputPolicy as Policy
from worker_svc.record.paths import output_path, stderr_path

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("holes")]

# At full speed: blocks of a MiB of a line that is always the same.
FLOOD: Final = """
import os, sys
block = b"0123456789abcde\\n" * 65536
for _ in range(int(sys.argv[1]) >> 20): os.write(1, block)
"""

ENDLESS: Final = "import os\nblock = b'0123456789abcde\\n' * 4096\nwhile True: os.write(1, block)"

ENDLESS_DEAF: Final = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + ENDLESS


def size_of(path: str) -> int:
    return Path(path).stat().st_size


def stored(path: str) -> int:
    return Path(path).stat().st_blocks * 512


def _may_hurry() -> bool:
    """Whether a supervisor run by us may give its guard a priority."""
    code = "import os; os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


# What a cap may be exceeded by on disk, as promised; without a priority it depends on who else wants the CPUs.
SLACK: Final = (16 if _may_hurry() else 256) * MIB


class Sampler:
    """The most that a file took on disk, looked at without pause until `until`."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.peak = 0

    def look(self) -> None:
        with suppress(FileNotFoundError):
            self.peak = max(self.peak, stored(self._path))

    def until(self, condition: Callable[[], object], timeout_s: float = PATIENCE_S) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            self.look()
            assert time.monotonic() < deadline_s, "it does not come to pass"
            time.sleep(0.0005)


async def collect(client: WorkerClient, job_id: str, **options: Any) -> list[OutputChunk]:
    async with asyncio.timeout(60):
        return [chunk async for chunk in client.output(job_id, **options)]


# drop_head


def test_the_newest_bytes_are_kept(tmp_path: Path, state: Path) -> None:
    """Offsets stay, the gap is told exactly, and what is left is what the job wrote there."""
    total, cap = 40 * MIB + 12345, 8 * MIB

    async def check(worker: Worker) -> None:
        async with worker.client() as client:
            argv = writes(total)
            job_id = (await client.start(argv[0], args=argv[1:], output_max_bytes=cap)).job_id
            job = await client.wait(job_id, PATIENCE_S)
            assert (job.outcome, job.output_size_bytes) == (Outcome.SUCCEEDED, total)
            path = output_path(str(worker.path), job_id)
            eventually_sync(lambda: stored(path) <= cap + 8192, PATIENCE_S, "the head is not dropped at the end")
            for follow in (False, True):
                first, *rest = await collect(client, job_id, follow=follow)
                assert first.offset == 0
                assert first.gap_bytes % 4096 == 0
                assert total - cap - 4096 <= first.gap_bytes <= total - cap
                at = first.gap_bytes
                for chunk in rest:
                    assert (chunk.offset, chunk.gap_bytes) == (at, 0)
                    assert chunk.data == pattern(at, len(chunk.data))
                    at += len(chunk.data)
                assert at == total
            # Before, at and behind the edge.
            edge = (await collect(client, job_id))[0].gap_bytes
            for offset, gap in ((0, edge), (edge - 1, 1), (edge - 4096, 4096), (edge, 0), (edge + 1, 0)):
                head = (await collect(client, job_id, offset=offset))[0]
                assert (head.offset, head.gap_bytes) == (offset, gap)
            lines = await collect(client, job_id, tail_lines=3)
            assert b"".join(chunk.data for chunk in lines) == pattern(total - 64, 64)[-(total % 16) - 32 :]

    with Worker(tmp_path) as worker:
        asyncio.run(check(worker))


def test_a_follower_of_a_job_under_its_cap(tmp_path: Path, state: Path) -> None:
    """It is slower than the job: what it misses is told, what it gets is right, and it ends where the job did."""
    total, cap = 60 * MIB, MIB

    async def check(worker: Worker) -> None:
        async with worker.client() as client:
            argv = writes(total)
            job_id = (await client.start(argv[0], args=argv[1:], output_max_bytes=cap)).job_id
            at = 0
            async for chunk in client.output(job_id, follow=True):
                assert chunk.offset == at
                if chunk.data:
                    assert chunk.data == pattern(at, len(chunk.data)), f"at {at}"
                at += len(chunk.data) or chunk.gap_bytes
            assert at == total
            assert (await client.wait(job_id, PATIENCE_S)).output_size_bytes == total

    with Worker(tmp_path) as worker:
        asyncio.run(check(worker))


@pytest.mark.parametrize("cap", [MIB, 64 * MIB])
def test_disk_use_at_full_speed(supervisor: SupervisorProcess, state: Path, cap: int, via: OutputVia) -> None:
    total = 2048 * MIB
    path = output_path(str(state), "j")
    supervisor.run("j", programs.python(FLOOD, str(total)), **capped(cap, via=via))
    sampler = Sampler(path)
    sampler.until(lambda: supervisor.record("j").state is JobState.FINISHED, 100)
    record = supervisor.record("j")
    assert (record.outcome, record.output_size_bytes) == (Outcome.SUCCEEDED, total)
    assert cap < sampler.peak <= cap + SLACK, f"{(sampler.peak - cap) / MIB:.1f} MiB more than the cap"
    with open(path, "rb") as file:
        file.seek(total - cap)
        assert file.read() == b"0123456789abcde\n" * (cap // 16)


def test_separate_standard_error_has_a_cap_of_its_own(tmp_path: Path, state: Path) -> None:
    cap = 2 * MIB

    async def check(worker: Worker) -> None:
        async with worker.client() as client:
            out, err = writes(12 * MIB, 1), writes(20 * MIB, 2)
            script = f"{shlex.join(out)} & {shlex.join(err)}; wait"
            started = await client.start("sh", args=["-c", script], separate_stderr=True, output_max_bytes=cap)
            job_id = started.job_id
            await client.wait(job_id, PATIENCE_S)
            for stream, total in ((OutputStream.STDOUT, 12 * MIB), (OutputStream.STDERR, 20 * MIB)):
                which = output_path if stream == OutputStream.STDOUT else stderr_path
                file = which(str(worker.path), job_id)
                eventually_sync(lambda file=file: stored(file) <= cap + 8192, PATIENCE_S)  # type: ignore[misc]
                first, *rest = await collect(client, job_id, stream=stream)
                assert first.gap_bytes == total - cap
                assert b"".join(chunk.data for chunk in rest) == pattern(total - cap, cap)

    with Worker(tmp_path) as worker:
        asyncio.run(check(worker))


def test_while_no_worker_runs_and_by_the_supervisor_that_adopted_it(state: Path, via: OutputVia) -> None:
    cap = 4 * MIB
    path = output_path(str(state), "j")
    with SupervisorProcess(state) as supervisor:
        supervisor.run("j", programs.python(ENDLESS), **capped(cap, via=via))
        supervisor.hang_up()
        sampler = Sampler(path)
        size = 10 * cap
        sampler.until(lambda: size_of(path) > size)
        supervisor.kill()
        # Nobody holds it now: that is what a dead supervisor means; the job is made to wait, so that the disk is not
        # filled if a new one takes its time.
        pid = supervisor.record("j").pid
        os.kill(pid, 19)
        supervisor.start()
        eventually_sync(lambda: stored(path) <= cap + SLACK, PATIENCE_S, "the new supervisor does not hold it")
        os.kill(pid, 18)
        size = size_of(path) + 100 * MIB
        sampler.peak = 0
        sampler.until(lambda: size_of(path) > size)
        assert sampler.peak <= cap + SLACK
        supervisor.client.ask("stop", job_id="j", grace_s=0.0)
        record = supervisor.wait_finished("j")
        assert record.outcome in (Outcome.STOPPED, Outcome.LOST)


def test_an_operator_who_removes_or_truncates_it_does_not_lift_the_cap(state: Path) -> None:
    cap = 4 * MIB
    with SupervisorProcess(state) as supervisor:
        for job_id, meddle in (("removed", os.unlink), ("truncated", lambda path: os.truncate(path, 0))):
            path = output_path(str(state), job_id)
            supervisor.run(job_id, programs.python(ENDLESS), **capped(cap))
            eventually_sync(lambda path=path: size_of(path) > 100 * MIB, PATIENCE_S)  # type: ignore[misc]
            meddle(path)
            opened = f"/proc/{supervisor.record(job_id).pid}/fd/1"
            sampler = Sampler(opened)
            size = size_of(opened) + 100 * MIB
            sampler.until(lambda opened=opened, size=size: size_of(opened) > size)  # type: ignore[misc]
            assert sampler.peak <= cap + SLACK
            supervisor.client.ask("stop", job_id=job_id, grace_s=0.0)
            assert supervisor.wait_finished(job_id).outcome is Outcome.STOPPED


def test_a_file_in_the_place_of_the_output_is_not_touched(state: Path) -> None:
    """The job's own is held to its cap where it was moved to."""
    cap = MIB
    path = output_path(str(state), "j")
    with SupervisorProcess(state) as supervisor:
        supervisor.run("j", programs.python(ENDLESS), **capped(cap))
        eventually_sync(lambda: size_of(path) > 10 * cap, PATIENCE_S)
        aside = f"{state}/aside"
        other = os.urandom(8 * MIB)
        Path(f"{state}/other").write_bytes(other)
        Path(path).rename(aside)
        Path(f"{state}/other").rename(path)
        sampler = Sampler(aside)
        size = size_of(aside) + 50 * MIB
        sampler.until(lambda: size_of(aside) > size)
        assert sampler.peak <= cap + SLACK
        supervisor.client.ask("stop", job_id="j", grace_s=0.0)
        supervisor.wait_finished("j")
        assert Path(path).read_bytes() == other
        assert stored(path) >= len(other)


# The other policies


def test_stop(supervisor: SupervisorProcess, state: Path, via: OutputVia) -> None:
    cap = 2 * MIB
    path = output_path(str(state), "j")
    supervisor.run("j", programs.python(ENDLESS), **capped(cap, OutputPolicy.STOP, via))
    record = supervisor.wait_finished("j")
    assert (record.outcome, record.output_size_bytes) == (Outcome.OUTPUT_LIMIT, size_of(path))
    assert str(cap) in record.reason
    assert cap < size_of(path)
    reasons = [event.reason for event in supervisor.events() if event.to_state is JobState.STOPPING]
    assert reasons == ["output limit"]


def test_one_that_does_not_stop_cannot_fill_the_disk(
    supervisor: SupervisorProcess, state: Path, via: OutputVia
) -> None:
    """It is given its time, and writes on: the newest bytes are kept."""
    cap = 2 * MIB
    path = output_path(str(state), "j")
    supervisor.run("j", programs.python(ENDLESS_DEAF), stop_grace_s=1.0, **capped(cap, OutputPolicy.STOP, via))
    sampler = Sampler(path)
    sampler.until(lambda: supervisor.record("j").state is JobState.FINISHED)
    assert supervisor.record("j").outcome is Outcome.OUTPUT_LIMIT
    assert size_of(path) > 4 * SLACK
    assert sampler.peak <= cap + SLACK


def test_none(supervisor: SupervisorProcess, state: Path, via: OutputVia) -> None:
    total = 10 * MIB
    for policy, cap in ((OutputPolicy.NONE, MIB), (OutputPolicy.DROP_HEAD, 0)):
        job_id = policy.name
        record = supervisor.finish(job_id, writes(total), **capped(cap, policy, via))
        assert (record.outcome, record.output_size_bytes) == (Outcome.SUCCEEDED, total)
        assert supervisor.output(job_id) == pattern(0, total)


def test_no_more_than_the_cap_is_left_alone(supervisor: SupervisorProcess, state: Path, via: OutputVia) -> None:
    for policy in (OutputPolicy.DROP_HEAD, OutputPolicy.STOP):
        record = supervisor.finish(policy.name, writes(4 * MIB), **capped(4 * MIB, policy, via))
        assert record.outcome is Outcome.SUCCEEDED
        assert supervisor.output(policy.name) == pattern(0, 4 * MIB)


def test_what_a_request_may_ask_for(tmp_path: Path) -> None:
    async def check(worker: Worker) -> None:
        async with worker.client() as client:
            for asked in (10 * MIB + 1, 2**64 - 1, 0):
                with pytest.raises(InvalidArgument, match=r"output_max_bytes: must be from 1 to 10485760"):
                    await client.start("true", output_max_bytes=asked)
            with pytest.raises(InvalidArgument, match="output_policy"):
                await client.start("true", output_policy=Policy.NONE)
            allowed = await client.start("true", output_max_bytes=10 * MIB)
            assert (await client.job(allowed.job_id)).spec.output_max_bytes == 10 * MIB
            default = await client.start("true")
            spec = (await client.job(default.job_id)).spec
            assert (spec.output_max_bytes, spec.output_policy) == (MIB, Policy.STOP)

    limits: dict[str, Any] = {
        "OUTPUT_MAX_BYTES": str(MIB),
        "OUTPUT_MAX_BYTES_LIMIT": str(10 * MIB),
        "OUTPUT_POLICY": "stop",
    }
    with Worker(tmp_path, **limits) as worker:
        asyncio.run(check(worker))


def test_a_file_system_that_cannot_give_back(tmp_path: Path) -> None:
    """The worker says so when it starts, and to clients; drop_head is stop there."""

    async def check(worker: Worker) -> None:
        async with worker.client() as client:
            assert not (await client.worker()).can_drop_head
            argv = programs.python(ENDLESS)
            job_id = (await client.start(argv[0], args=argv[1:], output_max_bytes=MIB)).job_id
            assert (await client.wait(job_id, PATIENCE_S)).outcome == Outcome.OUTPUT_LIMIT
            await client.delete(job_id)
            allowed = (await client.start("head", args=["-c", str(MIB), "/dev/zero"], output_max_bytes=MIB)).job_id
            assert (await client.wait(allowed, PATIENCE_S)).outcome == Outcome.SUCCEEDED

    with (
        mounted(tmp_path / "ramfs", "ramfs", "mode=700") as folder,
        Worker(tmp_path, state_dir=folder / "state") as worker,
    ):
        warning = worker.wait_log("output.cannot_drop_head")
        assert warning["level"] == "warning"
        assert str(folder) in warning["folder"]
        asyncio.run(check(worker))


def test_a_file_system_that_can_is_not_warned_of(tmp_path: Path, state: Path) -> None:
    async def check(worker: Worker) -> None:
        async with worker.client() as client:
            assert (await client.worker()).can_drop_head

    with Worker(tmp_path) as worker:
        asyncio.run(check(worker))
        assert worker.log_events("output.cannot_drop_head") == []
