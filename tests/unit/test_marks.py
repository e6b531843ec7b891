"""The marks of jobs' processes: made by who has the secret, and by nobody else."""

from __future__ import annotations

import pytest

from worker_svc.supervisor.containment.marks import Marks

MARKS = Marks("feed", b"secret")


@pytest.mark.parametrize("job_id", ["j", "a-b-c", "0-0-0", "x" * 128])
def test_a_mark_is_read_back_and_is_the_same_in_the_next_supervisor(job_id: str) -> None:
    mark = MARKS.of(job_id, 1_700_000_000_000_000_000)
    assert MARKS.read(mark) == (job_id, 1_700_000_000_000_000_000)
    assert Marks("feed", b"secret").of(job_id, 1_700_000_000_000_000_000) == mark
    assert len(mark.partition("-")[0]) == 32


def test_it_tells_apart_jobs_states_and_secrets() -> None:
    made = {marks.of(job_id, at) for marks in (MARKS, Marks("fed", b"secret"), Marks("feed", b"Secret"))
            for job_id in ("a", "b") for at in (1, 2)}  # fmt: skip
    assert len({mark.partition("-")[0] for mark in made}) == 12
    assert sum(MARKS.read(mark) is not None for mark in made) == 4


@pytest.mark.parametrize("mark", ["", "-", "--", "x", "0-1", "0-1-a", "-1-a", "0-x-a", f"{'0' * 32}-1-a", "0-1-\udcff"])
def test_what_does_not_verify_is_no_mark(mark: str) -> None:
    assert MARKS.read(mark) is None


def test_a_changed_mark_does_not_verify() -> None:
    mark = MARKS.of("victim", 7)
    for at in range(len(mark)):
        assert MARKS.read(f"{mark[:at]}{chr(ord(mark[at]) ^ 1)}{mark[at + 1 :]}") is None
    assert "secret" not in repr(MARKS)
