"""A state directory is told from its copies, and its disk may be found under another number: queued jobs are kept."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.support import programs
from tests.support.waiting import eventually_sync
from tests.support.workers import PATIENCE_S, SupervisorProcess
from worker_svc.job import Outcome
from worker_svc.record.paths import STORE_NAME

_ORIGINAL = "the state directory was copied or moved here"


@contextmanager
def mounted(image: Path, at: Path, *options: str) -> Iterator[Path]:
    at.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-o", ",".join(["loop", *options]), image, at], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no image can be mounted here: {done.stderr.decode().strip()}")
    try:
        yield at
    finally:
        eventually_sync(lambda: not subprocess.run(["umount", at], check=False).returncode, PATIENCE_S)


def leave_a_queued_job(state: Path, marks: Path) -> None:
    """Killed with one job running, which ends, and one queued."""
    with SupervisorProcess(state, slots=1) as supervisor:
        supervisor.run("running", programs.SLEEP)
        supervisor.run("queued", ["sh", "-c", f"echo ran >>{marks}"])
        supervisor.kill()


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_disk_that_is_found_under_another_number(tmp_path: Path, kind: str) -> None:
    if not shutil.which(f"mkfs.{kind}"):
        pytest.skip(f"there is no mkfs.{kind}")
    image, copied, marks = tmp_path / "image", tmp_path / "copied", tmp_path / "marks"
    with image.open("wb") as file:
        file.truncate(400 * 1024 * 1024)
    subprocess.run([f"mkfs.{kind}", "-q", image], check=True)
    with mounted(image, tmp_path / "disk") as disk:
        leave_a_queued_job(disk / "state", marks)
        number = disk.stat().st_dev
    subprocess.run(["cp", "--sparse=always", image, copied], check=True)
    options = ["nouuid"] if kind == "xfs" else []
    # The first free loop device is another one now.
    with mounted(copied, tmp_path / "snapshot", *options) as snapshot, mounted(image, tmp_path / "disk") as disk:
        assert disk.stat().st_dev != number
        with SupervisorProcess(disk / "state") as supervisor:
            assert supervisor.wait_finished("queued").outcome is Outcome.SUCCEEDED
            # The copy of a whole disk, as if it were made just now, when both jobs were still to be run.
            with closing(sqlite3.connect(snapshot / "state" / STORE_NAME)) as db, db:
                identity = (supervisor_meta(disk / "state"),)
                db.execute("INSERT OR REPLACE INTO meta VALUES ('original', ?)", identity)
            with SupervisorProcess(snapshot / "state") as other:
                record = other.wait_finished("queued")
                assert (record.outcome, _ORIGINAL in record.reason) == (Outcome.LOST, True)
    assert marks.read_text() == "ran\n"


def supervisor_meta(state: Path) -> str:
    with closing(sqlite3.connect(state / STORE_NAME)) as db:
        return str(db.execute("SELECT value FROM meta WHERE key = 'original'").fetchone()[0])


@pytest.mark.parametrize("how", ["cp -a", "moved into"])
def test_a_copy_on_the_same_disk(tmp_path: Path, how: str) -> None:
    leave_a_queued_job(tmp_path / "state", tmp_path / "marks")
    if how == "cp -a":
        subprocess.run(["cp", "-a", tmp_path / "state", tmp_path / "copied"], check=True)
    else:
        (tmp_path / "copied").mkdir(mode=0o700)
        for path in (tmp_path / "state").iterdir():
            path.rename(tmp_path / "copied" / path.name)
    with SupervisorProcess(tmp_path / "copied") as supervisor:
        record = supervisor.wait_finished("queued")
        assert (record.outcome, _ORIGINAL in record.reason) == (Outcome.LOST, True)
    assert not (tmp_path / "marks").exists()


def test_one_that_was_renamed_is_itself(tmp_path: Path) -> None:
    leave_a_queued_job(tmp_path / "state", tmp_path / "marks")
    (tmp_path / "state").rename(tmp_path / "renamed")
    with SupervisorProcess(tmp_path / "renamed") as supervisor:
        assert supervisor.wait_finished("queued").outcome is Outcome.SUCCEEDED


@pytest.mark.parametrize("inode_off_by, outcome", [(0, Outcome.SUCCEEDED), (1, Outcome.LOST)])
def test_a_store_of_before(tmp_path: Path, inode_off_by: int, outcome: Outcome) -> None:
    """Version 0.1 noted machine, file system and inode."""
    state = tmp_path / "state"
    leave_a_queued_job(state, tmp_path / "marks")
    kept = json.loads(supervisor_meta(state))
    with closing(sqlite3.connect(state / STORE_NAME)) as db, db:
        db.execute("DELETE FROM meta WHERE key = 'original'")
        text = f"{kept['machine']}:{os.statvfs(state).f_fsid}:{kept['inode'] + inode_off_by}"
        db.execute("INSERT INTO meta VALUES ('directory', ?)", (text,))
    with SupervisorProcess(state) as supervisor:
        assert supervisor.wait_finished("queued").outcome is outcome
