"""Output whose head was given back to the file system: real holes."""

from __future__ import annotations

import asyncio
import random
import struct
from pathlib import Path

import pytest

from tests.support.followers import MIB, Follower, finished, running
from tests.support.output_files import PAGES, append, collect, gaps, joined, pattern, punch_head, writer
from tests.support.waiting import eventually
from worker_svc.output import Chunk, OutputReader, Start
from worker_svc.output.file import OutputFile, may_have_hole

# Holes


@pytest.mark.usefixtures("holes")
class TestHoles:
    @pytest.mark.parametrize("follow", [False, True])
    @pytest.mark.parametrize("start", [0, 5000, 8191, 8192, 9000])
    async def test_head_is_a_gap(
        self, output_reader: OutputReader, output_file: Path, follow: bool, start: int
    ) -> None:
        output_file.write_bytes(pattern(0, 600_000))
        punch_head(output_file, 8192)
        end = finished(600_000)
        chunks = await collect(output_reader.stream(output_file, start=Start(start), follow=follow, final_size=end))
        data_from = max(start, 8192)
        assert joined(chunks, start) == pattern(data_from, 600_000 - data_from)
        assert gaps(chunks) == ([(start, 8192)] if start < 8192 else [])

    async def test_all_is_gone(self, output_reader: OutputReader, output_file: Path) -> None:
        output_file.write_bytes(pattern(0, 8192))
        punch_head(output_file, 8192)
        final = running()
        follower = Follower(output_reader, output_file, final)
        await eventually(lambda: follower.chunks)
        append(output_file, b"new")
        final.set_result(8195)
        assert await follower.done() == [Chunk(0, b"", 8192), Chunk(8192, b"new")]

    async def test_gap_ends_at_the_final_size(self, output_reader: OutputReader, output_file: Path) -> None:
        output_file.write_bytes(pattern(0, 40960))
        punch_head(output_file, 8192)
        chunks = await collect(output_reader.stream(output_file, start=Start(), follow=True, final_size=finished(100)))
        assert chunks == [Chunk(0, b"", 100)]

    async def test_tail_reaches_into_the_hole(self, output_reader: OutputReader, output_file: Path) -> None:
        output_file.write_bytes(pattern(0, 16384))
        punch_head(output_file, 8192)
        end = finished(16384)
        lines = await collect(
            output_reader.stream(output_file, start=Start(tail_lines=512), follow=False, final_size=end)
        )
        assert lines[0] == Chunk(0, b"", 8192)
        lines = await collect(
            output_reader.stream(output_file, start=Start(tail_lines=511), follow=False, final_size=end)
        )
        assert joined(lines, 8208) == pattern(8208, 16384 - 8208)
        tail = await collect(
            output_reader.stream(output_file, start=Start(tail_bytes=9000), follow=False, final_size=end)
        )
        assert tail[0] == Chunk(7384, b"", 808)

    async def test_zeros_further_on_are_data(self, output_reader: OutputReader, output_file: Path) -> None:
        content = b"x" * 4096 + bytes(300_000) + b"y"
        output_file.write_bytes(content)
        with output_file.open("r+b") as file:  # and a hole the job made itself
            file.seek(len(content) + MIB)
            file.write(b"z")
        size = output_file.stat().st_size
        chunks = await collect(
            output_reader.stream(output_file, start=Start(), follow=False, final_size=finished(size))
        )
        assert joined(chunks) == content + bytes(MIB) + b"z"
        assert not gaps(chunks)

    async def test_zeros_behind_a_punched_head_are_data(self, output_reader: OutputReader, output_file: Path) -> None:
        output_file.write_bytes(bytes(65536) + b"end")
        punch_head(output_file, 8192)
        chunks = await collect(
            output_reader.stream(output_file, start=Start(), follow=False, final_size=finished(65539))
        )
        assert gaps(chunks) == [(0, 8192)]
        assert joined(chunks) == bytes(65536 - 8192) + b"end"

    @pytest.mark.parametrize("punch_after_read", [False, True])
    async def test_punched_between_read_and_look(
        self, output_reader: OutputReader, output_file: Path, monkeypatch: pytest.MonkeyPatch, punch_after_read: bool
    ) -> None:
        """The block was read just before, or just after, its first half went."""
        output_file.write_bytes(bytes(4096) + pattern(4096, 100_000))
        real = OutputFile.read_now
        punched = False

        def read_now(self: OutputFile, offset: int, buffer: memoryview) -> int | None:
            nonlocal punched
            count = real(self, offset, buffer) if punch_after_read else None
            if not punched:
                punched = True
                punch_head(output_file, 49152)
            return count if punch_after_read else real(self, offset, buffer)

        monkeypatch.setattr(OutputFile, "read_now", read_now)
        end = finished(104_096)
        chunks = await collect(output_reader.stream(output_file, start=Start(), follow=False, final_size=end))
        assert gaps(chunks) == [(0, 49152)]
        assert joined(chunks) == pattern(49152, 104_096 - 49152)

    async def test_readers_beside_a_cap(self, output_reader: OutputReader, output_file: Path) -> None:
        """A job at full speed, its head punched close behind: what is sent is right to the byte."""
        pages, keep = 16_384, 2 * MIB
        child = writer(output_file, PAGES, pages)
        final = running()
        followers = [Follower(output_reader, output_file, final) for _ in range(3)]
        newcomers = []

        def cap() -> None:
            while child.poll() is None:
                punch_head(output_file, max(4096, output_file.stat().st_size - keep) // 4096 * 4096)
            punch_head(output_file, pages * 4096 - keep)

        capping = asyncio.create_task(asyncio.to_thread(cap))
        while not capping.done():
            newcomers.append(Follower(output_reader, output_file, final))
            await asyncio.sleep(0.02)
        await capping
        final.set_result(pages * 4096)
        assert output_file.stat().st_blocks * 512 <= keep + MIB
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
