"""What the supervisor keeps in memory of a job that is not finished. Of a finished one it keeps nothing."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from worker_svc.job import Exit, JobSpec, JobState, LeaderExit, OutputPolicy, OutputVia, StopCause

if TYPE_CHECKING:
    from worker_svc.supervisor.connections import Connection
    from worker_svc.supervisor.containment import Container


class LiveJob:
    __slots__ = (
        "accepted_ns",
        "adopted",
        "asked",
        "asked_cause",
        "container",
        "ended",
        "exited",
        "fault",
        "fingerprint",
        "given_up",
        "giving_up",
        "has_outputs",
        "is_spawning",
        "job_id",
        "kill_at_ns",
        "ordinal",
        "output_loss",
        "output_max_bytes",
        "output_policy",
        "output_via",
        "owner",
        "paused",
        "pid",
        "pidfd",
        "pipes",
        "secrets",
        "separate_stderr",
        "spec",
        "started_monotonic_ns",
        "state",
        "stdin",
        "stop_cause",
        "stop_grace_s",
        "stop_signal",
        "stuck",
        "timeout_s",
        "waiting",
        "waits_for_tree",
        "waits_since_ns",
    )

    def __init__(self, job_id: str, fingerprint: str, accepted_ns: int, owner: str = "") -> None:
        self.job_id = job_id
        self.fingerprint = fingerprint
        self.accepted_ns = accepted_ns
        self.owner = owner
        self.waits_since_ns = time.monotonic_ns()
        """For a slot; on the monotonic clock."""
        self.ordinal = 0
        self.state = JobState.NEW
        self.spec: JobSpec | None = None
        """Held from acceptance to spawn of a job that starts at once; a queued one's is read back from the store."""
        self.stdin = b""
        self.secrets = b""
        """Its secret variables, as SecretEnv.pack has them, until the spawn: also a queued one's are nowhere else."""
        self.timeout_s = 0.0
        self.stop_signal = 0
        self.stop_grace_s = 0.0
        self.separate_stderr = False
        self.output_max_bytes = 0
        self.output_policy = OutputPolicy.NONE
        self.output_via = OutputVia.FILE
        self.output_loss = ""
        """What of its output is lost, as last recorded."""
        self.pipes: list[Any] = []
        """What the pump knows its output by; empty where that goes to the files by itself."""
        self.has_outputs = False
        """Whether its output is looked after."""
        self.pid = 0
        self.pidfd = -1
        self.adopted = False
        """Whether its process is not our child, but an earlier supervisor's."""
        self.exited = False
        """Whether its leader has exited; its status is not taken yet."""
        self.ended: Exit | None = None
        """The status of an adopted one whose leader has exited, once it is known."""
        self.container: Container | None = None
        """From before the spawn to the end."""
        self.waits_for_tree = False
        """Whether the job goes on when its leader has exited, until all of it is gone."""
        self.paused = False
        self.stuck = ""
        """What of it would not die, as last recorded."""
        self.started_monotonic_ns = 0
        self.stop_cause = StopCause.NONE
        self.is_spawning = False
        """Whether a spawner has its plan, and has not told what came of it."""
        self.fault = ""
        """Why it is lost once it has."""
        self.given_up = False
        """Whether its start was broken off, since it was asked to stop."""
        self.giving_up = False
        """Whether that is to be tried again: there is no process yet."""
        self.asked: tuple[int | None, float | None] | None = None
        """Signal and grace of a stop that came while the job was starting."""
        self.asked_cause = StopCause.NONE
        """Why the first of them came."""
        self.kill_at_ns = 0
        """When SIGKILL follows the stop signal, on the monotonic clock."""
        self.waiting: list[tuple[Connection, int, bool]] | None = None
        """Who waits for the answer to a start: connection, request number, whether the job existed already."""

    def take(self, spec: JobSpec) -> None:
        self.timeout_s = spec.timeout_s
        self.stop_signal = spec.stop_signal
        self.stop_grace_s = spec.stop_grace_s
        self.separate_stderr = spec.separate_stderr
        self.output_max_bytes = spec.output_max_bytes
        self.output_policy = spec.output_policy
        self.output_via = spec.output_via
        self.waits_for_tree = spec.leader_exit is LeaderExit.WAIT

    @property
    def limit_text(self) -> str:
        """Names the limit that ended the job; empty if none did."""
        if self.stop_cause is StopCause.TIMEOUT:
            return f"timed out after {self.timeout_s:g} s"
        if self.stop_cause is StopCause.OUTPUT:
            return f"wrote more than {self.output_max_bytes} bytes"
        return ""
