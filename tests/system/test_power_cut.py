"""Copies of the store at random moments under load: each must open, be whole, and know all that was answered.

What the disk holds after a power cut is what was last fsynced, and any part of what was written since. The supervisor
is the only writer, so with all of its threads stopped a copy of the database and its log (WAL) is one moment's. Then
* the end of the log that may not have been fsynced, the last transaction, is torn: cut off, or filled with noise;
* pages of the database that the log holds too are filled with noise: a checkpoint that was under way (SQLite has
  fsynced the log before it begins one, and the database before it uses the log anew, https://sqlite.org/wal.html).
The index (-shm) is not copied: it is rebuilt when nobody has the database open.
"""

from __future__ import annotations

import random
import shutil
import sqlite3
import struct
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support import programs
from tests.support.programs import status_field
from tests.support.waiting import eventually_sync
from tests.support.workers import PATIENCE_S, SocketClient, SupervisorProcess, start_fields
from worker_svc.job import JobState
from worker_svc.record.paths import STORE_NAME
from worker_svc.record.writer import JobStore

_COPIES: Final = 25
_WAL_HEADER_BYTES: Final = 32
_FRAME_HEADER: Final = struct.Struct(">6I")


class Load:
    """Jobs without end, from a client in a thread; `answered` are those that the supervisor has answered."""

    def __init__(self, supervisor: SupervisorProcess) -> None:
        self._supervisor = supervisor
        self._is_over = threading.Event()
        self.answered: list[str] = []
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _work(self) -> None:
        client: SocketClient = self._supervisor.connect()
        number = 0
        while not self._is_over.is_set():
            batch = [f"j{number + i}" for i in range(8)]
            requests = [client.send("start", b"input" * 50, **_fields(job_id)) for job_id in batch]
            for job_id, request in zip(batch, requests, strict=True):
                client.answer(request)
                self.answered.append(job_id)
            number += 8
        client.close()


def _fields(job_id: str) -> dict[str, Any]:
    return start_fields(job_id, programs.CAT_STDIN, stdin=b"input" * 50)


def transactions_of(wal: bytes) -> list[int]:
    """Where each transaction of the log ends (https://sqlite.org/fileformat2.html#walformat): of this round only."""
    page_bytes = struct.unpack_from(">I", wal, 8)[0]
    salts = struct.unpack_from(">2I", wal, 16)
    ends = []
    at = _WAL_HEADER_BYTES
    while at + _FRAME_HEADER.size + page_bytes <= len(wal):
        _, committed_pages, *frame_salts = _FRAME_HEADER.unpack_from(wal, at)[:4]
        if tuple(frame_salts) != salts:
            break  # of an earlier round of the log
        at += _FRAME_HEADER.size + page_bytes
        if committed_pages:
            ends.append(at)
    return ends


def pages_of(wal: bytes) -> set[int]:
    page_bytes = struct.unpack_from(">I", wal, 8)[0]
    ends = transactions_of(wal)
    last = ends[-1] if ends else 0
    step = _FRAME_HEADER.size + page_bytes
    return {_FRAME_HEADER.unpack_from(wal, at)[0] for at in range(_WAL_HEADER_BYTES, last, step)}


def leave(db: Path, wal: Path, rng: random.Random) -> None:
    """As a kill does: all that was written is there."""


def cut_last(db: Path, wal: Path, rng: random.Random) -> None:
    content = wal.read_bytes()
    ends = [_WAL_HEADER_BYTES, *transactions_of(content)]
    if len(ends) > 1:
        wal.write_bytes(content[: rng.randrange(ends[-2], len(content))])


def tear_last(db: Path, wal: Path, rng: random.Random) -> None:
    content = bytearray(wal.read_bytes())
    ends = [_WAL_HEADER_BYTES, *transactions_of(bytes(content))]
    if len(ends) > 1:
        for at in range(ends[-2], len(content), 512):  # sectors reach the disk in any order
            if rng.random() < 0.5:
                content[at : at + 512] = rng.randbytes(len(content[at : at + 512]))
        wal.write_bytes(content)


def tear_checkpoint(db: Path, wal: Path, rng: random.Random) -> None:
    log, content = wal.read_bytes(), bytearray(db.read_bytes())
    page_bytes = struct.unpack_from(">I", log, 8)[0] if len(log) > _WAL_HEADER_BYTES else 0
    for page in pages_of(log) if page_bytes else ():
        if rng.random() < 0.7 and page * page_bytes <= len(content):
            content[(page - 1) * page_bytes : page * page_bytes] = rng.randbytes(page_bytes)
    db.write_bytes(content)


