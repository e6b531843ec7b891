"""Names that are no UTF-8, texts without end, clocks that were set wrong, records that are spoilt: they end no
supervisor, and no job but the one that they are about."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support import programs
from tests.support.programs import children_of
from tests.support.spawning import needs_root
from tests.support.supervised import with_code
from tests.support.waiting import eventually_sync
from tests.support.workers import PATIENCE_S, Refused, SupervisorProcess
from worker_svc.job import JobState, Outcome

ODD = "caf\udce9"  # b"caf\xe9", as Python keeps it


@pytest.mark.parametrize(
    "argv, fields, told",
    [
        (["nosuch"], {"env": {"PATH": f"/opt/{ODD}"}}, "not found in the job's PATH"),
        ([f"/no/{ODD}"], {}, "no such file"),
        (["true"], {"cwd": f"/no/{ODD}"}, "no such file"),
        (["true"], {"identity": {"user": ODD}}, r"no user 'caf\udce9'"),
        (["true"], {"sandbox": {"read_only_paths": [f"/no/{ODD}"]}}, "no such file"),
        (["true"], {"checked": [["command", f"/no/{ODD}", 1, 1, 1]]}, "no such file"),
    ],
)
def test_a_refusal_that_quotes_bytes_which_are_no_text(
    supervisor: SupervisorProcess, argv: list[str], fields: dict[str, Any], told: str
) -> None:
    supervisor.run("other", programs.SLEEP)
    with pytest.raises(Refused) as refused:
        supervisor.run("j", argv, **fields)
    record = supervisor.record("j")
    assert record.outcome is Outcome.START_FAILED
    assert told in record.reason
    assert refused.value.text == record.reason
    assert supervisor.record("other").state is JobState.RUNNING
    assert "fault" not in supervisor.log()


def test_a_script_and_a_directory_whose_names_are_no_text(supervisor: SupervisorProcess, tmp_path: Path) -> None:
    folder = tmp_path / ODD
    folder.mkdir()
    (folder / ODD).write_bytes(b"#!/bin/sh\npwd\n")
    (folder / ODD).chmod(0o755)
    assert supervisor.finish("j", [str(folder / ODD), ODD], cwd=str(folder), env={ODD: ODD}).exit_code == 0
    assert supervisor.output("j") == os.fsencode(folder) + b"\n"


def test_a_reason_without_end_is_shortened(supervisor: SupervisorProcess) -> None:
    with pytest.raises(Refused) as refused:
        supervisor.run("j", ["true"], cwd="/" + "é" * 60_000)
    assert len(refused.value.text.encode()) <= 2048
    assert refused.value.text.startswith("cwd: /é")
    assert refused.value.text.endswith("file name too long")
    assert supervisor.record("j").reason == refused.value.text


def test_a_spoilt_record_of_one_job_keeps_no_supervisor_from_the_others(tmp_path: Path) -> None:
    supervisor = SupervisorProcess(tmp_path / "state", slots=3)
    with supervisor:
        for job_id in ("good", "bad", "queued"):
            supervisor.run(job_id, programs.until_exists(tmp_path / "go", 3))
        supervisor.run("bad-queued", programs.TRUE)
        supervisor.kill()
        with closing(sqlite3.connect(supervisor.path / "jobs.sqlite3")) as db, db:
            for job_id, spec in (("bad", {"command": "sh", "field_of_the_future": 1}), ("bad-queued", ["no object"])):
                db.execute("UPDATE jobs SET spec = ? WHERE job_id = ?", (json.dumps(spec), job_id))
        supervisor.start()
        ended = eventually_sync(lambda: [one for one in supervisor.events() if one.job_id == "bad" and one.outcome])
        assert ended[0].outcome is Outcome.LOST
        assert "field_of_the_future" in ended[0].reason
        (tmp_path / "go").touch()
        assert supervisor.wait_finished("good").exit_code == 3
        ended = eventually_sync(
            lambda: [one for one in supervisor.events() if one.job_id == "bad-queued" and one.outcome], PATIENCE_S
        )
        assert ended[0].outcome is Outcome.START_FAILED
        assert supervisor.finish("after", programs.exits(4)).exit_code == 4


def with_clock(tmp_path: Path, now_ns: str) -> SupervisorProcess:
    """One for which the wall clock is what this expression says."""
    return with_code(tmp_path, f"real_ns = time.time_ns\ntime.time_ns = lambda: {now_ns}")


_IS_BAD = 'getattr(getattr(one, "job", one), "job_id", "") == "bad"'
_FAILS_FOR_BAD = f"""
import importlib
def fail(module, name, method):
    kind = getattr(importlib.import_module("worker_svc.supervisor." + module), name)
    real = getattr(kind, method)
    def odd(self, *args, **named):
        if any({_IS_BAD} for one in (self, *args)):
            raise LookupError("as no job of ours does")
        return real(self, *args, **named)
    setattr(kind, method, odd)
