"""What belongs to a job, how it is reached, and how it ends as a whole."""

from worker_svc.supervisor.containment.container import Container, ContainmentError
from worker_svc.supervisor.containment.containment import CGROUP, SUBREAPER, Containment
from worker_svc.supervisor.containment.groups import Usage

__all__ = ["CGROUP", "SUBREAPER", "Container", "Containment", "ContainmentError", "Usage"]
