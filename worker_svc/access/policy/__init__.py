"""Which jobs may be started: pure decisions (`rules`) over files that were looked up and opened (`lookup`)."""

from worker_svc.access.policy.advice import advice
from worker_svc.access.policy.command_policy import CommandPolicy, Judged, base_env
from worker_svc.access.policy.lookup_threads import LookupThreads
from worker_svc.access.policy.rules import DEFAULT_RULE, Decision

__all__ = ["DEFAULT_RULE", "CommandPolicy", "Decision", "Judged", "LookupThreads", "advice", "base_env"]
