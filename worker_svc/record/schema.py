"""What a store holds: its tables, and their rows as our own types."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from worker_svc.job import JobRecord, JobSpec, JobState, KnownJob, Outcome, Transition, unicode_text

STEADY_CLOCK: Final = "steady_clock"
SCHEMA_VERSION: Final = 2
# A spec that takes more than this is kept apart, so that rows stay small: of what changes often, and of what is listed.
SPEC_IN_ROW_MAX_BYTES: Final = 4096

# `ordinal` is the order of acceptance. Where `spec_bytes` is not zero, `spec` is without args and env, and the whole,
# of so many bytes, in `specs`. `forgotten` has ids of jobs that retention took, so that they do not run again. Standard
# input lies apart too, and only until the process has it. Events outlive the deletion of their job, so that their
# numbers have no gaps.
_JOBS: Final = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE jobs (
    ordinal INTEGER PRIMARY KEY AUTOINCREMENT,
    job_id TEXT NOT NULL UNIQUE,
    spec TEXT NOT NULL,
    state INTEGER NOT NULL,
    last_sequence INTEGER NOT NULL,
    accepted_ns INTEGER NOT NULL,
    fingerprint TEXT NOT NULL DEFAULT '',
    outcome INTEGER NOT NULL DEFAULT 0,
    exit_code INTEGER,
    signal INTEGER,
    reason TEXT NOT NULL DEFAULT '',
    pid INTEGER NOT NULL DEFAULT 0,
    started_ns INTEGER,
    finished_ns INTEGER,
    wall_ns INTEGER,
    cpu_ns INTEGER,
    peak_memory_bytes INTEGER,
    output_size_bytes INTEGER,
    stderr_size_bytes INTEGER,
    boot_id TEXT NOT NULL DEFAULT '',
    start_ticks INTEGER NOT NULL DEFAULT 0,
    started_monotonic_ns INTEGER NOT NULL DEFAULT 0,
    stop_cause INTEGER NOT NULL DEFAULT 0,
    stored_bytes INTEGER NOT NULL DEFAULT 0,
    paused INTEGER NOT NULL DEFAULT 0,
    stuck TEXT NOT NULL DEFAULT '',
    owner TEXT NOT NULL DEFAULT '',
    output_loss TEXT NOT NULL DEFAULT '',
    spec_bytes INTEGER NOT NULL DEFAULT 0,
    finished_steady_ns INTEGER
);
CREATE INDEX jobs_live ON jobs (ordinal) WHERE state < 5;
CREATE INDEX jobs_finished ON jobs (finished_steady_ns) WHERE state = 5;
CREATE INDEX jobs_owner ON jobs (owner, job_id);
CREATE TABLE stdin (ordinal INTEGER PRIMARY KEY, content BLOB NOT NULL);
CREATE TABLE events (
    sequence INTEGER PRIMARY KEY,
    job_id TEXT NOT NULL,
    at_ns INTEGER NOT NULL,
    from_state INTEGER NOT NULL,
    to_state INTEGER NOT NULL,
    pid INTEGER NOT NULL,
    outcome INTEGER NOT NULL,
    exit_code INTEGER,
    signal INTEGER,
    reason TEXT NOT NULL,
    queued_ns INTEGER,
    wall_ns INTEGER,
    cpu_ns INTEGER,
    owner TEXT NOT NULL DEFAULT ''
);
"""
_BESIDE_JOBS: Final = """
CREATE INDEX jobs_of_owner ON jobs (owner, ordinal);
CREATE TABLE specs (ordinal INTEGER PRIMARY KEY, spec TEXT NOT NULL);
CREATE TABLE labels (
    ordinal INTEGER NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (ordinal, key)
) WITHOUT ROWID;
CREATE INDEX labels_found ON labels (key, value, ordinal);
CREATE TABLE forgotten (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    job_id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    outcome INTEGER NOT NULL,
    reason TEXT NOT NULL
);
"""
SCHEMA: Final = _JOBS + _BESIDE_JOBS
# Entry N brings a store from schema N to N + 1.
MIGRATIONS: Final[dict[int, str]] = {
    1: f"""
DROP INDEX jobs_owner;
CREATE INDEX jobs_owner ON jobs (owner, job_id);
ALTER TABLE jobs ADD COLUMN output_loss TEXT NOT NULL DEFAULT '';
ALTER TABLE jobs ADD COLUMN spec_bytes INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN finished_steady_ns INTEGER;
UPDATE jobs SET finished_steady_ns = finished_ns WHERE state = 5;
DROP INDEX jobs_finished;
CREATE INDEX jobs_finished ON jobs (finished_steady_ns) WHERE state = 5;
{_BESIDE_JOBS}
INSERT INTO labels SELECT ordinal, key, value FROM jobs, json_each(jobs.spec, '$.labels');
INSERT INTO specs SELECT ordinal, spec FROM jobs WHERE length(spec) > {SPEC_IN_ROW_MAX_BYTES};
UPDATE jobs SET spec_bytes = length(spec), spec = json_remove(spec, '$.args', '$.env')
    WHERE length(spec) > {SPEC_IN_ROW_MAX_BYTES};
"""
}

