"""Output: real files on the ordinary file system and on tmpfs; where a stream begins and ends."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from tests.support.followers import MIB, Follower, finished, running
from tests.support.output_files import (
    append,
    collect,
    gaps,
    joined,
    pattern,
)
from worker_svc.job import InvalidArgument, OutOfRange
from worker_svc.output import Chunk, OutputReader, Start
from worker_svc.output.file import LineSearch

# Finished, or running and not followed


@pytest.mark.parametrize("size", [0, 1, 4096, 100_000, 256 * 1024, 700_001])
@pytest.mark.parametrize("follow", [False, True])
async def test_finished_is_the_file(output_reader: OutputReader, output_file: Path, size: int, follow: bool) -> None:
    content = random.Random(size).randbytes(size)
    output_file.write_bytes(content)
    chunks = await collect(output_reader.stream(output_file, start=Start(), follow=follow, final_size=finished(size)))
    assert joined(chunks) == content
    assert not gaps(chunks)
    assert all(len(chunk.data) <= 256 * 1024 for chunk in chunks)


async def test_finished_ends_at_the_final_size(output_reader: OutputReader, output_file: Path) -> None:
    output_file.write_bytes(b"the job's" + b" and a stray grandchild's")
    chunks = await collect(output_reader.stream(output_file, start=Start(), follow=True, final_size=finished(9)))
    assert chunks == [Chunk(0, b"the job's")]


@pytest.mark.parametrize("offset", [0, 3, 5, 7])
async def test_finished_and_shorter_is_a_gap(output_reader: OutputReader, output_file: Path, offset: int) -> None:
    output_file.write_bytes(b"12345")
    chunks = await collect(output_reader.stream(output_file, start=Start(offset), follow=False, final_size=finished(9)))
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
    output_reader: OutputReader, output_file: Path, start: Start, expected: list[Chunk]
) -> None:
    assert (
        await collect(output_reader.stream(output_file, start=start, follow=True, final_size=finished(9))) == expected
    )


async def test_running_not_followed_ends_at_the_size_at_the_beginning(
    output_reader: OutputReader, output_file: Path
) -> None:
    output_file.write_bytes(pattern(0, 600_000))
    stream = output_reader.stream(output_file, start=Start(), follow=False, final_size=running())
    first = await anext(stream)
    append(output_file, b"more")
    rest = await collect(stream)
    assert joined([first, *rest]) == pattern(0, 600_000)


async def test_running_not_followed_without_a_file(output_reader: OutputReader, output_file: Path) -> None:
    assert await collect(output_reader.stream(output_file, start=Start(), follow=False, final_size=running())) == []


# Where a stream begins


@pytest.mark.parametrize("follow", [False, True])
@pytest.mark.parametrize("final", [None, 10])
async def test_offset(output_reader: OutputReader, output_file: Path, follow: bool, final: int | None) -> None:
    output_file.write_bytes(b"0123456789")
    for offset in (0, 3, 10):
        end = running() if final is None else finished(final)
        stream = output_reader.stream(output_file, start=Start(offset), follow=follow, final_size=end)
        if end.done() or not follow:
            assert joined(await collect(stream), offset) == b"0123456789"[offset:]
        else:
            follower = Follower(output_reader, output_file, end, Start(offset))
            await follower.has(b"0123456789"[offset:])
            end.set_result(10)
            await follower.done()
    for offset in (11, 2**64 - 1):
        end = running() if final is None else finished(final)
        with pytest.raises(OutOfRange, match=rf"offset {offset} is beyond .* \(10 bytes\)"):
            await collect(output_reader.stream(output_file, start=Start(offset), follow=follow, final_size=end))


async def test_offset_beyond_the_final_size(output_reader: OutputReader, output_file: Path) -> None:
    output_file.write_bytes(b"0123456789")
    with pytest.raises(OutOfRange, match=r"offset 6 .* \(5 bytes\)"):
        await collect(output_reader.stream(output_file, start=Start(6), follow=False, final_size=finished(5)))


async def test_start_is_one_thing(output_reader: OutputReader, output_file: Path) -> None:
    for start in (Start(offset=1, tail_lines=1), Start(tail_bytes=0, tail_lines=0), Start(tail_bytes=-1)):
        with pytest.raises(InvalidArgument):
            await collect(output_reader.stream(output_file, start=start, follow=False, final_size=finished(0)))


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
async def test_tail_lines(
    output_reader: OutputReader, output_file: Path, content: bytes, lines: int, expected: bytes
) -> None:
    output_file.write_bytes(content)
    start = Start(tail_lines=lines)
    chunks = await collect(
        output_reader.stream(output_file, start=start, follow=False, final_size=finished(len(content)))
    )
    assert b"".join(chunk.data for chunk in chunks) == expected


async def test_tail_lines_as_a_plain_split_finds_them(output_reader: OutputReader, output_file: Path) -> None:
    rng = random.Random(7)
    content = b"".join(rng.randbytes(rng.choice([0, 1, 50, 9000])).replace(b"\n", b"") + b"\n" for _ in range(400))
    output_file.write_bytes(content)
    lines = [line + b"\n" for line in content.split(b"\n")[:-1]]
    for count in (1, 2, 17, 100, 399, 400, 401):
        start = Start(tail_lines=count)
        end = finished(len(content))
        chunks = await collect(output_reader.stream(output_file, start=start, follow=False, final_size=end))
        assert b"".join(chunk.data for chunk in chunks) == b"".join(lines[-count:])


@pytest.mark.parametrize("count", [0, 1, 4, 10, 11])
async def test_tail_bytes(output_reader: OutputReader, output_file: Path, count: int) -> None:
    output_file.write_bytes(b"0123456789")
    start = Start(tail_bytes=count)
    chunks = await collect(output_reader.stream(output_file, start=start, follow=False, final_size=running()))
    assert b"".join(chunk.data for chunk in chunks) == b"0123456789"[max(0, 10 - count) :]


async def test_tail_of_a_finished_job_counts_from_its_final_size(
    output_reader: OutputReader, output_file: Path
) -> None:
    output_file.write_bytes(b"a\nb\nstray\n")
    for start in (Start(tail_lines=1), Start(tail_bytes=2)):
        chunks = await collect(output_reader.stream(output_file, start=start, follow=True, final_size=finished(4)))
        assert chunks == [Chunk(2, b"b\n")]


def test_line_search_in_dense_blocks() -> None:
    for block in (b"\n" * 100_000, b"x\n" * 50_000, b"\n" + b"x" * 99_999):
        total = block.count(b"\n")
        for lines in {1, min(2, total), max(1, total // 2), total}:
            found = LineSearch(0, len(block), lines).step(0, block)
            assert found.done
            assert block.count(b"\n", found.offset - 1) == lines
            assert block[found.offset - 1] == ord("\n")


async def test_long_line_does_not_block_the_loop(output_reader: OutputReader, output_file: Path) -> None:
    with output_file.open("wb") as file:
        file.write(b"first\n")
        for _ in range(100):
            file.write(b"x" * MIB)
    final = finished(output_file.stat().st_size)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    counting = asyncio.create_task(count())
    chunks = await collect(output_reader.stream(output_file, start=Start(tail_lines=1), follow=False, final_size=final))
    counting.cancel()
    assert joined(chunks, 6) == b"x" * 100 * MIB
    assert turns > 2 * len(chunks)  # before the first chunk too, while the beginning of the line is looked for