"""


@pytest.mark.parametrize(
    "where, outcome",
    [
        (("life.starting", "Starting", "_prepare"), Outcome.START_FAILED),
        (("life.process", "Process", "watch"), Outcome.LOST),
        (("life.process", "Process", "on_pidfd"), Outcome.LOST),
        (("containment", "Containment", "usage"), Outcome.LOST),
        (("ledger", "Ledger", "_write"), Outcome.LOST),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_a_fault_with_one_job_ends_that_job(tmp_path: Path, where: tuple[str, str, str], outcome: Outcome) -> None:
    code = f"{_FAILS_FOR_BAD}\nfail{where!r}"
    if where[-1] == "_write":  # of all that is recorded of it, how its process came to be
        code = code.replace(_IS_BAD, 'getattr(one, "changes", {}).get("pid") and one.job.job_id == "bad"')
    supervisor = with_code(tmp_path, code)
    with supervisor:
        supervisor.run("other", programs.until_exists(tmp_path / "go", 3))
        with suppress(Refused):
            supervisor.run("bad", programs.exits(4))
        record = supervisor.wait_finished("bad")
        assert record.outcome is outcome
        assert "as no job of ours does" in record.reason
        (tmp_path / "go").touch()
        assert supervisor.wait_finished("other").exit_code == 3
        assert supervisor.finish("after", programs.exits(5)).exit_code == 5
        assert supervisor.client.ask("status")["running"] == 0
        assert supervisor.process is not None
        assert supervisor.process.poll() is None
        eventually_sync(lambda: not children_of(supervisor.pid), PATIENCE_S, "something of it is left")


@needs_root
def test_a_mount_whose_name_is_no_text(tmp_path: Path) -> None:
    """As anybody can bring one about: by a USB stick."""
    folder = tmp_path / ODD
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", os.fsencode(folder)], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        with SupervisorProcess(tmp_path / "state") as supervisor:
            assert supervisor.finish("j", programs.exits(3)).exit_code == 3
    finally:
        subprocess.run(["umount", os.fsencode(folder)], check=True)


@pytest.mark.parametrize("years", [10, -10, 1000])
def test_a_clock_that_is_set_makes_no_job_older(tmp_path: Path, years: int) -> None:
    """Nor those that finish afterwards, or once it is set back; and what is the oldest stays so."""
    jump = tmp_path / "jump"
    jump.write_text("0")
    supervisor = with_clock(tmp_path, f"real_ns() + int(open({str(jump)!r}).read())")
    with supervisor:
        for job_id, offset_ns in (("before", 0), ("after", years * 365 * 86400 * 10**9), ("back", 0)):
            jump.write_text(str(offset_ns))
            assert supervisor.finish(job_id, programs.exits(3)).exit_code == 3
            # Whoever greets it with other settings has it look at what there is too much of.
            supervisor.settings["slots"] = 100 + len(supervisor.events())
            supervisor.connect().close()
        for job_id in ("before", "after", "back"):
            assert supervisor.record(job_id).state is JobState.FINISHED
        supervisor.settings["keep_jobs"] = 1
        supervisor.connect().close()
        with supervisor.reader() as reader:
            eventually_sync(lambda: reader.get("after") is None, PATIENCE_S)
            assert reader.get("before") is None
            assert reader.get("back") is not None


@pytest.mark.parametrize("moment_ns", [2**63, 10**20, 0])
def test_a_clock_that_no_record_can_hold(tmp_path: Path, moment_ns: int) -> None:
    """As of the year 2262, or long ago."""
    supervisor = with_clock(tmp_path, str(moment_ns))
    with supervisor:
        supervisor.run("stopped", programs.SLEEP)
        supervisor.client.ask("stop", job_id="stopped", signal=None, grace_s=None)
        assert supervisor.finish("j", programs.exits(3)).exit_code == 3
        record = supervisor.wait_finished("stopped")
        assert record.outcome is Outcome.STOPPED
        assert record.finished_ns == min(moment_ns, 2**63 - 1)
        assert record.wall_ns is not None
        assert 0 <= record.wall_ns < 10**12
