"""Limits of a spawned process."""

from __future__ import annotations

import pytest

from tests.support.kernel import landlock_abi
from tests.support.spawning import PATH, Launchpad, run_apart
from worker_svc.job import Identity

NOBODY = Identity("65534", "65534", ())


def has_landlock() -> bool:
    return landlock_abi() >= 3


landlock = pytest.mark.skipif(not has_landlock(), reason="this kernel has no Landlock with ABI 3 (Linux 6.2)")


def outcome_without_privileges(pad: Launchpad, fields: str, extra: str = "") -> str:
    """What the supervisor says or the job prints, if the supervisor has no capability of use."""
    code = f"""
        import os, resource, sys
        from tests.support.spawning import drop_capabilities
        {extra}
        drop_capabilities()
        from worker_svc.job.identity import Identity, Sandbox
        from worker_svc.supervisor.spawn import LaunchPlan, SpawnFailed, spawn
        plan = LaunchPlan(
            ["sh", "-c", "ls -A /tmp; cat /proc/net/dev | grep -c :; id -u"], {{"PATH": {PATH!r}}}, "/", b"",
            sys.argv[1], "", {fields}
        )
        try:
            os.waitpid(spawn(plan, {pad.implementation!r}).pid, 0)
            print(open(plan.stdout_path).read())
        except SpawnFailed as failure:
            print(failure)
    """
    return run_apart(code, str(pad.directory / "out")).strip()
