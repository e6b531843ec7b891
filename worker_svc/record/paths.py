"""What the files of a state directory are called."""

from __future__ import annotations

from typing import Final

STORE_NAME: Final = "jobs.sqlite3"
SOCKET_NAME: Final = "supervisor.sock"
# What a worker shows in its hello: only who can read the state directory knows it, and no sandbox lets a job do that.
KEY_NAME: Final = "supervisor.key"
SUPERVISOR_LOG_NAME: Final = "supervisor.log"
SUPERVISOR_LOCK_NAME: Final = "supervisor.lock"
WORKER_LOCK_NAME: Final = "worker.lock"
# Its first eight bytes, little-endian: up to which transition all are logged (telemetry/cursor.py). The worker's alone.
CURSOR_NAME: Final = "worker.cursor"
RESERVE_NAME: Final = "disk-reserve"
OUTPUT_NAME: Final = "output"


def output_folder(state_dir: str) -> str:
    return f"{state_dir}/{OUTPUT_NAME}"


def output_path(state_dir: str, job_id: str) -> str:
    return f"{state_dir}/{OUTPUT_NAME}/{job_id}.out"


def stderr_path(state_dir: str, job_id: str) -> str:
    return f"{state_dir}/{OUTPUT_NAME}/{job_id}.err"
