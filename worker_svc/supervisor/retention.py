"""What of finished jobs is kept: the oldest go, in small steps, when there is too much; and a floor of free disk."""

from __future__ import annotations

import os
import queue
import sqlite3
import time
from collections.abc import Iterator
from itertools import islice
from typing import Final

from worker_svc.ipc.messages import Settings
from worker_svc.job import ResourceExhausted, Unavailable
from worker_svc.linux.threads import start_thread
from worker_svc.record import paths
from worker_svc.record.excess import KeepLimits, Kept, excess
from worker_svc.record.paths import output_folder, output_path, stderr_path
from worker_svc.record.schema import FinishedRow
from worker_svc.record.writer import JobStore
from worker_svc.supervisor.journal import note
from worker_svc.supervisor.ledger import Ledger

# A step deletes this much at most, between two turns of the loop: a few milliseconds.
_JOBS_PER_STEP: Final = 64
_NAMES_PER_STEP: Final = 256
_EVENTS_PER_STEP: Final = 1000
_STEP_PAUSE_S: Final = 0.02
_LOOK_EVERY_S: Final = 30.0
_RETRY_S: Final = 1.0


class Janitor:
    """Removes files in a thread of its own: to unlink a large one can take seconds."""

    def __init__(self) -> None:
        self._paths: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._number = 0
        start_thread(self._work, "janitor")

    def remove(self, path: str) -> None:
        """The name is free when this returns: a new job with the same id may need it before the file is gone."""
        self._number += 1
        aside = f"{path}.{os.getpid()}-{self._number}.gone"
        try:
            os.rename(path, aside)
        except FileNotFoundError:
            return  # never made, or removed by an operator
        except OSError as error:
            note("output.not_removed", path=path, reason=str(error))
            return
        self.unlink(aside)

    def unlink(self, path: str) -> None:
        """Later, of a name that nobody wants."""
        self._paths.put(path)

    def _work(self) -> None:
        while True:
            path = self._paths.get()
            try:
                os.unlink(path)
            except FileNotFoundError:
                continue  # never made, or removed by an operator
            except OSError as error:
                note("output.not_removed", path=path, reason=str(error))


