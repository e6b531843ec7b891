"""What a directory holds: a store of ours, what is left of one, or what we must not touch. Changes nothing."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from typing import Final

from worker_svc.linux import failpoints
from worker_svc.record.paths import (
    CURSOR_NAME,
    KEY_NAME,
    OUTPUT_NAME,
    RESERVE_NAME,
    SOCKET_NAME,
    STORE_NAME,
    SUPERVISOR_LOCK_NAME,
    SUPERVISOR_LOG_NAME,
    WORKER_LOCK_NAME,
)
from worker_svc.record.schema import uri_of

_WAL_NAME: Final = f"{STORE_NAME}-wal"
# What is made before there is a store, by a start that may have ended half-way; and what file systems come with.
_BEFORE_A_STORE: Final = frozenset(
    {
        SUPERVISOR_LOCK_NAME, WORKER_LOCK_NAME, OUTPUT_NAME, RESERVE_NAME, STORE_NAME, f"{STORE_NAME}-journal",
        SUPERVISOR_LOG_NAME, SOCKET_NAME, KEY_NAME, f"{KEY_NAME}.new",
        failpoints.FILE_NAME, failpoints.WORKER_FILE_NAME,
        failpoints.REACHED_NAME, "lost+found",
    }
)  # fmt: skip
_SHOWN: Final = 3
# https://sqlite.org/fileformat.html
_MAGIC: Final = b"SQLite format 3\0"


def has_store(state_dir: str) -> bool:
    return _size(f"{state_dir}/{STORE_NAME}") > 0


def what_is_wrong(state_dir: str) -> str:
    """With the store in a directory that is there; empty: it is ours, or there has been none yet. Raises OSError."""
    path = f"{state_dir}/{STORE_NAME}"
    if os.path.lexists(path) and not os.path.isfile(path):
        return f"{path}: is no file: another program's? Name another state directory"
    if has_store(state_dir):
        return _what_is_not_ours(path)
    left = [name for name in (_WAL_NAME, CURSOR_NAME) if _size(f"{state_dir}/{name}")]
    output = f"{state_dir}/{OUTPUT_NAME}"
    if os.path.isdir(output) and os.listdir(output):
        left.append(f"{OUTPUT_NAME}/")
    if not left:
        return ""
    found = "is empty" if os.path.lexists(path) else "is missing"
    return (
        f"{path}: {found}, though there were jobs here ({', '.join(left)}): put it back, or begin anew without what it "
        "knew, in another directory or by moving the rest of this one away"
    )


def foreign_names(state_dir: str) -> list[str]:
    """What is in a directory without a store that is not there because of us. Raises OSError."""
    return sorted(set(os.listdir(state_dir)) - _BEFORE_A_STORE)


def shown(names: list[str]) -> str:
    """At most a few, safe to print."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(ascii, names[:_SHOWN])) + more


def _what_is_not_ours(path: str) -> str:
    with open(path, "rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            return f"{path}: is no database (any more): put it back from a copy, or name another state directory"
    try:
        # Immutable: without locks, and without looking at what a worker that runs has yet to write into it.
        with closing(sqlite3.connect(uri_of(path, "mode=ro&immutable=1"), uri=True)) as db:
            tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.Error:
        return ""  # it may pass, and is told where the store is opened for good
    # Without any the store was just made: they are in the write-ahead log, or the first start ended half-way.
    if not tables or tables >= {"meta", "jobs", "events"}:
        return ""
    return f"{path}: is another program's database: name another state directory"


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0
