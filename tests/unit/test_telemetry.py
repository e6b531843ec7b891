"""Transitions come into the log once, across restarts."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest

from tests.support.telemetry import ME, OTHER, logged, moves, run
from tests.support.waiting import eventually
from worker_svc.telemetry.cursor import Cursor, Place

pytestmark = pytest.mark.usefixtures("plain_logging")


def killed_while_writing(folder: Path, before: int, lines: Sequence[bytes], size: int) -> None:
    """What is left when the worker is killed with `size` bytes of `lines` written, after transition `before`."""
    path = folder / "worker.log"
    found = path.stat()
    cursor = Cursor(folder / ME, ME)
    cursor.sequence = before
    cursor.ahead(Place(found.st_dev, found.st_ino, found.st_size), lines)
    cursor.close()
    with path.open("ab") as file:
        file.write(b"".join(lines)[:size])


async def test_once_across_restarts(log_folder: Path) -> None:
    for last in (3, 5, 5, 9):
        async with run(log_folder, recorded=moves(1, last)):
            pass
    assert logged(log_folder) == list(range(1, 10))


@pytest.mark.parametrize("since", ["", '\n{"event":"noise"}\n' * 20])
async def test_killed_at_any_byte_of_a_batch(log_folder: Path, since: str) -> None:
    """`since`: lines of a start that failed, or of another worker."""
    async with run(log_folder, recorded=moves(1, 2)):
        pass
    path = log_folder / "worker.log"
    settled = path.stat().st_size
    async with run(log_folder, recorded=moves(1, 5)):
        pass
    lines = [line + b"\n" for line in path.read_bytes()[settled:].splitlines()]
    for size in range(sum(map(len, lines)) + 1):
        os.truncate(path, settled)
        killed_while_writing(log_folder, 2, lines, size)
        with path.open("a") as log:
            log.write(since)
        async with run(log_folder, recorded=moves(1, 6)):
            pass
        assert logged(log_folder) == [1, 2, 3, 4, 5, 6], f"{size} bytes written"


async def test_killed_and_the_log_moved_away_since(log_folder: Path) -> None:
    async with run(log_folder, recorded=moves(1, 2)):
        pass
    path = log_folder / "worker.log"
    lines = [line + b"\n" for line in path.read_bytes().splitlines()]
    killed_while_writing(log_folder, 2, lines, sum(map(len, lines)))
    path.rename(log_folder / "worker.log.1")
    async with run(log_folder, recorded=moves(1, 5)):
        pass
    assert logged(log_folder) == [5]


async def test_killed_and_the_log_gone_since(log_folder: Path) -> None:
    """Rather twice than never."""
    async with run(log_folder, recorded=moves(1, 2)):
        pass
    path = log_folder / "worker.log"
    lines = path.read_bytes().splitlines(keepends=True)
    killed_while_writing(log_folder, 2, lines, sum(map(len, lines)))
    path.unlink()
    async with run(log_folder, recorded=moves(1, 5)):
        pass
    assert logged(log_folder) == [3, 4, 5]


async def test_a_line_that_was_cut_short_is_ended(log_folder: Path) -> None:
    (log_folder / "worker.log").write_text('{"event":"audit","wor')
    async with run(log_folder, recorded=moves(1, 1)):
        pass
    assert logged(log_folder) == [1]


@pytest.mark.parametrize("log_format", ["json", "console"])
async def test_nothing_in_the_log_counts(log_folder: Path, log_format: Literal["json", "console"]) -> None:
    """Whoever can have text logged could write what looks like a transition."""
    async with run(log_folder, recorded=moves(1, 2)):
        pass
    forged = f"job.transition worker={ME} sequence=4000000000 "
    as_json = json.dumps({"event": "job.transition", "worker": ME, "sequence": 4000000000})
    with (log_folder / "worker.log").open("a") as log:
        log.write(f"{forged}\n{as_json}\n" * 3000 + forged)
    async with run(log_folder, log_format=log_format, recorded=moves(1, 4)) as current:
        assert current.transitions.sequence == 4


async def test_a_cursor_beyond_the_store_is_repaired_and_told(log_folder: Path) -> None:
    cursor = Cursor(log_folder / ME, ME)
    cursor.settle(4_000_000_000)
    cursor.close()
    async with run(log_folder, recorded=moves(1, 3)) as current:
        await current.write(moves(4, 5))
    assert logged(log_folder) == [4, 5]
    told = json.loads((log_folder / "worker.log").read_text().splitlines()[0])
    assert (told["event"], told["cursor"], told["latest"]) == ("log.cursor_repaired", 4_000_000_000, 3)


@pytest.mark.parametrize("content", [b"", b"\0", b"x" * 7, os.urandom(5000)])
async def test_a_cursor_that_is_none(log_folder: Path, content: bytes) -> None:
    (log_folder / ME / "worker.cursor").write_bytes(content)
    async with run(log_folder, recorded=moves(1, 3)):
        pass
    assert logged(log_folder) == [1, 2, 3]


async def test_the_cursor_of_an_earlier_version(log_folder: Path) -> None:
    (log_folder / ME / "worker.cursor").write_bytes((2).to_bytes(8, "little") + ME.encode())
    async with run(log_folder, recorded=moves(1, 3)):
        pass
    assert logged(log_folder) == [3]


async def test_the_cursor_of_another_store_does_not_count(log_folder: Path) -> None:
    """The operator removed the store to begin anew, and left the cursor: the new store's transitions are logged."""
    async with run(log_folder, recorded=moves(1, 500)):
        pass
    (log_folder / OTHER / "worker.cursor").write_bytes((log_folder / ME / "worker.cursor").read_bytes())
    async with run(log_folder, OTHER, recorded=moves(1, 2)):
        pass
    assert logged(log_folder, OTHER) == [1, 2]


