"""What the worker's configuration tells the supervisor; in the store too, so that it holds while no worker is there."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from worker_svc.record.store import JobStore
from worker_svc.supervisor.spec_check import check_kind


class Settings(NamedTuple):
    slots: int = 16
    queue_length: int = 10_000
    base_env: dict[str, str] = {}  # noqa: RUF012 - never mutated; NamedTuple has no default_factory
    user_env: tuple[str, ...] = ()
    """Which of HOME, USER, LOGNAME and SHELL a job of another user gets from the user database."""
    idle_exit_s: float = 60.0
    min_free_bytes: int = 0
    min_free_inodes: int = 0
    keep_age_s: float = 0.0
    """For each limit on what is kept, zero means that there is none."""
    keep_jobs: int = 0
    keep_bytes: int = 0
    keep_events: int = 1_000_000
    keep_ids: int = 0
    """How many ids are remembered of jobs that retention took."""
    on_reboot: str = "start"

    @classmethod
    def from_store(cls, store: JobStore) -> Settings:
        text = store.get_meta("settings")
        return cls.from_json(json.loads(text)) if text else cls()

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Settings:
        """Settings that this version does not know are another version's business. Raises TypeError, ValueError."""
        known = cls(**{name: fields[name] for name in cls._fields if name in fields})
        for name, value, default in zip(cls._fields, known, cls(), strict=True):
            check_kind(name, value, default)
        # In JSON it came as a list.
        return known._replace(user_env=tuple(known.user_env))

    def to_store(self, store: JobStore) -> None:
        """Raises sqlite3.Error."""
        store.set_meta("settings", json.dumps(self._asdict()))
