"""A full disk, and what deleting leaves."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support import programs
from tests.support.waiting import eventually_sync
from tests.support.workers import (
    PATIENCE_S,
    Refused,
    SupervisorProcess,
    start_fields,
)
from worker_svc.job import JobRecord, JobState, Outcome

# A full disk


def fill(disk: Path) -> Path:
    """Leaves not a byte free; returns the file to remove to have space again."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert os.statvfs(disk).f_bavail == 0
    return filler


def test_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    with SupervisorProcess(small_disk / "state") as supervisor:
        supervisor.run("exits", programs.until_exists(tmp_path / "go", 3))
        supervisor.run("stopped", programs.SLEEP)
        stopped_pid = supervisor.record("stopped").pid
        exits_pid = supervisor.record("exits").pid
        filler = fill(small_disk)

        with pytest.raises(Refused) as caught:
            supervisor.run("refused", programs.TRUE)
        assert caught.value.code == "exhausted"
        assert "full" in caught.value.text

        # What ends meanwhile is not lost, what is to be stopped stops.
        (tmp_path / "go").touch()
        eventually_sync(lambda: not programs.state_of(exits_pid), PATIENCE_S, "it was not reaped")
        stop = supervisor.client.send("stop", job_id="stopped")
        eventually_sync(lambda: not programs.state_of(stopped_pid), PATIENCE_S, "it was not stopped")
        assert supervisor.record("exits").state is JobState.RUNNING  # on record
        with pytest.raises(Refused, match="exhausted"):
            supervisor.run("refused", programs.TRUE)
        assert supervisor.client.ask("status")["running"] == 0

        filler.unlink()
        supervisor.client.answer(stop)
        assert supervisor.wait_finished("exits").exit_code == 3
        assert supervisor.wait_finished("stopped").outcome is Outcome.STOPPED
        assert supervisor.finish("refused", programs.TRUE).outcome is Outcome.SUCCEEDED
        assert [event.sequence for event in supervisor.events()] == list(range(1, len(supervisor.events()) + 1))


@pytest.mark.parametrize("slots", [1, 0], ids=["in a slot", "in the queue"])
def test_a_start_that_cannot_be_recorded_and_is_stopped_in_the_same_turn(small_disk: Path, slots: int) -> None:
    with SupervisorProcess(small_disk / "state", slots=slots) as supervisor:
        client = supervisor.client
        filler = fill(small_disk)
        start, first = client.frame("start", **start_fields("j", programs.SLEEP))
        stop, second = client.frame("stop", job_id="j")
        client.send_bytes(first + second)
        with pytest.raises(Refused, match="exhausted"):
            client.answer(start)
        status = client.ask("status")
        assert (status["running"], status["queued"]) == (0, 0)
        filler.unlink()
        client.answer(stop)
        status = client.ask("status")
        assert (status["running"], status["queued"]) == (0, 0)
        client.hello(slots=1)
        assert supervisor.finish("j", programs.exits(3)).exit_code == 3


def test_a_supervisor_starts_on_a_full_disk(small_disk: Path) -> None:
    """Or jobs that run could neither be seen nor stopped, until somebody has made space."""
    with SupervisorProcess(small_disk / "state") as supervisor:
        supervisor.run("j", programs.SLEEP)
        pid = supervisor.record("j").pid
        filler = fill(small_disk)
        supervisor.kill()
        supervisor.start()
        supervisor.client.send("stop", job_id="j")
        eventually_sync(lambda: not programs.state_of(pid), PATIENCE_S, "it was not stopped")
        filler.unlink()
        assert supervisor.wait_finished("j").outcome is Outcome.STOPPED


# Deleting


def test_delete(supervisor: SupervisorProcess, state: Path) -> None:
    supervisor.run("j", programs.SLEEP)
    with pytest.raises(Refused, match="precondition: the job is RUNNING"):
        supervisor.client.ask("delete", job_id="j")
    supervisor.client.ask("stop", job_id="j")
    supervisor.wait_finished("j")
    supervisor.client.ask("delete", job_id="j")
    with supervisor.reader() as reader:
        assert reader.get("j") is None
    eventually_sync(lambda: not list((state / "output").iterdir()), PATIENCE_S, "its output was left")
    with pytest.raises(Refused, match="not_found: job not found"):
        supervisor.client.ask("delete", job_id="j")
    assert len(supervisor.events()) == 4  # history has no gaps


def test_an_id_that_is_used_again_keeps_its_new_output(supervisor: SupervisorProcess) -> None:
    """The old output may be removed late, but never in place of the new one."""
    client = supervisor.client
    for turn in range(100):
        numbers = [client.send("delete", job_id="j")] if turn else []
        numbers.append(client.send("start", **start_fields("j", programs.echo(str(turn)), fingerprint=str(turn))))
        for number in numbers:
            with suppress(Refused):  # both in one turn: then the start finds the job that is being deleted
                client.answer(number)
        record = _record_or_none(supervisor, "j")
        if record is None or record.fingerprint != str(turn):
            client.ask("start", **start_fields("j", programs.echo(str(turn)), fingerprint=str(turn)))
        supervisor.wait_finished("j")
        assert supervisor.output("j") == str(turn).encode()


def _record_or_none(supervisor: SupervisorProcess, job_id: str) -> JobRecord | None:
    with supervisor.reader() as reader:
        return reader.get(job_id)