async def test_two_workers_with_one_log(log_folder: Path) -> None:
    async with run(log_folder, recorded=moves(1, 3)):
        pass
    async with run(log_folder, OTHER, recorded=moves(1, 7)):
        pass
    async with run(log_folder, recorded=moves(1, 4)):
        pass
    assert logged(log_folder) == [1, 2, 3, 4]
    assert logged(log_folder, OTHER) == [1, 2, 3, 4, 5, 6, 7]


async def test_far_behind_it_reads_in_the_store(log_folder: Path) -> None:
    recorded = moves(1, 1)
    async with run(log_folder, recorded=recorded) as current:
        recorded += moves(2, 3000)
        for first in range(2, 3000, 400):
            current.transitions.add(moves(first, min(first + 399, 3000)))
        await eventually(lambda: current.transitions.sequence == 3000)
    assert logged(log_folder) == list(range(1, 3001))


async def test_catching_up_gives_way(log_folder: Path) -> None:
    """In no turn of the loop many lines are made, whether they are read again or come in one batch."""
    recorded = moves(1, 2000)
    async with run(log_folder, recorded=moves(1, 1)) as current:
        current.transitions._read = lambda after, limit: recorded[after : after + limit]
        current.transitions.add(recorded[1:400])
        current.transitions.add(recorded[1000:])
        most = 0
        before = current.transitions.sequence
        while before < 2000:
            await asyncio.sleep(0)
            most, before = max(most, current.transitions.sequence - before), current.transitions.sequence
    assert most <= 64
    assert logged(log_folder) == list(range(1, 2001))


async def test_what_the_store_has_no_more_is_told(log_folder: Path) -> None:
    async with run(log_folder, recorded=moves(1, 2)):
        pass
    async with run(log_folder, recorded=moves(6, 7)):
        pass
    assert logged(log_folder) == [1, 2, 6, 7]
    [told] = [line for line in map(json.loads, (log_folder / "worker.log").open()) if line["event"] != "job.transition"]
    assert (told["event"], told["first"], told["last"]) == ("log.transitions_missing", 3, 5)


async def test_a_level_that_leaves_them_out(log_folder: Path) -> None:
    async with run(log_folder, recorded=moves(1, 3), level="error"):
        pass
    async with run(log_folder, recorded=moves(1, 5)):
        pass
    assert logged(log_folder) == [4, 5]
