"""What the supervisor keeps in memory of a job that is not finished. Of a finished one it keeps nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker_svc.job import JobSpec, JobState, StopCause

if TYPE_CHECKING:
    from worker_svc.supervisor.connections import Connection


class LiveJob:
    __slots__ = (
        "accepted_ns",
        "adopted",
        "asked",
        "exited",
        "fingerprint",
        "job_id",
        "kill_at_ns",
        "ordinal",
        "pid",
        "pidfd",
        "spec",
        "started_monotonic_ns",
        "state",
        "stdin",
        "stop_cause",
        "stop_grace_s",
        "stop_signal",
        "timeout_s",
        "waiting",
    )

    def __init__(self, job_id: str, fingerprint: str, accepted_ns: int) -> None:
        self.job_id = job_id
        self.fingerprint = fingerprint
        self.accepted_ns = accepted_ns
        self.ordinal = 0
        self.state = JobState.NEW
        self.spec: JobSpec | None = None
        """Held from acceptance to spawn of a job that starts at once; a queued one's is read back from the store."""
        self.stdin = b""
        self.timeout_s = 0.0
        self.stop_signal = 0
        self.stop_grace_s = 0.0
        self.pid = 0
        self.pidfd = -1
        self.adopted = False
        """Whether its process is not our child, but an earlier supervisor's."""
        self.exited = False
        """Whether an adopted job's process has exited and we wait for its exit status."""
        self.started_monotonic_ns = 0
        self.stop_cause = StopCause.NONE
        self.asked: tuple[int | None, float | None] | None = None
        """Signal and grace of a stop that came while the job was starting."""
        self.kill_at_ns = 0
        """When SIGKILL follows the stop signal, on the monotonic clock."""
        self.waiting: list[tuple[Connection, int, bool]] | None = None
        """Who waits for the answer to a start: connection, request number, whether the job existed already."""

    def take(self, spec: JobSpec) -> None:
        self.timeout_s = spec.timeout_s
        self.stop_signal = spec.stop_signal
        self.stop_grace_s = spec.stop_grace_s
