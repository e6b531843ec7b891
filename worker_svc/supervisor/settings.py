"""The worker's settings in the store, so that they hold while no worker is there."""

from __future__ import annotations

import json
from typing import Final

from worker_svc.ipc.messages import Settings, made_from
from worker_svc.record.writer import JobStore

_KEY: Final = "settings"
# Until the first worker has said hello.
DEFAULTS: Final = Settings(
    slots=16,
    queue_length=10_000,
    base_env={},
    user_env=(),
    idle_exit_s=60.0,
    min_free_bytes=0,
    min_free_inodes=0,
    keep_age_s=0.0,
    keep_jobs=0,
    keep_bytes=0,
    keep_events=1_000_000,
    keep_ids=0,
    on_reboot="start",
)


def kept_settings(store: JobStore) -> Settings:
    """What an earlier version kept need not have all of today's fields, nor these alone. Raises InvalidArgument."""
    kept = json.loads(store.get_meta(_KEY) or "{}")
    known = {name: kept.get(name, default) for name, default in DEFAULTS._asdict().items()}
    return made_from(Settings, known, _KEY)


def keep_settings(store: JobStore, settings: Settings) -> None:
    """Raises sqlite3.Error."""
    store.set_meta(_KEY, json.dumps(settings._asdict()))
