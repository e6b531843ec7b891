"""Output on a machine that refuses something."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import signal
import struct
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.followers import MIB, Follower, finished, running
from tests.support.output_files import append, collect, inotify_watches, joined, pattern
from tests.support.waiting import eventually
from worker_svc.job import Unavailable
from worker_svc.linux import syscalls
from worker_svc.output import OutputReader, Start, notify
from worker_svc.output.file import OutputFile

# When the machine refuses


@pytest.mark.parametrize("call", ["inotify_init", "inotify_add_watch"])
async def test_inotify_refuses(output_file: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(notify, call, refuse)
    said: list[str] = []
    reader = OutputReader(on_degraded=said.append)
    final = running()
    followers = [Follower(reader, output_file, final) for _ in range(2)]
    await eventually(lambda: said)
    output_file.write_bytes(b"a")
    for follower in followers:
        await follower.has(b"a")
    append(output_file, b"b")
    for follower in followers:
        await follower.has(b"ab")
    final.set_result(2)
    for follower in followers:
        await follower.done()
    assert said == [reader.degraded]
    assert "No space left" in said[0]
    reader.close()


async def test_directory_removed_while_waiting(output_folder: Path) -> None:
    reader = OutputReader()
    where = output_folder / "gone"
    where.mkdir()
    final = running()
    follower = Follower(reader, where / "job.out", final)
    await eventually(lambda: inotify_watches() == 1)
    where.rmdir()
    await eventually(lambda: reader.degraded)
    where.mkdir()
    (where / "job.out").write_bytes(b"x")
    await follower.has(b"x")
    final.set_result(1)
    await follower.done()
    reader.close()


async def test_queue_overflow_wakes_all(
    output_reader: OutputReader, output_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output_file.touch()
    final = running()
    follower = Follower(output_reader, output_file, final)
    await eventually(lambda: inotify_watches() == 1)
    overflow = struct.pack("iIII", -1, syscalls.IN_Q_OVERFLOW, 0, 0)
    real = os.read
    monkeypatch.setattr(os, "read", lambda fd, size: real(fd, size) and overflow)
    append(output_file, b"x")
    await follower.has(b"x")
    final.set_result(1)
    await follower.done()


async def test_read_error_is_told(
    output_reader: OutputReader, output_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    output_file.write_bytes(b"x")
    for call in (fail, lambda *_: None):
        monkeypatch.setattr(OutputFile, "read_now", call)
        monkeypatch.setattr(OutputFile, "read", fail)
        with pytest.raises(Unavailable, match=r"cannot read the output .*job\.out: Input/output error"):
            await collect(output_reader.stream(output_file, start=Start(), follow=False, final_size=finished(1)))


@pytest.mark.parametrize("cold", ["all", "some", "unsupported"])
async def test_read_in_threads(
    output_reader: OutputReader, output_file: Path, monkeypatch: pytest.MonkeyPatch, cold: str
) -> None:
    """Not in the page cache, in part or at all, or the file system has no RWF_NOWAIT."""
    content = pattern(0, 900_000)
    output_file.write_bytes(content)
    rng = random.Random(2)
    real = OutputFile.read_now

    def read_now(self: OutputFile, offset: int, buffer: memoryview) -> int | None:
        if cold == "all" or rng.random() < 0.5:
            return None
        return real(self, offset, buffer[: rng.randrange(1, len(buffer) + 1)])

    if cold == "unsupported":
        preadv = os.preadv

        def without_nowait(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
            if flags:
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            return preadv(fd, buffers, offset)

        monkeypatch.setattr(os, "preadv", without_nowait)
    else:
        monkeypatch.setattr(OutputFile, "read_now", read_now)
    followers = [Follower(output_reader, output_file, final := running()) for _ in range(3)]
    for follower in followers:
        await follower.has(content)
        follower.task.cancel()
    assert not final.done()
    chunks = await collect(output_reader.stream(output_file, start=Start(), follow=False, final_size=finished(900_000)))
    assert joined(chunks) == content


async def test_really_cold_file(output_reader: OutputReader, tmp_path: Path) -> None:
    path = tmp_path / "cold.out"
    content = pattern(0, 4 * MIB)
    path.write_bytes(content)
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    final = finished(len(content))
    chunks = await collect(output_reader.stream(path, start=Start(), follow=False, final_size=final))
    assert joined(chunks) == content


async def test_grandchild_writes_on(output_reader: OutputReader, output_file: Path) -> None:
    """The stream ends with the job, not with what it left behind (bounded: it must not fill the disk)."""
    script = "echo done; (yes | head -c 20000000) & exit 3"
    with output_file.open("ab", buffering=0) as file:
        child = subprocess.Popen(["sh", "-c", script], stdout=file, start_new_session=True)
    try:
        final = running()
        follower = Follower(output_reader, output_file, final)
        assert await asyncio.to_thread(child.wait) == 3
        size = output_file.stat().st_size
        final.set_result(size)
        await follower.done()
        end = finished(size)
        late = await collect(output_reader.stream(output_file, start=Start(), follow=True, final_size=end))
        assert len(joined(late)) == size
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
