"""Who comes next: the modest at once, the greedy one piece a turn."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from worker_svc.server.turns import TURN_PIECES, Turns

LONG_S = 0.02  # more than anybody has at once, and earns again meanwhile


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def pass_by(self) -> None:
        self.now_s += LONG_S


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def turns(clock: Clock) -> Turns:
    return Turns(clock)


def spend(turns: Turns, clock: Clock, client: str) -> None:
    """Until its share is used up."""
    turns.submit(client, clock.pass_by)


async def test_the_modest_are_served_at_once(turns: Turns) -> None:
    done = []
    turns.submit("a", lambda: done.append("a"))
    assert done == ["a"]


async def test_beyond_its_share_a_client_gets_a_few_pieces_of_work_done_a_turn(turns: Turns, clock: Clock) -> None:
    done = list[int]()
    spend(turns, clock, "greedy")
    for number in range(3 * TURN_PIECES):
        turns.submit("greedy", lambda number=number: done.append(number))  # type: ignore[misc]
    assert done == []
    for count in range(1, 4):
        await asyncio.sleep(0)
        assert done == list(range(count * TURN_PIECES))


async def test_a_piece_of_work_that_takes_long_has_a_turn_of_its_own(turns: Turns, clock: Clock) -> None:
    done = list[int]()

    def take_long(number: int) -> None:
        clock.pass_by()
        done.append(number)

    spend(turns, clock, "greedy")
    for number in range(3):
        turns.submit("greedy", partial(take_long, number))
    for count in range(1, 4):
        await asyncio.sleep(0)
        assert done == list(range(count))


async def test_others_pass_by_and_the_greedy_take_turns(turns: Turns, clock: Clock) -> None:
    done = list[str]()
    for client in "ab":
        spend(turns, clock, client)
        for _ in range(3):
            turns.submit(client, lambda client=client: done.append(client))  # type: ignore[misc]
    turns.submit("modest", lambda: done.append("modest"))
    for _ in range(6):
        await asyncio.sleep(0)
    assert done == ["modest", *"ababab"]


async def test_what_work_brings_about_waits_for_the_next_turn(turns: Turns) -> None:
    """Also of a client that is well within its share, or work could go on for ever."""
    done = list[str]()

    def first() -> None:
        turns.submit("a", lambda: done.append("second"))
        turns.submit("b", lambda: done.append("of another"))
        done.append("first")

    turns.submit("a", first)
    assert done == ["first"]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert done == ["first", "second", "of another"]


async def test_what_is_charged_counts(turns: Turns) -> None:
    done = list[str]()
    turns.charge("unknown", 1.0)
    turns.submit("a", lambda: None)
    turns.charge("a", LONG_S)
    turns.submit("a", lambda: done.append("later"))
    assert done == []
    await turns.wait("a")
    assert done == ["later"]


async def test_who_gave_up_waiting_does_no_harm(turns: Turns, clock: Clock) -> None:
    spend(turns, clock, "a")
    waiting = asyncio.create_task(turns.wait("a"))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await turns.wait("a")


async def test_the_quiet_are_forgotten(turns: Turns, clock: Clock) -> None:
    turns.submit("modest", lambda: None)
    spend(turns, clock, "greedy")
    turns.submit("greedy", lambda: None)
    turns.forget_quiet(clock() + 3600)
    assert len(turns) == 1  # what waits is not
    await asyncio.sleep(0)
    turns.forget_quiet(clock() + 3600)
    assert len(turns) == 0