@pytest.mark.long
@pytest.mark.parametrize("damage", [leave, cut_last, tear_last, tear_checkpoint])
def test_a_copy_at_any_moment_opens_and_is_whole(
    tmp_path: Path, damage: Callable[[Path, Path, random.Random], None]
) -> None:
    rng = random.Random(4)
    with SupervisorProcess(tmp_path / "state", slots=8) as supervisor, Load(supervisor) as load:
        for number in range(_COPIES):
            supervisor.client.ask("status")  # by its answer some turns have passed
            threading.Event().wait(rng.uniform(0, 0.05))  # any moment will do
            copy = tmp_path / f"copy-{number}"
            copy.mkdir()
            with supervisor.paused():
                answered = len(load.answered)
                for suffix in ("", "-wal"):
                    shutil.copy(supervisor.path / f"{STORE_NAME}{suffix}", copy)
            damage(copy / STORE_NAME, copy / f"{STORE_NAME}-wal", rng)
            # The last transaction, if torn, may be one that was fsynced and answered: it counts as the cut's loss.
            lost_most = 8 if damage in (cut_last, tear_last) else 0
            assert_whole(copy, load.answered[: max(0, answered - 2 * lost_most)])
            shutil.rmtree(copy)
    assert load.answered


def assert_whole(copy: Path, answered: list[str]) -> None:
    store = JobStore(str(copy))  # as the supervisor opens it
    store.close()
    with sqlite3.connect(copy / STORE_NAME) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        sequences = [number for (number,) in db.execute("SELECT sequence FROM events ORDER BY sequence")]
        assert sequences == list(range(1, len(sequences) + 1))
        known = db.execute("SELECT value FROM meta WHERE key = 'sequence'").fetchone()
        assert (known[0] if known else 0) == len(sequences)
        last = dict(db.execute("SELECT job_id, to_state FROM events ORDER BY sequence"))
        rows = {job_id: (state, number) for job_id, state, number in
                db.execute("SELECT job_id, state, last_sequence FROM jobs")}  # fmt: skip
        assert {job_id: state for job_id, (state, _) in rows.items()} == last
        assert all(0 < number <= len(sequences) for _, number in rows.values())
        early = {job_id for job_id, (state, _) in rows.items() if state < JobState.RUNNING}
        with_input = {job_id for (job_id,) in db.execute("SELECT job_id FROM jobs JOIN stdin USING (ordinal)")}
        assert with_input == early, "standard input is kept until the process has it, and no longer"
    db.close()
    assert set(answered) <= rows.keys()


def test_on_disk_before_the_process_exists_and_before_the_answer(tmp_path: Path) -> None:
    """In the order of system calls: fdatasync of the log, the process, fdatasync again, the answer."""
    strace = shutil.which("strace")
    if not strace:
        pytest.skip("there is no strace")
    trace = tmp_path / "trace"
    with SupervisorProcess(tmp_path / "state") as supervisor:
        if supervisor.client.ask("status")["spawner"] != "native":
            pytest.skip("only the native spawner's way is known by its system call")
        options = ["-f", "-qq", "-e", "trace=fdatasync,clone3,sendto", "-s", "200", "-o", str(trace)]
        tracer = subprocess.Popen([strace, *options, "-p", str(supervisor.pid)], stderr=subprocess.DEVNULL)
        try:
            tasks = [*Path(f"/proc/{supervisor.pid}/task").iterdir()]
            eventually_sync(lambda: all(status_field(int(task.name), "TracerPid", 10) for task in tasks), PATIENCE_S)
            supervisor.run("j", programs.TRUE)
            supervisor.wait_finished("j")
        finally:
            tracer.terminate()
            tracer.wait()
    kinds = [
        kind
        for line in trace.read_text().splitlines()
        for kind, sign in (
            ("synced", "fdatasync("),
            ("process", "CLONE_PIDFD"),
            ("answer", r"\"op\":\"started\""),
        )
        if sign in line and "resumed" not in line
    ]
    at_process, at_answer = kinds.index("process"), kinds.index("answer")
    assert kinds[at_process - 1] == "synced"
    assert "synced" in kinds[at_process + 1 : at_answer]
