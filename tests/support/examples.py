"""Messages and our own types, with a value in every field."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from typing import Any

from worker_svc.job import (
    OutputPolicy,
)
from worker_svc.pb import jobscheduler as pb
from worker_svc.wire.messages.defaults import Defaults

# Type checkers take the members of betterproto's enums for plain integers.
wire: Any = pb

DEFAULTS = Defaults(
    cwd="/default",
    timeout_s=60.0,
    stop_signal=2,
    stop_grace_s=5.0,
    output_max_bytes=1000,
    output_max_bytes_limit=0,
    output_policy=OutputPolicy.NONE,
)

# Every field of the request, at no default.
FULL: dict[str, Any] = {
    "command": "bash",
    "path": "script.sh",
    "args": ["-x", ""],
    "env": {"KEY": "value", "EMPTY": ""},
    "cwd": "/tmp",
    "stdin": b"in\0put",
    "timeout": timedelta(seconds=1, microseconds=500_000),
    "stop_signal": "HUP",
    "stop_grace": timedelta(seconds=2),
    "labels": {"team": "red"},
    "separate_stderr": True,
    "job_id": "my-job",
    "output_max_bytes": 4096,
    "output_policy": pb.OutputPolicy.STOP,
    "limits": pb.Limits(
        memory_max_bytes=2**30,
        swap_max_bytes=0,
        cpu_max_cores=1.5,
        cpu_weight=50,
        pids_max=100,
        io_weight=60,
        memory_high_bytes=2**29,
        rlimits=[pb.Rlimit(name="RLIMIT_NOFILE", soft=10, hard=20), pb.Rlimit(name="core", soft=0)],
        nice=-5,
        cpu_affinity=[3, 0, 3],
        umask=0o27,
        oom_score_adj=500,
    ),
    "identity": pb.Identity(user="nobody", group="4", groups=pb.Groups(names=["adm", "5"]), no_new_privs=False),
    "sandbox": pb.Sandbox(
        read_only_paths=["/usr", "/lib"], read_write_paths=["/work"], private_tmp=True, no_network=True
    ),
    "leader_exit": pb.LeaderExit.WAIT,
    "secret_env": {"TOKEN": "hunter2", "A_SECRET": ""},
    "output_via": pb.OutputVia.PIPE,
}


def fields_of(message: type[Any]) -> set[str]:
    return {field.name for field in dataclasses.fields(message)}


def sent(message: Any) -> Any:
    """As it comes out at the other end of the wire."""
    return type(message)().parse(bytes(message))
