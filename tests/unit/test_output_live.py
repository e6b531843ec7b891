"""Output that is followed while it is written, and files that are deleted, cut or replaced meanwhile."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from tests.support.followers import Follower, counted_turns, running
from tests.support.output_files import PATTERN, append, collect, gaps, inotify_watches, joined, pattern, writer
from tests.support.waiting import eventually
from worker_svc.job import Unavailable
from worker_svc.output import Chunk, OutputReader, Start

# Live


async def test_follow_until_the_final_size(output_reader: OutputReader, output_file: Path) -> None:
    output_file.touch()
    final = running()
    follower = Follower(output_reader, output_file, final)
    for piece in (b"a", b"\0\xff", b"x" * 300_000, b"no newline"):
        expected = follower.data + piece
        append(output_file, piece)
        await follower.has(expected)
    append(output_file, b"last")
    final.set_result(output_file.stat().st_size)
    await follower.done()
    assert follower.data == output_file.read_bytes()


async def test_follow_a_real_writer(output_reader: OutputReader, output_file: Path) -> None:
    child = writer(output_file, PATTERN, 300_000, 777, 0.001)
    final = running()
    followers = [Follower(output_reader, output_file, final) for _ in range(5)]
    await asyncio.to_thread(child.wait)
    final.set_result(300_000)
    for follower in followers:
        await follower.done()
        assert follower.data == pattern(0, 300_000)


async def test_follow_ends_at_once_at_a_final_size_already_passed(
    output_reader: OutputReader, output_file: Path
) -> None:
    output_file.write_bytes(b"the job's, a stray's")
    final = running()
    follower = Follower(output_reader, output_file, final)
    await follower.has(b"the job's, a stray's")
    final.set_result(9)
    await follower.done()


async def test_follow_sends_nothing_beyond_the_final_size(output_reader: OutputReader, output_file: Path) -> None:
    output_file.write_bytes(b"x" * 600_000)
    final = running()
    stream = output_reader.stream(output_file, start=Start(), follow=True, final_size=final)
    first = await anext(stream)
    final.set_result(300_000)
    assert joined([first, *await collect(stream)]) == b"x" * 300_000


async def test_follow_from_the_end_only(output_reader: OutputReader, output_file: Path) -> None:
    output_file.write_bytes(b"old\n")
    for start in (Start(tail_lines=0), Start(tail_bytes=0), Start(offset=4)):
        final = running()
        stream = output_reader.stream(output_file, start=start, follow=True, final_size=final)
        task = asyncio.ensure_future(anext(stream))
        await eventually(lambda: inotify_watches() == 1)
        append(output_file, b"new\n")
        chunk = await task
        assert chunk.data == b"new\n"
        await stream.aclose()
        os.truncate(output_file, 4)


async def test_file_appears_later(output_reader: OutputReader, output_file: Path) -> None:
    final = running()
    followers = [Follower(output_reader, output_file, final) for _ in range(3)]
    await eventually(lambda: inotify_watches() == 1)
    (output_file.parent / "another").touch()
    output_file.write_bytes(b"here ")
    for follower in followers:
        await follower.has(b"here ")
    append(output_file, b"I am")
    final.set_result(9)
    for follower in followers:
        await follower.done()
        assert follower.data == b"here I am"


async def test_file_moved_in(output_reader: OutputReader, output_file: Path) -> None:
    final = running()
    follower = Follower(output_reader, output_file, final)
    await eventually(lambda: inotify_watches() == 1)
    other = output_file.with_name("other")
    other.write_bytes(b"x")
    other.rename(output_file)
    await follower.has(b"x")
    final.set_result(1)
    await follower.done()


@pytest.mark.parametrize("size", [0, 77])
async def test_file_never_appears(output_reader: OutputReader, output_file: Path, size: int) -> None:
    final = running()
    follower = Follower(output_reader, output_file, final)
    await eventually(lambda: inotify_watches() == 1)
    final.set_result(size)
    await follower.done()
    assert gaps(follower.chunks) == ([(0, size)] if size else [])


async def test_end_that_cannot_be_learnt(output_reader: OutputReader, output_file: Path) -> None:
    output_file.touch()
    cancelled, failed = running(), running()
    followers = [Follower(output_reader, output_file, cancelled), Follower(output_reader, output_file, failed)]
    await eventually(lambda: inotify_watches() == 1)
    cancelled.cancel()
    failed.set_exception(Unavailable("no supervisor"))
    with pytest.raises(Unavailable, match="cannot be learnt"):
        await followers[0].done()
    with pytest.raises(Unavailable, match="no supervisor"):
        await followers[1].done()


# Deleted, truncated, replaced


async def test_deleted_under_a_follower(output_reader: OutputReader, output_file: Path) -> None:
    final = running()
    with output_file.open("ab", buffering=0) as job:
        job.write(b"before ")
        follower = Follower(output_reader, output_file, final)
        await follower.has(b"before ")
        output_file.unlink()
        late = Follower(output_reader, output_file, final)
        await eventually(lambda: inotify_watches() == 2)
        job.write(b"after")
        await follower.has(b"before after")
        assert not late.task.done()
        final.set_result(12)
        await follower.done()
        assert await late.done() == [Chunk(0, b"", 12)]


async def test_truncated_below_the_follower(output_reader: OutputReader, output_file: Path) -> None:
    final = running()
    output_file.write_bytes(b"0123456789")
    follower = Follower(output_reader, output_file, final)
    await follower.has(b"0123456789")
    os.truncate(output_file, 0)
    append(output_file, b"abcde")
    for _ in range(20):  # turns of the loop, in which it is looked at
        await asyncio.sleep(0)
    append(output_file, b"fghijKLM")
    await follower.has(b"0123456789KLM")
    os.truncate(output_file, 11)
    final.set_result(15)
    await follower.done()
    assert gaps(follower.chunks) == [(13, 15)]


async def test_truncated_and_ended_below_the_follower(output_reader: OutputReader, output_file: Path) -> None:
    final = running()
    output_file.write_bytes(b"0123456789")
    follower = Follower(output_reader, output_file, final)
    await follower.has(b"0123456789")
    os.truncate(output_file, 0)
    with counted_turns() as turns:
        await asyncio.sleep(0.2)
    assert len(turns) < 30  # it does not spin
    final.set_result(0)
    await follower.done()
    assert follower.data == b"0123456789"


async def test_truncated_while_not_followed(output_reader: OutputReader, output_file: Path) -> None:
    output_file.write_bytes(b"x" * 600_000)
    stream = output_reader.stream(output_file, start=Start(), follow=False, final_size=running())
    first = await anext(stream)
    os.truncate(output_file, 100)
    chunks = [first, *await collect(stream)]
    joined(chunks)
    assert gaps(chunks) == [(len(first.data), 600_000)]


@pytest.mark.parametrize("kind", ["directory", "fifo", "loop"])
async def test_something_else_in_its_place(output_reader: OutputReader, output_file: Path, kind: str) -> None:
    if kind == "directory":
        output_file.mkdir()
    elif kind == "fifo":
        os.mkfifo(output_file)
    else:
        output_file.symlink_to(output_file)
    with pytest.raises(Unavailable, match=r"cannot open the output .*job\.out: "):
        await collect(output_reader.stream(output_file, start=Start(), follow=True, final_size=running()))
