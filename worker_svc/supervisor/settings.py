"""What the worker's configuration tells the supervisor. Kept in the store, so that it holds while no worker is there."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from worker_svc.supervisor.store import JobStore


class Settings(NamedTuple):
    slots: int = 16
    queue_length: int = 10_000
    base_env: dict[str, str] = {}  # noqa: RUF012 - never mutated; NamedTuple has no default_factory
    idle_exit_s: float = 60.0

    @classmethod
    def from_store(cls, store: JobStore) -> Settings:
        text = store.get_meta("settings")
        return cls.from_json(json.loads(text)) if text else cls()

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Settings:
        """Settings that this version does not know are another version's business."""
        return cls(**{name: fields[name] for name in cls._fields if name in fields})

    def to_store(self, store: JobStore) -> None:
        """Raises sqlite3.Error."""
        store.set_meta("settings", json.dumps(self._asdict()))
