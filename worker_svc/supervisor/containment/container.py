"""What is kept of a job's container. Slots only: there are as many as there are running jobs."""

from __future__ import annotations

from typing import Final

from worker_svc.job import PreconditionFailed
from worker_svc.linux.processes import Process, is_there

# Once so many processes were seen the dead ones are forgotten, and again at twice what is left then.
_KNOWN_MAX: Final = 256


class ContainmentError(PreconditionFailed):
    """A job cannot be contained as asked; `limit` is the field that cannot be enforced, empty if it is none of them."""

    def __init__(self, limit: str, missing: str) -> None:
        text = f"{limit}: cannot be enforced" if limit else "the job cannot be contained"
        super().__init__(f"{text}: {missing}")
        self.limit = limit


class Container:
    __slots__ = (
        "cgroup_fd",
        "events_fd",
        "has_exited",
        "is_child",
        "job_id",
        "known",
        "mark",
        "name",
        "number",
        "pid",
        "pidfd",
        "prune_known_at",
        "start_ticks",
        "watched",
    )

    def __init__(self, job_id: str, mark: str, name: str, number: int) -> None:
        self.job_id = job_id
        self.mark = mark
        """In the environment that its processes are executed with."""
        self.name = name
        """The name of its cgroup, below the base; empty: it has none."""
        self.number = number
        """In the order of creation."""
        self.cgroup_fd = -1
        """The directory of its cgroup, for CLONE_INTO_CGROUP, until `started` or `remove`."""
        self.pid = 0
        """The leader's; 0: it is starting, or was never known."""
        self.pidfd = -1
        """The leader's, lent by the caller until `leader_gone`."""
        self.start_ticks = 0
        self.has_exited = False
        """Whether the leader was seen to have exited."""
        self.is_child = True
        """Whether the leader is (or will be) a child of ours, not of an earlier supervisor's."""
        self.events_fd = -1
        self.watched = False
        self.known: set[tuple[int, int]] | None = None
        """pid and start time of processes that were once found to be the job's: they stay so."""
        self.prune_known_at = _KNOWN_MAX

    def remember(self, found: list[Process]) -> None:
        """They were seen to be the job's."""
        if found:
            known = self.known or set()
            if len(known) > self.prune_known_at:
                known = {(pid, start) for pid, start in known if is_there(pid, start)}
                self.prune_known_at = max(_KNOWN_MAX, 2 * len(known))
            self.known = known.union(one.identity for one in found)

    def __repr__(self) -> str:
        return f"Container({self.job_id!r}, name={self.name!r}, pid={self.pid})"