class Retention:
    def __init__(self, state_dir: str, store: JobStore, ledger: Ledger) -> None:
        self._state_dir = state_dir
        self._store = store
        self._ledger = ledger
        self._kept = Kept(*store.finished_totals())
        self._first_sequence = store.first_sequence()
        self._next_s = 0.0
        self._doomed: set[str] = set()
        self._settings: Settings | None = None
        # A store without history may be one that replaces a lost one: it does not tell whose files these are.
        self._unswept: Iterator[str] | None = _names(output_folder(state_dir)) if store.sequence else None
        self.janitor = Janitor()

    @property
    def next_ns(self) -> int:
        """When `step` wants to be called next, on the monotonic clock."""
        return int(self._next_s * 1e9)

    @property
    def has_work(self) -> bool:
        """Whether there is anything that may have to go some day: else nobody need look."""
        return self._kept.jobs > 0 or self._unswept is not None

    def on_finished(self, stored_bytes: int) -> None:
        self._kept = Kept(self._kept.jobs + 1, self._kept.bytes + stored_bytes)

    def on_deleted(self, stored_bytes: int) -> None:
        self._kept = Kept(self._kept.jobs - 1, self._kept.bytes - stored_bytes)

    def delete(self, row: FinishedRow, keep_ids: int = 0) -> None:
        """The record goes with the next commit, its files after that. `keep_ids` as Ledger.delete."""
        if row.job_id in self._doomed:  # asked for twice in one turn
            return
        self._doomed.add(row.job_id)
        self._ledger.then(lambda: self._doomed.discard(row.job_id))
        self._ledger.delete(row.job_id, keep_ids)
        self.on_deleted(row.stored_bytes)
        for path in (output_path(self._state_dir, row.job_id), stderr_path(self._state_dir, row.job_id)):
            self._ledger.then(lambda path=path: self.janitor.remove(path))  # type: ignore[misc]

    def step(self, settings: Settings) -> None:
        """If it is time: deletes a little of what is too much."""
        now_s = time.monotonic()
        if settings is self._settings and now_s < self._next_s:
            return
        self._settings = settings
        if self._ledger.failure:
            self._next_s = now_s + _RETRY_S
            return
        try:
            self._store.keep_clock()
            # Not only when nothing else is to be committed: under load there always is.
            oldest = self._store.oldest_finished(_JOBS_PER_STEP + len(self._doomed))
            oldest = [row for row in oldest if row.job_id not in self._doomed]
            gone = excess(self._kept, oldest, _limits_of(settings), self._store.clock.now_ns())
            for row in gone:
                self.delete(row, settings.keep_ids)
            is_more = any((len(gone) >= _JOBS_PER_STEP, self._drop_events(settings), self._sweep()))
        except (sqlite3.Error, OSError) as error:
            note("retention.failed", reason=str(error))
            self._next_s = now_s + _RETRY_S
            return
        self._next_s = now_s + (_STEP_PAUSE_S if is_more else _LOOK_EVERY_S)

    def _sweep(self) -> bool:
        """Removes a few of the files that were left when a supervisor died between a deletion and the unlinking.

        False: that was the last. A job's files are made after its record is on disk, by orders of this very thread:
        whatever has no record now is nobody's.
        """
        if self._unswept is None:
            return False
        names = list(islice(self._unswept, _NAMES_PER_STEP))
        if not names:
            self._unswept = None
            return False
        for name in names:
            path = f"{output_folder(self._state_dir)}/{name}"
            job_id, _, kind = name.rpartition(".")
            if kind == "gone":
                self.janitor.unlink(path)
            elif kind in ("out", "err") and not self._has_record(job_id):
                note("output.orphan_removed", path=path)
                self.janitor.remove(path)
        return True

    def _has_record(self, job_id: str) -> bool:
        return self._store.known(job_id) is not None

    def _drop_events(self, settings: Settings) -> bool:
        """Drops the oldest events beyond the number to keep, as far as they are logged. False: there are no more."""
        limit = min(self._store.sequence - settings.keep_events, self._logged_sequence())
        if limit < self._first_sequence:
            return False
        until = min(limit, self._first_sequence + _EVENTS_PER_STEP - 1)
        self._ledger.drop_events(until)
        self._first_sequence = until + 1
        return True

    def _logged_sequence(self) -> int:
        """What the worker has noted as logged; its file, which only it writes."""
        try:
            with open(f"{self._state_dir}/{paths.CURSOR_NAME}", "rb") as file:
                return int.from_bytes(file.read(8), "little")
        except FileNotFoundError:
            return 0


def _limits_of(settings: Settings) -> KeepLimits:
    return KeepLimits(settings.keep_age_s or None, settings.keep_jobs or None, settings.keep_bytes or None)


def _names(folder: str) -> Iterator[str]:
    """The names of the files there, as they are read. Raises nothing: a folder that cannot be read has none."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                yield entry.name
    except OSError as error:
        note("output.not_swept", reason=str(error))


def check_floor(store: JobStore, settings: Settings) -> None:
    """Raises ResourceExhausted if the file system of the state directory is too full for another job, and Unavailable
    if the store was removed or replaced: what would be written to it then is gone with us."""
    state_dir = store.directory
    try:
        is_in_place = store.is_in_place()
        found = os.statvfs(store.path)
    except OSError as error:
        raise Unavailable(f"disk: {store.path}: {(error.strerror or '').lower()}: no job can be recorded") from error
    if not is_in_place:
        raise Unavailable(f"disk: {store.path}: something else was put in its place: no job can be recorded")
    free_bytes = found.f_bavail * found.f_frsize
    # Some file systems (ramfs, some of FUSE) count nothing.
    if found.f_blocks and free_bytes < settings.min_free_bytes:
        raise ResourceExhausted(
            f"disk: {free_bytes} bytes are free in {state_dir}, below the floor of {settings.min_free_bytes} "
            "(state.min_free_bytes): free some space, or prune finished jobs"
        )
    # Some file systems (btrfs) make inodes as needed and count none.
    if found.f_files and found.f_favail < settings.min_free_inodes:
        raise ResourceExhausted(
            f"disk: {found.f_favail} inodes are free in {state_dir}, below the floor of {settings.min_free_inodes} "
            "(state.min_free_inodes): remove some files, or prune finished jobs"
        )
