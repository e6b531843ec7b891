"""What can be seen of a state directory from outside."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.programs import is_alive
from tests.support.waiting import PATIENCE_S as PATIENCE_S
from tests.support.waiting import eventually_sync
from worker_svc.job import JobRecord, JobState, Transition
from worker_svc.record.paths import output_path
from worker_svc.record.reader import StoreReader
from worker_svc.record.schema import StoreError


class StateDir:
    """What can be seen of a state directory from outside."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def reader(self) -> Iterator[StoreReader]:
        reader = StoreReader(str(self.path))
        try:
            yield reader
        finally:
            reader.close()

    def record(self, job_id: str) -> JobRecord:
        with self.reader() as reader:
            record = reader.get(job_id)
        assert record is not None, f"{job_id} is not on record"
        return record

    def wait_state(self, job_id: str, *states: JobState) -> JobRecord:
        with self.reader() as reader:

            def in_state() -> JobRecord | None:
                record = reader.get(job_id)
                return record if record is not None and record.state in states else None

            found = eventually_sync(in_state, PATIENCE_S, f"{job_id} is in none of {states}")
        assert found is not None
        return found

    def wait_finished(self, job_id: str) -> JobRecord:
        return self.wait_state(job_id, JobState.FINISHED)

    def events(self) -> list[Transition]:
        with self.reader() as reader:
            return reader.events(0, 1_000_000)

    def output(self, job_id: str) -> bytes:
        return Path(output_path(str(self.path), job_id)).read_bytes()

    def wait_output(self, job_id: str, expected: bytes) -> None:
        eventually_sync(lambda: self.output(job_id) == expected, PATIENCE_S, f"output of {job_id}")

    def processes(self) -> dict[int, set[str]]:
        """Living processes that have to do with the directory: by pid, the files of it that they have open."""
        found: dict[int, set[str]] = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            pid = int(entry.name)
            files = {link for link in _links_of(entry) if link.startswith(f"{self.path}/")}
            if (files or str(self.path) in _command_of(entry)) and is_alive(pid):
                found[pid] = files
        return found

    def supervisor_pid(self) -> int:
        """The pid of the supervisor that holds the lock, or that did last; 0: there never was one."""
        try:
            return int((self.path / "supervisor.lock").read_text() or 0)
        except FileNotFoundError:
            return 0

    def clean_up(self) -> None:
        """Kills what runs, and asserts that nothing was there which belongs to a job that is finished."""
        if not self.path.exists():
            return
        supervisor = self.supervisor_pid()
        if supervisor and supervisor in self.processes():
            os.kill(supervisor, signal.SIGKILL)
            eventually_sync(lambda: not is_alive(supervisor), PATIENCE_S, "the supervisor is not gone")
        finished = {moved.job_id for moved in self._events_if_any() if moved.to_state is JobState.FINISHED}
        leaked = {}
        for pid, files in self.processes().items():
            if any(Path(file).name.rpartition(".")[0] in finished for file in files):
                leaked[pid] = _command_of(Path(f"/proc/{pid}"))
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        eventually_sync(lambda: not self.processes(), PATIENCE_S, f"{self.path}: processes are left")
        assert not leaked, f"processes of finished jobs were left: {leaked}"

    def _events_if_any(self) -> list[Transition]:
        try:
            return self.events()
        except StoreError:  # it was killed before it had made one, or a test has spoilt it
            return []


def _links_of(process: Path) -> list[str]:
    try:
        return [str(fd.readlink()) for fd in (process / "fd").iterdir()]
    except OSError:  # gone meanwhile, or another user's
        return []


def _command_of(process: Path) -> str:
    try:
        return (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
