"""Finding jobs in the store, a bounded amount of work at a time, however many there are and however few match."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from worker_svc.job import JobRecord, JobState
from worker_svc.record.schema import RECORD_COLUMNS, WHOLE_RECORD_COLUMNS, record_from_row

_NO_LABELS: Final[Mapping[str, str]] = MappingProxyType({})
_ORDINAL_MAX: Final = 2**63 - 1
# Jobs that are looked at, times what must be looked up of each: some 2 ms.
_LOOKS: Final = 4096
_SPEC: Final = JobRecord._fields.index("spec")


class JobQuery(NamedTuple):
    """What jobs must be like; left out: anything."""

    states: tuple[JobState, ...] = ()
    labels: Mapping[str, str] = _NO_LABELS
    accepted_since_ns: int | None = None
    accepted_before_ns: int | None = None
    owner: str | None = None


class FoundJobs(NamedTuple):
    """Records, newest first, and the ordinal to go on below. None: there is nothing left."""

    records: list[JobRecord]
    below: int | None


class _Source(NamedTuple):
    """Where candidates come from, by falling ordinals: the smallest of the indices that have all that match."""

    table: str
    where: str
    values: tuple[Any, ...] = ()


def find(
    db: sqlite3.Connection, query: JobQuery, below: int | None, limit: int, max_bytes: int, *, whole: bool
) -> FoundJobs:
    """Specs of the records take `max_bytes` in all, or there is only one record; `whole`: with all of the spec."""
    below = _ORDINAL_MAX if below is None else below
    source = _source_of(db, query, below)
    # One more than wanted shows whether there are more.
    matching, lowest = _matching(db, query, source, below, limit + 1)
    columns = WHOLE_RECORD_COLUMNS if whole else RECORD_COLUMNS
    records: list[JobRecord] = []
    for ordinal in matching:
        if len(records) == limit:
            return FoundJobs(records, records[-1].ordinal)
        row = db.execute(f"SELECT {columns} FROM jobs WHERE ordinal = ?", (ordinal,)).fetchone()
        if row is None:  # deleted meanwhile
            continue
        max_bytes -= len(row[_SPEC])
        if records and max_bytes < 0:
            return FoundJobs(records, records[-1].ordinal)
        records.append(record_from_row(row))
    return FoundJobs(records, lowest)


def _matching(
    db: sqlite3.Connection, query: JobQuery, source: _Source, below: int, limit: int
) -> tuple[list[int], int | None]:
    """The ordinals of jobs that match, and the one below which nothing was looked at; None: there is nothing."""
    filters, values = _filters_of(query)
    matching: list[int] = []
    # Where most jobs match a few are enough.
    for looks in (4 * limit, _LOOKS // (1 + len(query.labels))):
        lowest, candidates = db.execute(
            f"SELECT MIN(ordinal), COUNT(*) FROM (SELECT ordinal FROM {source.table} WHERE {source.where}"
            " AND ordinal < ? ORDER BY ordinal DESC LIMIT ?)",
            (*source.values, below, looks),
        ).fetchone()
        found = db.execute(
            f"SELECT candidate FROM (SELECT ordinal AS candidate FROM {source.table} WHERE {source.where}"
            f" AND ordinal >= ? AND ordinal < ?) CROSS JOIN jobs ON ordinal = candidate WHERE {filters}"
            " ORDER BY candidate DESC LIMIT ?",
            (*source.values, lowest, below, *values, limit - len(matching)),
        )
        matching += [ordinal for (ordinal,) in found]
        if candidates < looks:
            return matching, None
        below = lowest
        if len(matching) == limit:
            break
    return matching, below


def _source_of(db: sqlite3.Connection, query: JobQuery, below: int) -> _Source:
    if query.labels:
        count = partial(_count, db, below, _LOOKS // len(query.labels))
        return min(map(_carrying, query.labels.items()), key=count)  # the rarest of them
    if query.states and all(state < JobState.FINISHED for state in query.states):
        return _Source("jobs INDEXED BY jobs_live", "state < 5")
    if query.owner is not None:
        return _Source("jobs INDEXED BY jobs_of_owner", "owner = ?", (query.owner,))
    return _Source("jobs", "1")


def _carrying(label: tuple[str, str]) -> _Source:
    return _Source("labels INDEXED BY labels_found", "key = ? AND value = ?", label)


def _count(db: sqlite3.Connection, below: int, most: int, source: _Source) -> int:
    (found,) = db.execute(
        f"SELECT COUNT(*) FROM (SELECT 1 FROM {source.table} WHERE {source.where} AND ordinal < ? LIMIT ?)",
        (*source.values, below, most),
    ).fetchone()
    return int(found)


def _filters_of(query: JobQuery) -> tuple[str, list[Any]]:
    filters: list[str] = ["1"]
    values: list[Any] = []
    if query.owner is not None:
        filters.append("owner = ?")
        values.append(query.owner)
    if query.states:
        filters.append(f"state IN ({','.join('?' * len(query.states))})")
        values.extend(int(state) for state in query.states)
    if query.accepted_since_ns is not None:
        filters.append("accepted_ns >= ?")
        values.append(query.accepted_since_ns)
    if query.accepted_before_ns is not None:
        filters.append("accepted_ns < ?")
        values.append(query.accepted_before_ns)
    for label in query.labels.items():
        filters.append("EXISTS (SELECT 1 FROM labels WHERE labels.ordinal = candidate AND key = ? AND value = ?)")
        values.extend(label)
    return " AND ".join(filters), values
