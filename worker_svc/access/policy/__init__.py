"""Which jobs may be started: pure decisions (`rules`) over files that were looked up and opened (`lookup`)."""

from worker_svc.access.policy.advice import advice
from worker_svc.access.policy.command_policy import CommandPolicy, Judged, base_env
from worker_svc.access.policy.lookup import Found, find_command, find_script
from worker_svc.access.policy.lookups import Lookups
from worker_svc.access.policy.rules import DEFAULT_RULE, Decision, Files

__all__ = [
    "DEFAULT_RULE",
    "CommandPolicy",
    "Decision",
    "Files",
    "Found",
    "Judged",
    "Lookups",
    "advice",
    "base_env",
    "find_command",
    "find_script",
]
