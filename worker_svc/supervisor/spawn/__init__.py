"""From a launch plan to a running process: in its own session, with nothing of ours but what the plan says.

By the C extension (native.py) or, where it was not built, in pure Python (fallback.py); steps.py is common to both.
"""

from worker_svc.supervisor.spawn.plan import PIPE_MODES, LaunchPlan, Spawned, SpawnFailed, start_ticks_of
from worker_svc.supervisor.spawn.spawner import IMPLEMENTATION, NATIVE, PYTHON, SPAWNER_THREADS, Spawner, spawn

__all__ = [
    "IMPLEMENTATION",
    "NATIVE",
    "PIPE_MODES",
    "PYTHON",
    "SPAWNER_THREADS",
    "LaunchPlan",
    "SpawnFailed",
    "Spawned",
    "Spawner",
    "spawn",
    "start_ticks_of",
]
