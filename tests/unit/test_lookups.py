"""Look-ups that hang: whom they hold up, and what is said of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from tests.support.waiting import eventually
from worker_svc.access.policy import LookupThreads
from worker_svc.job import Unavailable

PATIENCE_S = 0.5


@pytest.fixture
def dead() -> Iterator[threading.Event]:
    """A file system that answers when it is set."""
    event = threading.Event()
    yield event
    event.set()


async def said(lookups: LookupThreads, identity: str, look: threading.Event) -> str:
    with pytest.raises(Unavailable) as caught:
        await lookups.run(identity, f"/dead/{identity}", look.wait)
    return caught.value.message


async def quick(lookups: LookupThreads, identity: str) -> None:
    assert await lookups.run(identity, "x", lambda: 7) == 7


async def test_what_it_finds_or_fails_with() -> None:
    def fail() -> None:
        raise ValueError("as it is")

    lookups = LookupThreads()
    assert await lookups.run("red", "x", lambda: 7) == 7
    with pytest.raises(ValueError, match="as it is"):
        await lookups.run("red", "x", fail)
    assert not lookups._callers


async def test_who_hangs_holds_up_nobody_else(dead: threading.Event) -> None:
    lookups = LookupThreads(patience_s=PATIENCE_S)
    hanging = [asyncio.create_task(said(lookups, "red", dead)) for _ in range(50)]
    await asyncio.sleep(0)
    for _ in range(20):
        await quick(lookups, "blue")
    texts = await asyncio.gather(*hanging)
    answer = f"command: the file system has not answered for {PATIENCE_S:g} s about /dead/red, its script or its cwd: "
    earlier = "command: cannot be looked at while earlier starts of yours wait for a file system that does not answer"
    assert sum(text.startswith(answer) for text in texts) == 4
    assert sum(text.startswith(earlier) for text in texts) == 46
    # From now on it is told at once.
    assert await said(lookups, "red", dead) == f"{earlier}, such as that of /dead/red"
    # And when the file system is back, so is red.
    dead.set()
    await eventually(lambda: not lookups._callers)
    await quick(lookups, "red")


async def test_hanging_look_ups_make_room_for_those_of_others(dead: threading.Event) -> None:
    lookups = LookupThreads(at_once=2, of_each=1, patience_s=PATIENCE_S)
    await asyncio.gather(*(said(lookups, name, dead) for name in "ab"))
    await asyncio.gather(*(said(lookups, name, dead) for name in "cd"))
    await quick(lookups, "e")
    # While there is none, it is the others' doing, and that is what is said.
    full = [asyncio.create_task(said(lookups, name, dead)) for name in "fg"]
    await asyncio.sleep(PATIENCE_S / 2)
    waiting = asyncio.create_task(said(lookups, "h", dead))
    await quick(lookups, "i")
    waiting.cancel()
    await asyncio.gather(*full)


async def test_there_is_an_end_to_threads(dead: threading.Event) -> None:
    lookups = LookupThreads(threads=3, patience_s=PATIENCE_S)
    await asyncio.gather(*(said(lookups, name, dead) for name in "abc"))
    text = await said(lookups, "d", dead)
    assert text == "command: cannot be looked at now: too many look-ups of others are under way: try again"
    dead.set()
    await eventually(lambda: not lookups._callers)
    await quick(lookups, "d")


async def test_who_leaves_leaves_the_thread_counted(dead: threading.Event) -> None:
    """Cancelling the call, as by its deadline, must not make room for one more thread."""
    lookups = LookupThreads(patience_s=PATIENCE_S)
    before = {*threading.enumerate()}
    for _ in range(20):
        call = asyncio.create_task(said(lookups, "red", dead))
        await asyncio.sleep(0.005)
        call.cancel()
    assert len({*threading.enumerate()} - before) == 4  # others, of earlier tests, may end meanwhile
    await quick(lookups, "blue")
