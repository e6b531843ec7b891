"""Slots, the queue, and the same start asked for again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import programs
from tests.support.programs import children_of
from tests.support.supervised import with_slots
from tests.support.waiting import eventually_sync
from tests.support.workers import (
    PATIENCE_S,
    Refused,
    SocketClient,
    SupervisorProcess,
    hello_fields,
    start_fields,
)
from worker_svc.job import JobState, Outcome

# Slots and the queue


def test_slots_and_the_order_of_the_queue(state: Path, tmp_path: Path) -> None:
    with with_slots(state, 2) as supervisor:
        states = [supervisor.run(job_id, programs.until_exists(tmp_path / job_id))["state"] for job_id in "abcde"]
        assert states == [JobState.RUNNING] * 2 + [JobState.QUEUED] * 3
        status = supervisor.client.ask("status")
        assert (status["running"], status["queued"]) == (2, 3)
        (tmp_path / "b").touch()
        supervisor.wait_state("c", JobState.RUNNING)
        assert supervisor.record("d").state is JobState.QUEUED
        for job_id in "acde":
            (tmp_path / job_id).touch()
        for job_id in "abcde":
            assert supervisor.wait_finished(job_id).outcome is Outcome.SUCCEEDED
        events = supervisor.events()
        launched = [event.job_id for event in events if event.to_state is JobState.STARTING]
        assert launched == ["a", "b", "c", "d", "e"]
        assert all(event.queued_ns is not None for event in events if event.to_state is JobState.STARTING)
        running = 0
        for event in events:
            running += (event.to_state is JobState.STARTING) - (event.to_state is JobState.FINISHED)
            assert running <= 2


def test_above_the_queue_is_refused(state: Path) -> None:
    with with_slots(state, 1, 1) as supervisor:
        supervisor.run("a", programs.SLEEP)
        supervisor.run("b", programs.SLEEP)
        with pytest.raises(Refused, match=r"exhausted: .*jobs\.queue_length") as caught:
            supervisor.run("c", programs.SLEEP)
        assert caught.value.code == "exhausted"
        assert len(supervisor.events()) == 3  # of a and b; c left no trace
        assert supervisor.run("b", programs.SLEEP) == {"state": JobState.QUEUED, "existed": True}
        supervisor.client.ask("stop", job_id="b")
        assert supervisor.run("c", programs.SLEEP)["state"] == JobState.QUEUED


def test_no_queue_at_all(state: Path) -> None:
    with with_slots(state, 1, 0) as supervisor:
        supervisor.run("a", programs.SLEEP)
        with pytest.raises(Refused, match="exhausted"):
            supervisor.run("b", programs.SLEEP)
        supervisor.client.ask("stop", job_id="a")
        supervisor.wait_finished("a")
        assert supervisor.run("b", programs.TRUE)["state"] == JobState.RUNNING


def test_new_settings_hold_at_once(state: Path) -> None:
    with with_slots(state, 1) as supervisor:
        supervisor.run("a", programs.SLEEP)
        supervisor.run("b", programs.SLEEP)
        supervisor.client.hello(slots=2)
        supervisor.wait_state("b", JobState.RUNNING)
        supervisor.client.hello(slots=1)
        assert supervisor.run("c", programs.SLEEP)["state"] == JobState.QUEUED


def test_a_queued_job_that_cannot_start(state: Path) -> None:
    with with_slots(state, 1) as supervisor:
        supervisor.run("a", programs.SLEEP)
        supervisor.run("b", ["no-such-command"])
        supervisor.run("c", programs.TRUE)
        supervisor.client.ask("stop", job_id="a")
        record = supervisor.wait_finished("b")
        assert (record.outcome, record.pid) == (Outcome.START_FAILED, 0)
        assert record.reason.startswith("command: 'no-such-command' was not found")
        assert supervisor.wait_finished("c").outcome is Outcome.SUCCEEDED


def test_a_slot_that_falls_free_in_the_same_turn(state: Path, tmp_path: Path) -> None:
    """The answer is RUNNING or QUEUED, as the contract says, never STARTING."""
    with with_slots(state, 1) as supervisor:
        supervisor.run("a", programs.until_exists(tmp_path / "go"))
        with supervisor.paused():
            # The request is ready before the exit is, so that it finds no slot.
            number = supervisor.client.send("start", **start_fields("b", programs.SLEEP))
            (tmp_path / "go").touch()
            eventually_sync(lambda: programs.state_of(supervisor.record("a").pid) == "Z")
        answer = supervisor.client.answer(number)
        assert answer["existed"] is False
        assert JobState(answer["state"]) in (JobState.QUEUED, JobState.RUNNING)
        supervisor.wait_state("b", JobState.RUNNING)


# The same start again


def test_the_same_start_again(supervisor: SupervisorProcess) -> None:
    supervisor.run("j", programs.SLEEP, fingerprint="one")
    assert supervisor.run("j", programs.SLEEP, fingerprint="one") == {"state": JobState.RUNNING, "existed": True}
    with pytest.raises(Refused, match="exists: job_id"):
        supervisor.run("j", programs.SLEEP, fingerprint="two")
    supervisor.client.ask("stop", job_id="j")
    supervisor.wait_finished("j")
    assert supervisor.run("j", programs.SLEEP, fingerprint="one") == {"state": JobState.FINISHED, "existed": True}
    with pytest.raises(Refused, match="exists: job_id"):
        supervisor.run("j", programs.SLEEP, fingerprint="two")
    assert [event.to_state.name for event in supervisor.events()] == ["STARTING", "RUNNING", "STOPPING", "FINISHED"]


def test_the_same_start_of_one_that_could_not_start(supervisor: SupervisorProcess) -> None:
    texts = []
    for _ in range(2):
        with pytest.raises(Refused) as caught:
            supervisor.run("j", ["no-such-command"], fingerprint="one")
        assert caught.value.code == "precondition"
        texts.append(caught.value.text)
    assert texts[0] == texts[1] == supervisor.record("j").reason
    assert len(supervisor.events()) == 2


@pytest.mark.parametrize("argv", [programs.SLEEP, ["no-such-command"]], ids=["starts", "fails"])
def test_many_of_the_same_start_in_one_turn(supervisor: SupervisorProcess, argv: list[str]) -> None:
    clients = [supervisor.connect() for _ in range(3)]
    asked = []
    with supervisor.paused():
        for client in clients * 2:
            asked.append((client, client.send("start", **start_fields("j", argv, fingerprint="one"))))
        other = clients[0].send("start", **start_fields("j", argv, fingerprint="two"))
    with pytest.raises(Refused, match="exists"):
        clients[0].answer(other)
    answers: list[Any] = []
    for client, number in asked:
        try:
            answers.append(client.answer(number))
        except Refused as error:
            answers.append(error.code)
    if argv is programs.SLEEP:
        assert all(answer["state"] == JobState.RUNNING for answer in answers)
        assert [answer["existed"] for answer in answers].count(False) == 1
        assert len(children_of(supervisor.pid)) == 1
    else:
        assert answers == ["precondition"] * 6
    for client in clients:
        client.close()


def test_who_hangs_up_is_not_answered_and_the_job_runs(supervisor: SupervisorProcess) -> None:
    with supervisor.paused():
        client = SocketClient(supervisor.path)
        client.send("hello", **hello_fields(supervisor.path))
        client.send("start", **start_fields("j", programs.exits(3)))
        client.close()
    eventually_sync(lambda: supervisor.events(), PATIENCE_S)
    assert supervisor.wait_finished("j").exit_code == 3
