"""Which jobs may be started: pure decisions (`rules`) over files that were looked up and opened (`lookup`)."""

from worker_svc.access.policy.advice import advice
from worker_svc.access.policy.command_policy import CommandPolicy, Judged, base_env
from worker_svc.access.policy.lookups import Lookups
from worker_svc.access.policy.rules import DEFAULT_RULE, Decision

__all__ = ["DEFAULT_RULE", "CommandPolicy", "Decision", "Judged", "Lookups", "advice", "base_env"]
