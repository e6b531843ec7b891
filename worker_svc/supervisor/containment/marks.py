"""What every process of a job is executed with, so that it is known wherever it went.

A job may give its processes any environment. So that none can pass for another job's, the mark holds a keyed hash over
the job, with a secret that no job is told: one that does not verify is no mark.
"""

from __future__ import annotations

from typing import Any, Final

from worker_svc.linux.kinship import STATE_VARIABLE

try:  # not hashlib, whose OpenSSL takes 4 MB
    _keyed_hash: Any = __import__("_blake2").blake2b
except ImportError:
    _keyed_hash = __import__("hashlib").blake2b

JOB_VARIABLE: Final = "WORKER_JOB_ID"
MARK_VARIABLE: Final = "WORKER_JOB_MARK"
_HASH_BYTES: Final = 16


class Marks:
    """Those of one state directory: a copy of it, which has another id, makes others."""

    def __init__(self, state_id: str, secret: bytes) -> None:
        self._state_id = state_id
        self._secret = secret

    def __repr__(self) -> str:
        return f"Marks({self._state_id!r})"

    def of(self, job_id: str, accepted_ns: int) -> str:
        """The same in every supervisor of the state. When it was accepted tells apart jobs that had the same id one
        after the other."""
        text = f"{self._state_id}\0{accepted_ns:x}\0{job_id}".encode(errors="surrogateescape")
        code = _keyed_hash(text, key=self._secret, digest_size=_HASH_BYTES).hexdigest()
        return f"{code}-{accepted_ns:x}-{job_id}"

    def variables(self, job_id: str, mark: str) -> dict[str, str]:
        """Only the mark counts; the others are for the job to read."""
        return {JOB_VARIABLE: job_id, STATE_VARIABLE: self._state_id, MARK_VARIABLE: mark}

    def read(self, mark: str) -> tuple[str, int] | None:
        """The job that a mark is of, and when it was accepted. None: it is not one of ours."""
        _, _, named = mark.partition("-")
        accepted, _, job_id = named.partition("-")
        try:
            accepted_ns = int(accepted, 16)
        except ValueError:
            return None
        return (job_id, accepted_ns) if self.of(job_id, accepted_ns) == mark else None