_WHOLE_SPEC: Final = "COALESCE((SELECT specs.spec FROM specs WHERE specs.ordinal = jobs.ordinal), jobs.spec)"


def _columns(**special: str) -> str:
    return ", ".join(special.get(name, name) for name in JobRecord._fields)


RECORD_COLUMNS: Final = _columns(is_brief="spec_bytes > 0")
WHOLE_RECORD_COLUMNS: Final = _columns(spec=_WHOLE_SPEC, is_brief="0")
SPEC_OF: Final = f"SELECT {_WHOLE_SPEC} FROM jobs WHERE ordinal = ?"
KNOWN: Final = "SELECT owner, fingerprint, state, outcome, reason FROM jobs WHERE job_id = :job_id"
EVER_KNOWN: Final = (
    f"{KNOWN} UNION ALL SELECT owner, fingerprint, 5, outcome, reason FROM forgotten WHERE job_id = :job_id"
)
EVENT_COLUMNS: Final = (
    "sequence, job_id, at_ns, from_state, to_state, pid, outcome, exit_code, signal, reason, queued_ns, wall_ns, "
    "cpu_ns, owner"
)
INSERT_EVENT: Final = f"INSERT INTO events ({EVENT_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?)"

# By this index alone, in which a job that is not there and one that is somebody else's are missing in the same way: how
# long it takes must not tell them apart. (The index of ids would lead on to the row.)
IS_OWNED: Final = "SELECT 1 FROM jobs INDEXED BY jobs_owner WHERE owner = ? AND job_id = ?"


class LiveRow(NamedTuple):
    """A job that is not finished: what a supervisor that starts must know to go on with it."""

    ordinal: int
    job_id: str
    state: JobState
    fingerprint: str
    pid: int
    boot_id: str
    start_ticks: int
    accepted_ns: int
    started_monotonic_ns: int
    stop_cause: int
    paused: int
    owner: str


class FinishedRow(NamedTuple):
    """A finished job: what retention must know. `stored_bytes` is what its output takes on disk; when it finished is
    by the store's SteadyClock."""

    ordinal: int
    job_id: str
    finished_steady_ns: int
    stored_bytes: int


class StoreError(Exception):
    """The store cannot be used as it is; the text says what is wrong and what to do."""


def uri_of(path: str, options: str) -> str:
    """For sqlite3.connect (https://sqlite.org/uri.html); urllib would cost the supervisor memory."""
    return "file:" + path.replace("%", "%25").replace("?", "%3f").replace("#", "%23") + "?" + options


def storable(value: Any) -> Any:
    """As SQLite can hold it: text is UTF-8, a whole number has 64 bits."""
    match value:
        case str():
            return unicode_text(value)
        case int():
            return max(-(2**63), min(int(value), 2**63 - 1))
    return value


def record_from_row(row: tuple[Any, ...]) -> JobRecord:
    ordinal, job_id, spec, state, last_sequence, accepted_ns, fingerprint, outcome, *rest = row
    return JobRecord(
        ordinal,
        job_id,
        JobSpec.from_text(spec),
        JobState(state),
        last_sequence,
        accepted_ns,
        fingerprint,
        Outcome(outcome),
        *rest,
    )


def known_from_row(row: tuple[Any, ...]) -> KnownJob:
    owner, fingerprint, state, outcome, reason = row
    return KnownJob(owner, fingerprint, JobState(state), Outcome(outcome), reason)


def transition_from_row(row: tuple[Any, ...]) -> Transition:
    sequence, job_id, at_ns, from_state, to_state, pid, outcome, *rest = row
    return Transition(sequence, job_id, at_ns, JobState(from_state), JobState(to_state), pid, Outcome(outcome), *rest)
