"""What a supervisor looks at for one job is that job's, and it looks once."""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support import programs
from tests.support.contained import contained, skip_unless
from tests.support.supervised import with_code
from worker_svc.job import JobState
from worker_svc.supervisor.containment import CGROUP

_NOTES_OPENS: Final = """
import os, threading
path = os.environ["OPENS"]
def hook(event, args):
    if event == "open" and threading.current_thread() is threading.main_thread():
        name = str(args[0]).rpartition("/")[2]
        if name in ("cgroup.events", "children"):
            with open(path, "a") as file:
                file.write(name + chr(10))
sys.addaudithook(hook)
"""


def test_an_exit_is_one_look_at_each_thing(tmp_path: Path) -> None:
    """Unless something of the job is left, or its exit is told before it has left its cgroup (Linux 6.19)."""
    skip_unless(CGROUP)
    opens = tmp_path / "opens"
    supervisor = with_code(tmp_path, _NOTES_OPENS.replace('os.environ["OPENS"]', repr(str(opens))))
    with supervisor:
        seen: list[list[str]] = []
        for number in range(5):
            supervisor.run(f"j{number}", programs.until_exists(tmp_path / f"go{number}", 3))
            supervisor.wait_state(f"j{number}", JobState.RUNNING)
            opens.write_text("")
            (tmp_path / f"go{number}").touch()
            assert supervisor.wait_finished(f"j{number}").exit_code == 3
            supervisor.client.ask("status")  # the turn is over
            seen.append(sorted(opens.read_text().split()))
    assert min(seen, key=len) == ["cgroup.events", "children"]


_listed: Final[list[str]] = []


def _note_listing(event: str, args: tuple[Any, ...]) -> None:
    if event in ("os.listdir", "os.scandir"):
        _listed.append(os.fsdecode(args[0]) if isinstance(args[0], str | bytes) else "")


@pytest.fixture(scope="module", autouse=True)
def listings() -> None:
    sys.addaudithook(_note_listing)


def test_the_groups_of_an_earlier_supervisor_are_listed_once_for_all_jobs() -> None:
    skip_unless(CGROUP)
    state_id = secrets.token_hex(8)
    counts = []
    for jobs in (2, 20):
        with contained(CGROUP, state_id) as earlier:
            made = [earlier.create(f"j{number}") for number in range(jobs)]
            _listed.clear()
            with contained(CGROUP, state_id, earlier.base_path) as containment:
                adopted = [containment.adopt(container.job_id) for container in made]
                assert [container.name for container in adopted] == [container.name for container in made]
                counts.append(_listed.count(containment.base_path))
    assert counts == [1, 1]
