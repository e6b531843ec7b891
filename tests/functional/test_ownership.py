"""The supervisor looks whose job it is as well: by then it may be another one than the worker has seen."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support import programs
from tests.support.workers import Refused, SupervisorProcess, start_fields

RED, BLUE = "dns:red", "dns:blue"


def start(supervisor: SupervisorProcess, job_id: str, argv: list[str], owner: str) -> dict[str, Any]:
    return supervisor.client.ask("start", owner=owner, **start_fields(job_id, argv, fingerprint="f"))


def test_no_request_reaches_another_owners_job(supervisor: SupervisorProcess) -> None:
    start(supervisor, "j", programs.SLEEP, RED)
    requests: dict[str, dict[str, Any]] = {"stop": {}, "signal": {"signal": 9}, "pause": {}, "resume": {}, "delete": {}}
    for op, fields in requests.items():
        for job_id in ("j", "none"):
            with pytest.raises(Refused, match=r"^not_found: job not found$"):
                supervisor.client.ask(op, job_id=job_id, owner=BLUE, **fields)
    supervisor.client.ask("stop", job_id="j", owner=RED)
    supervisor.wait_finished("j")
    with pytest.raises(Refused, match="not_found"):
        supervisor.client.ask("delete", job_id="j", owner=BLUE)
    supervisor.client.ask("delete", job_id="j", owner=RED)


def test_an_id_belongs_to_its_owner(supervisor: SupervisorProcess) -> None:
    start(supervisor, "j", programs.SLEEP, RED)
    for _ in range(2):
        with pytest.raises(Refused, match=r"^exists: job_id: belongs to a job with another spec"):
            start(supervisor, "j", programs.SLEEP, BLUE)
        assert start(supervisor, "j", programs.SLEEP, RED)["existed"]
        supervisor.client.ask("stop", job_id="j")
        supervisor.wait_finished("j")


def test_owners_outlive_the_supervisor(supervisor: SupervisorProcess) -> None:
    start(supervisor, "j", programs.SLEEP, RED)
    supervisor.kill()
    supervisor.start()
    with pytest.raises(Refused, match="not_found"):
        supervisor.client.ask("stop", job_id="j", owner=BLUE)
    supervisor.client.ask("stop", job_id="j", owner=RED)
    assert supervisor.wait_finished("j").owner == RED
    assert {moved.owner for moved in supervisor.events()} == {RED}
