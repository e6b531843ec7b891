"""worker.toml, the environment and flags → one frozen, validated `Config`.

Precedence, highest first: flag, environment variable, file, default. Every key is declared in one place, `sections` and
the modules it brings together; how it is parsed, checked, named (`--jobs-slots`, `WORKER_SVC_JOBS_SLOTS`) and shown in
documentation follows from that declaration.
"""

from worker_svc.address import Address
from worker_svc.config.access_sections import AccessConfig, PolicyConfig
from worker_svc.config.errors import ConfigError, Problem
from worker_svc.config.keys import Key, flag_name, keys, variable_name
from worker_svc.config.limit_sections import LimitsConfig, SandboxConfig
from worker_svc.config.load import (
    CONFIG_VARIABLE,
    DEFAULT_FILE,
    MAX_FILE_BYTES,
    Loaded,
    load,
)
from worker_svc.config.policy_rules import PolicyRules
from worker_svc.config.sections import (
    Config,
    GrpcServerConfig,
    JobsConfig,
    LogConfig,
    SchedulerConfig,
    StateConfig,
    SupervisorConfig,
)
from worker_svc.config.transport_section import TransportConfig
from worker_svc.config.values import Variables

__all__ = [
    "CONFIG_VARIABLE",
    "DEFAULT_FILE",
    "MAX_FILE_BYTES",
    "AccessConfig",
    "Address",
    "Config",
    "ConfigError",
    "GrpcServerConfig",
    "JobsConfig",
    "Key",
    "LimitsConfig",
    "Loaded",
    "LogConfig",
    "PolicyConfig",
    "PolicyRules",
    "Problem",
    "SandboxConfig",
    "SchedulerConfig",
    "StateConfig",
    "SupervisorConfig",
    "TransportConfig",
    "Variables",
    "flag_name",
    "keys",
    "load",
    "variable_name",
]
