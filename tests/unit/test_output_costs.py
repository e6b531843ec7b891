"""What followers of output cost and hold."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from tests.support.followers import MIB, Follower, counted_turns, finished, running
from tests.support.output_files import PATTERN, append, collect, inotify_watches, open_fds, pattern, writer
from tests.support.waiting import PATIENCE_S, eventually
from worker_svc.job import Unavailable
from worker_svc.output import OutputReader, Start

# What it costs, what it holds


async def test_watch_and_descriptor_are_shared_and_given_back(output_reader: OutputReader, output_file: Path) -> None:
    output_file.touch()
    before = len(open_fds())
    final = running()
    followers = [Follower(output_reader, output_file, final) for _ in range(50)]
    await eventually(lambda: all(f.task for f in followers) and inotify_watches() == 1)
    await eventually(lambda: len(open_fds()) == before + 2)  # the file, and inotify
    for follower in followers[1:]:
        follower.task.cancel()
    await asyncio.wait([follower.task for follower in followers[1:]])
    assert inotify_watches() == 1
    append(output_file, b"x")
    await followers[0].has(b"x")
    followers[0].task.cancel()
    await asyncio.wait([followers[0].task])
    assert inotify_watches() == 0
    assert len(open_fds()) == before + 1
    assert not getattr(final, "_callbacks", None)


async def test_consumer_leaves_in_the_middle(output_reader: OutputReader, output_file: Path) -> None:
    output_file.write_bytes(b"x" * 600_000)
    before = len(open_fds())
    stream = output_reader.stream(output_file, start=Start(), follow=True, final_size=running())
    await anext(stream)
    assert inotify_watches() == 1
    await stream.aclose()
    assert inotify_watches() == 0
    assert len(open_fds()) == before + 1  # inotify


async def test_cancelled_at_any_step(output_reader: OutputReader, output_file: Path) -> None:
    output_file.write_bytes(b"line\n" * 100_000)
    final = running()
    for steps in range(40):
        follower = Follower(output_reader, output_file, final, Start(tail_lines=99_999))
        for _ in range(steps):
            await asyncio.sleep(0)
        follower.task.cancel()
        await asyncio.wait([follower.task])
    await eventually(lambda: not [t for t in open_fds().values() if t == str(output_file)])
    assert inotify_watches() == 0


async def test_cancelled_while_waiting_for_the_file(output_reader: OutputReader, output_file: Path) -> None:
    follower = Follower(output_reader, output_file, running())
    await eventually(lambda: inotify_watches() == 1)
    follower.task.cancel()
    await asyncio.wait([follower.task])
    assert inotify_watches() == 0


async def test_last_reader_of_a_deleted_file_gives_its_blocks_back(
    output_reader: OutputReader, output_file: Path
) -> None:
    output_file.write_bytes(b"x" * MIB)
    stream = output_reader.stream(output_file, start=Start(), follow=True, final_size=running())
    await anext(stream)
    output_file.unlink()
    await stream.aclose()
    await eventually(lambda: not [t for t in open_fds().values() if "deleted" in t and "job.out" in t])


async def test_close_ends_streams(output_file: Path) -> None:
    output_file.touch()
    reader = OutputReader()
    follower = Follower(reader, output_file, running())
    missing = Follower(reader, output_file.with_name("missing"), running())
    await eventually(lambda: inotify_watches() == 2)
    reader.close()
    for each in (follower, missing):
        with pytest.raises(Unavailable, match="about to end"):
            await each.done()
    with pytest.raises(Unavailable):
        await anext(reader.stream(output_file, start=Start(), follow=True, final_size=running()))
    await eventually(lambda: str(output_file) not in open_fds().values())


async def test_slow_consumer_slows_nobody(output_reader: OutputReader, output_file: Path) -> None:
    output_file.write_bytes(pattern(0, 4 * MIB))
    slow = output_reader.stream(output_file, start=Start(), follow=True, final_size=running())
    first = await anext(slow)
    final = finished(4 * MIB)
    others = [Follower(output_reader, output_file, final) for _ in range(5)]
    for other in others:
        await other.done()
    assert first.data == pattern(0, 256 * 1024)
    await slow.aclose()


async def test_others_run_between_chunks(output_reader: OutputReader, output_file: Path) -> None:
    output_file.write_bytes(b"x" * 8 * MIB)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    counting = asyncio.create_task(count())
    await asyncio.sleep(0)
    chunks = await collect(output_reader.stream(output_file, start=Start(), follow=False, final_size=finished(8 * MIB)))
    counting.cancel()
    assert turns >= len(chunks) == 32


async def test_idle_followers_cost_nothing(output_reader: OutputReader, output_folder: Path) -> None:
    final = running()
    paths = [output_folder / f"{n}.out" for n in range(10)]
    followers = [Follower(output_reader, path, final) for path in paths for _ in range(10)]
    for path in paths[:5]:
        path.touch()
    await asyncio.sleep(0.5)
    with counted_turns() as turns:
        await asyncio.sleep(1.0)
    assert len(turns) < 10
    final.set_result(0)
    for follower in followers:
        await follower.done()


async def test_flood_of_single_bytes_is_batched(output_reader: OutputReader, output_file: Path) -> None:
    child = writer(output_file, PATTERN, 200_000, 1, 0)
    final = running()
    follower = Follower(output_reader, output_file, final)
    await asyncio.to_thread(child.wait)
    final.set_result(200_000)
    await follower.done()
    assert follower.data == pattern(0, 200_000)
    print(f"200,000 writes came as {len(follower.chunks)} chunks")
    assert len(follower.chunks) < 10_000


async def test_many_followers_some_leave(output_reader: OutputReader, output_file: Path) -> None:
    total = 8 * MIB
    child = writer(output_file, PATTERN, total, 40_000, 0.002)
    final = running()
    rng = random.Random(3)
    followers = [Follower(output_reader, output_file, final) for _ in range(200)]
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


async def test_resume_where_another_left(output_reader: OutputReader, output_file: Path) -> None:
    total = 2 * MIB
    child = writer(output_file, PATTERN, total, 10_000, 0.001)
    final = running()

    async def end() -> None:
        await asyncio.to_thread(child.wait)
        final.set_result(total)

    ending = asyncio.create_task(end())
    rng = random.Random(5)
    received = b""
    while len(received) < total:
        stream = output_reader.stream(output_file, start=Start(len(received)), follow=True, final_size=final)
        for _ in range(rng.randrange(1, 10)):
            if (chunk := await anext(stream, None)) is not None:
                received += chunk.data
        await stream.aclose()
    await ending
    assert received == pattern(0, total)


async def test_each_write_wakes_its_follower(output_reader: OutputReader, output_folder: Path) -> None:
    path = output_folder / "woken.out"
    path.touch()
    follower = output_reader.stream(path, start=Start(), follow=True, final_size=running())
    for number in range(50):
        task = asyncio.ensure_future(anext(follower))
        await asyncio.sleep(0)
        append(path, bytes([number]))
        async with asyncio.timeout(PATIENCE_S):
            assert (await task).data == bytes([number])
    await follower.aclose()
