"""Output: real files on the ordinary file system and on tmpfs, real writers, real holes."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import signal
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import pytest

from tests.support.output_files import (
    PAGES,
    PATTERN,
    append,
    collect,
    eventually,
    gaps,
    inotify_watches,
    joined,
    open_fds,
    pattern,
    punch_head,
    why_no_holes,
    writer,
)
from worker_svc.job import InvalidArgument, OutOfRange, Unavailable
from worker_svc.linux import syscalls
from worker_svc.output import Chunk, OutputReader, Start, notify
from worker_svc.output.file import LineSearch, OutputFile, may_have_hole

MIB = 1024 * 1024
FROM_ZERO = Start()


@pytest.fixture(params=["disk", "tmpfs"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "disk":
        yield tmp_path
        return
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK):
        pytest.skip("/dev/shm is not there or not writable")
    with TemporaryDirectory(dir=shm) as path:
        yield Path(path)


@pytest.fixture
def path(directory: Path) -> Path:
    return directory / "job.out"


@pytest.fixture
def holes(directory: Path) -> None:
    if reason := why_no_holes(directory):
        pytest.skip(reason)


@pytest.fixture
async def reader() -> AsyncIterator[OutputReader]:
    """And nothing is held by the time the test ends."""
    before = open_fds()
    reader = OutputReader()
    yield reader
    await eventually(lambda: inotify_watches() == 0)
    reader.close()
    await eventually(lambda: len(open_fds()) <= len(before))


def finished(size: int) -> asyncio.Future[int]:
    future = asyncio.get_running_loop().create_future()
    future.set_result(size)
    return future


def running() -> asyncio.Future[int]:
    return asyncio.get_running_loop().create_future()


class Follower:
    """A task that collects a stream."""

    def __init__(self, reader: OutputReader, path: Path, final: asyncio.Future[int], start: Start = FROM_ZERO) -> None:
        self.chunks: list[Chunk] = []
        self.start = start.offset or 0
        stream = reader.stream(path, start=start, follow=True, final_size=final)
        self.task = asyncio.create_task(self._run(stream))

    async def _run(self, stream: AsyncIterator[Chunk]) -> None:
        async for chunk in stream:
            self.chunks.append(chunk)

    @property
    def data(self) -> bytes:
        return joined(self.chunks, self.start)

    async def has(self, data: bytes) -> None:
        await eventually(lambda: self.data == data)

    async def done(self) -> list[Chunk]:
        async with asyncio.timeout(20):
            await self.task
        return self.chunks


# Finished, or running and not followed


@pytest.mark.parametrize("size", [0, 1, 4096, 100_000, 256 * 1024, 700_001])
@pytest.mark.parametrize("follow", [False, True])
async def test_finished_is_the_file(reader: OutputReader, path: Path, size: int, follow: bool) -> None:
    content = random.Random(size).randbytes(size)
    path.write_bytes(content)
    chunks = await collect(reader.stream(path, start=Start(), follow=follow, final_size=finished(size)))
    assert joined(chunks) == content
    assert not gaps(chunks)
    assert all(len(chunk.data) <= 256 * 1024 for chunk in chunks)


async def test_finished_ends_at_the_final_size(reader: OutputReader, path: Path) -> None:
    path.write_bytes(b"the job's" + b" and a stray grandchild's")
    chunks = await collect(reader.stream(path, start=Start(), follow=True, final_size=finished(9)))
    assert chunks == [Chunk(0, b"the job's")]


@pytest.mark.parametrize("offset", [0, 3, 5, 7])
async def test_finished_and_shorter_is_a_gap(reader: OutputReader, path: Path, offset: int) -> None:
    path.write_bytes(b"12345")
    chunks = await collect(reader.stream(path, start=Start(offset), follow=False, final_size=finished(9)))
    assert joined(chunks, offset) == b"12345"[offset:]
    assert gaps(chunks) == [(max(5, offset), 9)]


@pytest.mark.parametrize(
    "start,expected",
    [
        (Start(), [Chunk(0, b"", 9)]),
        (Start(offset=4), [Chunk(4, b"", 5)]),
        (Start(offset=9), []),
        (Start(tail_bytes=2), [Chunk(7, b"", 2)]),
        (Start(tail_lines=2), [Chunk(0, b"", 9)]),
        (Start(tail_lines=0), []),
    ],
)
async def test_finished_and_deleted_is_a_gap(
    reader: OutputReader, path: Path, start: Start, expected: list[Chunk]
) -> None:
    assert await collect(reader.stream(path, start=start, follow=True, final_size=finished(9))) == expected


async def test_running_not_followed_ends_at_the_size_at_the_beginning(reader: OutputReader, path: Path) -> None:
    path.write_bytes(pattern(0, 600_000))
    stream = reader.stream(path, start=Start(), follow=False, final_size=running())
    first = await anext(stream)
    append(path, b"more")
    rest = await collect(stream)
    assert joined([first, *rest]) == pattern(0, 600_000)


async def test_running_not_followed_without_a_file(reader: OutputReader, path: Path) -> None:
    assert await collect(reader.stream(path, start=Start(), follow=False, final_size=running())) == []


# Where a stream begins


@pytest.mark.parametrize("follow", [False, True])
@pytest.mark.parametrize("final", [None, 10])
async def test_offset(reader: OutputReader, path: Path, follow: bool, final: int | None) -> None:
    path.write_bytes(b"0123456789")
    for offset in (0, 3, 10):
        end = running() if final is None else finished(final)
        stream = reader.stream(path, start=Start(offset), follow=follow, final_size=end)
        if end.done() or not follow:
            assert joined(await collect(stream), offset) == b"0123456789"[offset:]
        else:
            follower = Follower(reader, path, end, Start(offset))
            await follower.has(b"0123456789"[offset:])
            end.set_result(10)
            await follower.done()
    for offset in (11, 2**64 - 1):
        end = running() if final is None else finished(final)
        with pytest.raises(OutOfRange, match=rf"offset {offset} is beyond .* \(10 bytes\)"):
            await collect(reader.stream(path, start=Start(offset), follow=follow, final_size=end))


async def test_offset_beyond_the_final_size(reader: OutputReader, path: Path) -> None:
    path.write_bytes(b"0123456789")
    with pytest.raises(OutOfRange, match=r"offset 6 .* \(5 bytes\)"):
        await collect(reader.stream(path, start=Start(6), follow=False, final_size=finished(5)))


async def test_start_is_one_thing(reader: OutputReader, path: Path) -> None:
    for start in (Start(offset=1, tail_lines=1), Start(tail_bytes=0, tail_lines=0), Start(tail_bytes=-1)):
        with pytest.raises(InvalidArgument):
            await collect(reader.stream(path, start=start, follow=False, final_size=finished(0)))


@pytest.mark.parametrize(
    "content,lines,expected",
    [
        (b"", 3, b""),
        (b"a\nb\nc\n", 0, b""),
        (b"a\nb\nc\n", 1, b"c\n"),
        (b"a\nb\nc", 1, b"c"),
        (b"a\nb\nc\n", 2, b"b\nc\n"),
        (b"a\nb\nc", 3, b"a\nb\nc"),
        (b"a\nb\nc\n", 99, b"a\nb\nc\n"),
        (b"a\nb\nc\n", 2**64 - 1, b"a\nb\nc\n"),
        (b"\n\n\n", 2, b"\n\n"),
        (b"no newline", 1, b"no newline"),
        (b"\0\xff\n\0\xfe", 1, b"\0\xfe"),
        (b"\r\nx\r\n", 1, b"x\r\n"),
    ],
)
async def test_tail_lines(reader: OutputReader, path: Path, content: bytes, lines: int, expected: bytes) -> None:
    path.write_bytes(content)
    start = Start(tail_lines=lines)
    chunks = await collect(reader.stream(path, start=start, follow=False, final_size=finished(len(content))))
    assert b"".join(chunk.data for chunk in chunks) == expected


async def test_tail_lines_as_a_plain_split_finds_them(reader: OutputReader, path: Path) -> None:
    rng = random.Random(7)
    content = b"".join(rng.randbytes(rng.choice([0, 1, 50, 9000])).replace(b"\n", b"") + b"\n" for _ in range(400))
    path.write_bytes(content)
    lines = [line + b"\n" for line in content.split(b"\n")[:-1]]
    for count in (1, 2, 17, 100, 399, 400, 401):
        start = Start(tail_lines=count)
        end = finished(len(content))
        chunks = await collect(reader.stream(path, start=start, follow=False, final_size=end))
        assert b"".join(chunk.data for chunk in chunks) == b"".join(lines[-count:])


@pytest.mark.parametrize("count", [0, 1, 4, 10, 11])
async def test_tail_bytes(reader: OutputReader, path: Path, count: int) -> None:
    path.write_bytes(b"0123456789")
    start = Start(tail_bytes=count)
    chunks = await collect(reader.stream(path, start=start, follow=False, final_size=running()))
    assert b"".join(chunk.data for chunk in chunks) == b"0123456789"[max(0, 10 - count) :]


async def test_tail_of_a_finished_job_counts_from_its_final_size(reader: OutputReader, path: Path) -> None:
    path.write_bytes(b"a\nb\nstray\n")
    for start in (Start(tail_lines=1), Start(tail_bytes=2)):
        chunks = await collect(reader.stream(path, start=start, follow=True, final_size=finished(4)))
        assert chunks == [Chunk(2, b"b\n")]


def test_line_search_in_dense_blocks() -> None:
    for block in (b"\n" * 100_000, b"x\n" * 50_000, b"\n" + b"x" * 99_999):
        total = block.count(b"\n")
        for lines in {1, min(2, total), max(1, total // 2), total}:
            found = LineSearch(0, len(block), lines).step(0, block)
            assert found.done
            assert block.count(b"\n", found.offset - 1) == lines
            assert block[found.offset - 1] == ord("\n")


async def test_long_line_does_not_block_the_loop(reader: OutputReader, path: Path) -> None:
    with path.open("wb") as file:
        file.write(b"first\n")
        for _ in range(100):
            file.write(b"x" * MIB)
    final = finished(path.stat().st_size)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    counting = asyncio.create_task(count())
    chunks = await collect(reader.stream(path, start=Start(tail_lines=1), follow=False, final_size=final))
    counting.cancel()
    assert joined(chunks, 6) == b"x" * 100 * MIB
    assert turns > 2 * len(chunks)  # before the first chunk too, while the beginning of the line is looked for


# Live


async def test_follow_until_the_final_size(reader: OutputReader, path: Path) -> None:
    path.touch()
    final = running()
    follower = Follower(reader, path, final)
    for piece in (b"a", b"\0\xff", b"x" * 300_000, b"no newline"):
        expected = follower.data + piece
        append(path, piece)
        await follower.has(expected)
    append(path, b"last")
    final.set_result(path.stat().st_size)
    await follower.done()
    assert follower.data == path.read_bytes()


async def test_follow_a_real_writer(reader: OutputReader, path: Path) -> None:
    child = writer(path, PATTERN, 300_000, 777, 0.001)
    final = running()
    followers = [Follower(reader, path, final) for _ in range(5)]
    await asyncio.to_thread(child.wait)
    final.set_result(300_000)
    for follower in followers:
        await follower.done()
        assert follower.data == pattern(0, 300_000)


async def test_follow_ends_at_once_at_a_final_size_already_passed(reader: OutputReader, path: Path) -> None:
    path.write_bytes(b"the job's, a stray's")
    final = running()
    follower = Follower(reader, path, final)
    await follower.has(b"the job's, a stray's")
    final.set_result(9)
    await follower.done()


async def test_follow_sends_nothing_beyond_the_final_size(reader: OutputReader, path: Path) -> None:
    path.write_bytes(b"x" * 600_000)
    final = running()
    stream = reader.stream(path, start=Start(), follow=True, final_size=final)
    first = await anext(stream)
    final.set_result(300_000)
    assert joined([first, *await collect(stream)]) == b"x" * 300_000


async def test_follow_from_the_end_only(reader: OutputReader, path: Path) -> None:
    path.write_bytes(b"old\n")
    for start in (Start(tail_lines=0), Start(tail_bytes=0), Start(offset=4)):
        final = running()
        stream = reader.stream(path, start=start, follow=True, final_size=final)
        task = asyncio.ensure_future(anext(stream))
        await eventually(lambda: inotify_watches() == 1)
        append(path, b"new\n")
        chunk = await task
        assert chunk.data == b"new\n"
        await stream.aclose()
        os.truncate(path, 4)


async def test_file_appears_later(reader: OutputReader, path: Path) -> None:
    final = running()
    followers = [Follower(reader, path, final) for _ in range(3)]
    await eventually(lambda: inotify_watches() == 1)
    (path.parent / "another").touch()
    path.write_bytes(b"here ")
    for follower in followers:
        await follower.has(b"here ")
    append(path, b"I am")
    final.set_result(9)
    for follower in followers:
        await follower.done()
        assert follower.data == b"here I am"


async def test_file_moved_in(reader: OutputReader, path: Path) -> None:
    final = running()
    follower = Follower(reader, path, final)
    await eventually(lambda: inotify_watches() == 1)
    other = path.with_name("other")
    other.write_bytes(b"x")
    other.rename(path)
    await follower.has(b"x")
    final.set_result(1)
    await follower.done()


@pytest.mark.parametrize("size", [0, 77])
async def test_file_never_appears(reader: OutputReader, path: Path, size: int) -> None:
    final = running()
    follower = Follower(reader, path, final)
    await eventually(lambda: inotify_watches() == 1)
    final.set_result(size)
    await follower.done()
    assert gaps(follower.chunks) == ([(0, size)] if size else [])


async def test_end_that_cannot_be_learnt(reader: OutputReader, path: Path) -> None:
    path.touch()
    cancelled, failed = running(), running()
    followers = [Follower(reader, path, cancelled), Follower(reader, path, failed)]
    await eventually(lambda: inotify_watches() == 1)
    cancelled.cancel()
    failed.set_exception(Unavailable("no supervisor"))
    with pytest.raises(Unavailable, match="cannot be learnt"):
        await followers[0].done()
    with pytest.raises(Unavailable, match="no supervisor"):
        await followers[1].done()


# Deleted, truncated, replaced


async def test_deleted_under_a_follower(reader: OutputReader, path: Path) -> None:
    final = running()
    with path.open("ab", buffering=0) as job:
        job.write(b"before ")
        follower = Follower(reader, path, final)
        await follower.has(b"before ")
        path.unlink()
        late = Follower(reader, path, final)
        await eventually(lambda: inotify_watches() == 2)
        job.write(b"after")
        await follower.has(b"before after")
        assert not late.task.done()
        final.set_result(12)
        await follower.done()
        assert await late.done() == [Chunk(0, b"", 12)]


async def test_truncated_below_the_follower(reader: OutputReader, path: Path) -> None:
    final = running()
    path.write_bytes(b"0123456789")
    follower = Follower(reader, path, final)
    await follower.has(b"0123456789")
    os.truncate(path, 0)
    append(path, b"abcde")
    await asyncio.sleep(0.02)
    append(path, b"fghijKLM")
    await follower.has(b"0123456789KLM")
    os.truncate(path, 11)
    final.set_result(15)
    await follower.done()
    assert gaps(follower.chunks) == [(13, 15)]


async def test_truncated_and_ended_below_the_follower(reader: OutputReader, path: Path) -> None:
    final = running()
    path.write_bytes(b"0123456789")
    follower = Follower(reader, path, final)
    await follower.has(b"0123456789")
    os.truncate(path, 0)
    with counted_turns() as turns:
        await asyncio.sleep(0.2)
    assert len(turns) < 30  # it does not spin
    final.set_result(0)
    await follower.done()
    assert follower.data == b"0123456789"


async def test_truncated_while_not_followed(reader: OutputReader, path: Path) -> None:
    path.write_bytes(b"x" * 600_000)
    stream = reader.stream(path, start=Start(), follow=False, final_size=running())
    first = await anext(stream)
    os.truncate(path, 100)
    chunks = [first, *await collect(stream)]
    joined(chunks)
    assert gaps(chunks) == [(len(first.data), 600_000)]


@pytest.mark.parametrize("kind", ["directory", "fifo", "loop"])
async def test_something_else_in_its_place(reader: OutputReader, path: Path, kind: str) -> None:
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(path)
    with pytest.raises(Unavailable, match=r"cannot open the output .*job\.out: "):
        await collect(reader.stream(path, start=Start(), follow=True, final_size=running()))


# Holes


@pytest.mark.usefixtures("holes")
class TestHoles:
    @pytest.mark.parametrize("follow", [False, True])
    @pytest.mark.parametrize("start", [0, 5000, 8191, 8192, 9000])
    async def test_head_is_a_gap(self, reader: OutputReader, path: Path, follow: bool, start: int) -> None:
        path.write_bytes(pattern(0, 600_000))
        punch_head(path, 8192)
        end = finished(600_000)
        chunks = await collect(reader.stream(path, start=Start(start), follow=follow, final_size=end))
        data_from = max(start, 8192)
        assert joined(chunks, start) == pattern(data_from, 600_000 - data_from)
        assert gaps(chunks) == ([(start, 8192)] if start < 8192 else [])

    async def test_all_is_gone(self, reader: OutputReader, path: Path) -> None:
        path.write_bytes(pattern(0, 8192))
        punch_head(path, 8192)
        final = running()
        follower = Follower(reader, path, final)
        await eventually(lambda: follower.chunks)
        append(path, b"new")
        final.set_result(8195)
        assert await follower.done() == [Chunk(0, b"", 8192), Chunk(8192, b"new")]

    async def test_gap_ends_at_the_final_size(self, reader: OutputReader, path: Path) -> None:
        path.write_bytes(pattern(0, 40960))
        punch_head(path, 8192)
        chunks = await collect(reader.stream(path, start=Start(), follow=True, final_size=finished(100)))
        assert chunks == [Chunk(0, b"", 100)]

    async def test_tail_reaches_into_the_hole(self, reader: OutputReader, path: Path) -> None:
        path.write_bytes(pattern(0, 16384))
        punch_head(path, 8192)
        end = finished(16384)
        lines = await collect(reader.stream(path, start=Start(tail_lines=512), follow=False, final_size=end))
        assert lines[0] == Chunk(0, b"", 8192)
        lines = await collect(reader.stream(path, start=Start(tail_lines=511), follow=False, final_size=end))
        assert joined(lines, 8208) == pattern(8208, 16384 - 8208)
        tail = await collect(reader.stream(path, start=Start(tail_bytes=9000), follow=False, final_size=end))
        assert tail[0] == Chunk(7384, b"", 808)

    async def test_zeros_further_on_are_data(self, reader: OutputReader, path: Path) -> None:
        content = b"x" * 4096 + bytes(300_000) + b"y"
        path.write_bytes(content)
        with path.open("r+b") as file:  # and a hole the job made itself
            file.seek(len(content) + MIB)
            file.write(b"z")
        size = path.stat().st_size
        chunks = await collect(reader.stream(path, start=Start(), follow=False, final_size=finished(size)))
        assert joined(chunks) == content + bytes(MIB) + b"z"
        assert not gaps(chunks)

    async def test_zeros_behind_a_punched_head_are_data(self, reader: OutputReader, path: Path) -> None:
        path.write_bytes(bytes(65536) + b"end")
        punch_head(path, 8192)
        chunks = await collect(reader.stream(path, start=Start(), follow=False, final_size=finished(65539)))
        assert gaps(chunks) == [(0, 8192)]
        assert joined(chunks) == bytes(65536 - 8192) + b"end"

    @pytest.mark.parametrize("punch_after_read", [False, True])
    async def test_punched_between_read_and_look(
        self, reader: OutputReader, path: Path, monkeypatch: pytest.MonkeyPatch, punch_after_read: bool
    ) -> None:
        """The block was read just before, or just after, its first half went."""
        path.write_bytes(bytes(4096) + pattern(4096, 100_000))
        real = OutputFile.read_now
        punched = False

        def read_now(self: OutputFile, offset: int, buffer: memoryview) -> int | None:
            nonlocal punched
            count = real(self, offset, buffer) if punch_after_read else None
            if not punched:
                punched = True
                punch_head(path, 49152)
            return count if punch_after_read else real(self, offset, buffer)

        monkeypatch.setattr(OutputFile, "read_now", read_now)
        end = finished(104_096)
        chunks = await collect(reader.stream(path, start=Start(), follow=False, final_size=end))
        assert gaps(chunks) == [(0, 49152)]
        assert joined(chunks) == pattern(49152, 104_096 - 49152)

    async def test_readers_beside_a_cap(self, reader: OutputReader, path: Path) -> None:
        """A job at full speed, its head punched close behind: what is sent is right to the byte."""
        pages, keep = 16_384, 2 * MIB
        child = writer(path, PAGES, pages)
        final = running()
        followers = [Follower(reader, path, final) for _ in range(3)]
        newcomers = []

        def cap() -> None:
            while child.poll() is None:
                punch_head(path, max(4096, path.stat().st_size - keep) // 4096 * 4096)
            punch_head(path, pages * 4096 - keep)

        capping = asyncio.create_task(asyncio.to_thread(cap))
        while not capping.done():
            newcomers.append(Follower(reader, path, final))
            await asyncio.sleep(0.02)
        await capping
        final.set_result(pages * 4096)
        assert path.stat().st_blocks * 512 <= keep + MIB
        for follower in [*followers, *newcomers]:
            chunks = await follower.done()
            assert sum(len(chunk.data) + chunk.gap_bytes for chunk in chunks) == pages * 4096
            for chunk in chunks:
                assert _is_pages(chunk)

    def test_what_can_be_a_hole_is_seen(self) -> None:
        """However read and punch cross: zeros before some word of the hole, or from there to its end."""
        rng = random.Random(1)
        for _ in range(2000):
            offset, length = rng.randrange(10_000), rng.randrange(1, 20_000)
            data = bytearray(b"x" * length)
            assert not may_have_hole(bytes(data), offset)
            hole_end = rng.randrange(offset // 4096 + 1, (offset + length) // 4096 + 2) * 4096
            crossing = rng.randrange(offset // 8 + 1, hole_end // 8 + 1) * 8
            before, after = crossing - offset, min(hole_end - offset, length)
            if rng.random() < 0.5:
                data[:before] = bytes(min(before, length))
            elif before < after:
                data[before:after] = bytes(after - before)
            else:
                continue
            assert len(data) == length
            assert may_have_hole(bytes(data), offset)


def _is_pages(chunk: Chunk) -> bool:
    """Whether the data are what PAGES writes at this offset."""
    first = chunk.offset // 4096
    last = (chunk.offset + len(chunk.data)) // 4096
    expected = b"".join(struct.pack(">Q", n + 1) * 512 for n in range(first, last + 1))
    begin = chunk.offset - first * 4096
    return expected[begin : begin + len(chunk.data)] == chunk.data


# What it costs, what it holds


async def test_watch_and_descriptor_are_shared_and_given_back(reader: OutputReader, path: Path) -> None:
    path.touch()
    before = len(open_fds())
    final = running()
    followers = [Follower(reader, path, final) for _ in range(50)]
    await eventually(lambda: all(f.task for f in followers) and inotify_watches() == 1)
    await eventually(lambda: len(open_fds()) == before + 2)  # the file, and inotify
    for follower in followers[1:]:
        follower.task.cancel()
    await asyncio.wait([follower.task for follower in followers[1:]])
    assert inotify_watches() == 1
    append(path, b"x")
    await followers[0].has(b"x")
    followers[0].task.cancel()
    await asyncio.wait([followers[0].task])
    assert inotify_watches() == 0
    assert len(open_fds()) == before + 1
    assert not getattr(final, "_callbacks", None)


async def test_consumer_leaves_in_the_middle(reader: OutputReader, path: Path) -> None:
    path.write_bytes(b"x" * 600_000)
    before = len(open_fds())
    stream = reader.stream(path, start=Start(), follow=True, final_size=running())
    await anext(stream)
    assert inotify_watches() == 1
    await stream.aclose()
    assert inotify_watches() == 0
    assert len(open_fds()) == before + 1  # inotify


async def test_cancelled_at_any_step(reader: OutputReader, path: Path) -> None:
    path.write_bytes(b"line\n" * 100_000)
    final = running()
    for steps in range(40):
        follower = Follower(reader, path, final, Start(tail_lines=99_999))
        for _ in range(steps):
            await asyncio.sleep(0)
        follower.task.cancel()
        await asyncio.wait([follower.task])
    await eventually(lambda: not [t for t in open_fds().values() if t == str(path)])
    assert inotify_watches() == 0


async def test_cancelled_while_waiting_for_the_file(reader: OutputReader, path: Path) -> None:
    follower = Follower(reader, path, running())
    await eventually(lambda: inotify_watches() == 1)
    follower.task.cancel()
    await asyncio.wait([follower.task])
    assert inotify_watches() == 0


async def test_last_reader_of_a_deleted_file_gives_its_blocks_back(reader: OutputReader, path: Path) -> None:
    path.write_bytes(b"x" * MIB)
    stream = reader.stream(path, start=Start(), follow=True, final_size=running())
    await anext(stream)
    path.unlink()
    await stream.aclose()
    await eventually(lambda: not [t for t in open_fds().values() if "deleted" in t and "job.out" in t])


async def test_close_ends_streams(path: Path) -> None:
    path.touch()
    reader = OutputReader()
    follower = Follower(reader, path, running())
    missing = Follower(reader, path.with_name("missing"), running())
    await eventually(lambda: inotify_watches() == 2)
    reader.close()
    for each in (follower, missing):
        with pytest.raises(Unavailable, match="about to end"):
            await each.done()
    with pytest.raises(Unavailable):
        await anext(reader.stream(path, start=Start(), follow=True, final_size=running()))
    await eventually(lambda: str(path) not in open_fds().values())


async def test_slow_consumer_slows_nobody(reader: OutputReader, path: Path) -> None:
    path.write_bytes(pattern(0, 4 * MIB))
    slow = reader.stream(path, start=Start(), follow=True, final_size=running())
    first = await anext(slow)
    final = finished(4 * MIB)
    others = [Follower(reader, path, final) for _ in range(5)]
    for other in others:
        await other.done()
    assert first.data == pattern(0, 256 * 1024)
    await slow.aclose()


async def test_others_run_between_chunks(reader: OutputReader, path: Path) -> None:
    path.write_bytes(b"x" * 8 * MIB)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    counting = asyncio.create_task(count())
    await asyncio.sleep(0)
    chunks = await collect(reader.stream(path, start=Start(), follow=False, final_size=finished(8 * MIB)))
    counting.cancel()
    assert turns >= len(chunks) == 32


@contextmanager
def counted_turns() -> Iterator[list[None]]:
    """One entry for each turn of the loop meanwhile."""
    selector = cast(Any, asyncio.get_running_loop())._selector
    select, turns = selector.select, list[None]()

    def counting(timeout: float | None = None) -> Any:
        turns.append(None)
        return select(timeout)

    selector.select = counting
    try:
        yield turns
    finally:
        del selector.select


@pytest.mark.long
async def test_idle_followers_cost_nothing(reader: OutputReader, directory: Path) -> None:
    final = running()
    paths = [directory / f"{n}.out" for n in range(10)]
    followers = [Follower(reader, path, final) for path in paths for _ in range(10)]
    for path in paths[:5]:
        path.touch()
    await asyncio.sleep(0.5)
    with counted_turns() as turns:
        await asyncio.sleep(1.0)
    assert len(turns) < 10
    final.set_result(0)
    for follower in followers:
        await follower.done()


async def test_flood_of_single_bytes_is_batched(reader: OutputReader, path: Path) -> None:
    child = writer(path, PATTERN, 200_000, 1, 0)
    final = running()
    follower = Follower(reader, path, final)
    await asyncio.to_thread(child.wait)
    final.set_result(200_000)
    await follower.done()
    assert follower.data == pattern(0, 200_000)
    print(f"200,000 writes came as {len(follower.chunks)} chunks")
    assert len(follower.chunks) < 10_000


async def test_many_followers_some_leave(reader: OutputReader, path: Path) -> None:
    total = 8 * MIB
    child = writer(path, PATTERN, total, 40_000, 0.002)
    final = running()
    rng = random.Random(3)
    followers = [Follower(reader, path, final) for _ in range(200)]
    leavers = rng.sample(followers, 80)
    for follower in leavers:
        await asyncio.sleep(rng.random() * 0.006)
        follower.task.cancel()
    await asyncio.to_thread(child.wait)
    final.set_result(total)
    expected = pattern(0, total)
    for follower in followers:
        if follower in leavers:
            assert expected.startswith(follower.data)
        else:
            await follower.done()
            assert follower.data == expected
        follower.chunks.clear()


async def test_resume_where_another_left(reader: OutputReader, path: Path) -> None:
    total = 2 * MIB
    child = writer(path, PATTERN, total, 10_000, 0.001)
    final = running()

    async def end() -> None:
        await asyncio.to_thread(child.wait)
        final.set_result(total)

    ending = asyncio.create_task(end())
    rng = random.Random(5)
    received = b""
    while len(received) < total:
        stream = reader.stream(path, start=Start(len(received)), follow=True, final_size=final)
        for _ in range(rng.randrange(1, 10)):
            if (chunk := await anext(stream, None)) is not None:
                received += chunk.data
        await stream.aclose()
    await ending
    assert received == pattern(0, total)


async def test_each_write_wakes_its_follower(reader: OutputReader, directory: Path) -> None:
    """How soon is printed: it tells as much of the machine."""
    path = directory / "latency.out"
    path.touch()
    final = running()
    late: list[float] = []
    follower = reader.stream(path, start=Start(), follow=True, final_size=final)
    for _ in range(50):
        task = asyncio.ensure_future(anext(follower))
        await asyncio.sleep(0.01)
        append(path, struct.pack("d", time.perf_counter()))
        chunk = await task
        late.append(time.perf_counter() - struct.unpack("d", chunk.data)[0])
    await follower.aclose()
    late.sort()
    print(f"wake-up: p50 {late[25] * 1e3:.2f} ms, p98 {late[49] * 1e3:.2f} ms")


# When the machine refuses


@pytest.mark.parametrize("call", ["inotify_init", "inotify_add_watch"])
async def test_inotify_refuses(path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(notify, call, refuse)
    said: list[str] = []
    reader = OutputReader(on_degraded=said.append)
    final = running()
    followers = [Follower(reader, path, final) for _ in range(2)]
    await asyncio.sleep(0.05)
    path.write_bytes(b"a")
    for follower in followers:
        await follower.has(b"a")
    append(path, b"b")
    for follower in followers:
        await follower.has(b"ab")
    final.set_result(2)
    for follower in followers:
        await follower.done()
    assert said == [reader.degraded]
    assert "No space left" in said[0]
    reader.close()


async def test_directory_removed_while_waiting(directory: Path) -> None:
    reader = OutputReader()
    where = directory / "gone"
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


async def test_queue_overflow_wakes_all(reader: OutputReader, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.touch()
    final = running()
    follower = Follower(reader, path, final)
    await eventually(lambda: inotify_watches() == 1)
    overflow = struct.pack("iIII", -1, syscalls.IN_Q_OVERFLOW, 0, 0)
    real = os.read
    monkeypatch.setattr(os, "read", lambda fd, size: real(fd, size) and overflow)
    append(path, b"x")
    await follower.has(b"x")
    final.set_result(1)
    await follower.done()


async def test_read_error_is_told(reader: OutputReader, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path.write_bytes(b"x")
    for call in (fail, lambda *_: None):
        monkeypatch.setattr(OutputFile, "read_now", call)
        monkeypatch.setattr(OutputFile, "read", fail)
        with pytest.raises(Unavailable, match=r"cannot read the output .*job\.out: Input/output error"):
            await collect(reader.stream(path, start=Start(), follow=False, final_size=finished(1)))


@pytest.mark.parametrize("cold", ["all", "some", "unsupported"])
async def test_read_in_threads(reader: OutputReader, path: Path, monkeypatch: pytest.MonkeyPatch, cold: str) -> None:
    """Not in the page cache, in part or at all, or the file system has no RWF_NOWAIT."""
    content = pattern(0, 900_000)
    path.write_bytes(content)
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
    followers = [Follower(reader, path, final := running()) for _ in range(3)]
    for follower in followers:
        await follower.has(content)
        follower.task.cancel()
    assert not final.done()
    chunks = await collect(reader.stream(path, start=Start(), follow=False, final_size=finished(900_000)))
    assert joined(chunks) == content


async def test_really_cold_file(reader: OutputReader, tmp_path: Path) -> None:
    path = tmp_path / "cold.out"
    content = pattern(0, 4 * MIB)
    path.write_bytes(content)
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    final = finished(len(content))
    chunks = await collect(reader.stream(path, start=Start(), follow=False, final_size=final))
    assert joined(chunks) == content


async def test_grandchild_writes_on(reader: OutputReader, path: Path) -> None:
    """The stream ends with the job, not with what it left behind (bounded: it must not fill the disk)."""
    script = "echo done; (yes | head -c 20000000) & exit 3"
    with path.open("ab", buffering=0) as file:
        child = subprocess.Popen(["sh", "-c", script], stdout=file, start_new_session=True)
    try:
        final = running()
        follower = Follower(reader, path, final)
        assert await asyncio.to_thread(child.wait) == 3
        size = path.stat().st_size
        final.set_result(size)
        await follower.done()
        end = finished(size)
        late = await collect(reader.stream(path, start=Start(), follow=True, final_size=end))
        assert len(joined(late)) == size
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
