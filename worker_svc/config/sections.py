"""The keys of worker.toml: each is declared in one place, with its default, what it takes and what it is for.

A new section is a dataclass and a field of `Config`, and goes into the sample worker.toml; nothing else changes. The
longer ones have modules of their own.
"""

# ruff: noqa: RUF009 -- declare() is dataclasses.field() with a kind and a doc: its values are immutable.

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from worker_svc.address import Address
from worker_svc.config.access_sections import AccessConfig, PolicyConfig
from worker_svc.config.declare import A_MOMENT_S, Conflict, Section, declare
from worker_svc.config.kinds import SIGNAL, TEXT, UMASK, VARIABLE_NAMES, Bool, Choice, VariableTable, Whole, seconds
from worker_svc.config.limit_sections import LimitsConfig, SandboxConfig
from worker_svc.config.path_kinds import DialAddress, Directory, FilePath, ListenAddress, default_state_dir
from worker_svc.config.transport_section import TransportConfig
from worker_svc.config.values import Variables
from worker_svc.job import parse_signal

OutputPolicyName = Literal["drop_head", "stop", "none"]
OutputViaName = Literal["pipe", "file"]
ContainmentName = Literal["auto", "cgroup", "subreaper"]
SpawnerName = Literal["auto", "native", "python"]
OnReboot = Literal["start", "drop"]
LeaderExitName = Literal["kill", "wait"]
TlsVersion = Literal["1.2", "1.3"]
LogFormat = Literal["auto", "json", "console"]
LogLevel = Literal["debug", "info", "warning", "error"]
WhenUnwritable = Literal["refuse", "hold", "serve"]


_CLOSE_IT = (
    "demand client certificates (use_tls, client_ca_file; `worker-svc gen-certs` makes some), or serve on 127.0.0.1 or "
    "a unix socket. If that is what you want, say insecure = true"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpcServerConfig(Section):
    """The gRPC server that schedulers and clients speak to."""

    addr: Address = declare(
        "127.0.0.1:50000",
        ListenAddress(),
        "Address to serve on: host:port, [ipv6]:port or unix:/path. Port 0 takes a free one, an empty host "
        "every interface.",
    )
    use_tls: bool = declare(False, Bool(), "Serve with TLS.")
    crt_file: Path | None = declare("server.pem", FilePath(), "The server's certificate chain (PEM).")
    key_file: Path | None = declare("server.key", FilePath(), "The private key of that certificate (PEM).")
    client_ca_file: Path | None = declare(
        "", FilePath(), "Demand client certificates signed by one of these (PEM). Empty: clients need none."
    )
    crl_file: Path | None = declare(
        "", FilePath(), "Client certificates that were revoked (a CRL, PEM); needs client_ca_file. Empty: none."
    )
    tls_min_version: TlsVersion = declare(
        "1.3", Choice(TlsVersion), 'The oldest version of TLS that is spoken: "1.3" or "1.2".'
    )
    insecure: bool = declare(
        False,
        Bool(),
        "Serve on addresses that other machines reach without asking clients for certificates: whoever reaches the "
        "worker can then run commands.",
    )
    unix_mode: str = declare(
        "0600", UMASK, 'Mode of the unix socket, in octal: "0660" lets its group connect. Empty: "0600".'
    )
    advertise_addr: Address | None = declare(
        "", DialAddress(), "Address given to the scheduler. Empty: the one served on."
    )
    drain_grace_s: float = declare(
        10.0, seconds(), "Seconds that running requests get to finish when the worker shuts down."
    )

    def conflicts(self) -> Iterator[Conflict]:
        if self.client_ca_file and not self.use_tls:
            yield ("client_ca_file", "use_tls"), "needs use_tls = true"
        if self.crl_file and not self.client_ca_file:
            yield ("crl_file", "client_ca_file"), "needs client_ca_file as well"
        if not self.addr.is_loopback and not self.client_ca_file and not self.insecure:
            yield (
                ("addr", "use_tls", "client_ca_file", "insecure"),
                f"{self.addr} can be reached from other machines, and whoever reaches it can run commands: {_CLOSE_IT}",
            )
        if self.use_tls:
            for name in ("crt_file", "key_file"):
                if not getattr(self, name):
                    yield (name, "use_tls"), "must not be empty when use_tls is true"
        if self.advertise_addr and self.advertise_addr.is_unspecified:
            text = f"must be a host that can be reached; {self.advertise_addr} stands for every interface"
            yield ("advertise_addr",), text


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig(Section):
    """The scheduler to register with."""

    addr: Address | None = declare(
        "127.0.0.1:3000", DialAddress(), "The scheduler's address. Empty: no scheduler, do not register."
    )
    use_tls: bool = declare(False, Bool(), "Connect with TLS.")
    ca_file: Path | None = declare(
        "", FilePath(), "Certificates to verify the scheduler with (PEM). Empty: those of the system."
    )
    crt_file: Path | None = declare("", FilePath(), "Client certificate to show (PEM). Empty: none.")
    key_file: Path | None = declare("", FilePath(), "The private key of that certificate (PEM).")
    tls_min_version: TlsVersion = declare(
        "1.3", Choice(TlsVersion), 'The oldest version of TLS that is spoken: "1.3" or "1.2".'
    )
    server_name: str = declare(
        "", TEXT, "Name expected in the scheduler's certificate. Empty: the host of the address."
    )
    register_timeout_s: float = declare(5.0, seconds(A_MOMENT_S), "Seconds one attempt to register may take.")
    backoff_initial_s: float = declare(0.2, seconds(A_MOMENT_S), "Seconds to wait after a first failed attempt.")
    backoff_max_s: float = declare(
        30.0, seconds(A_MOMENT_S), "The longest wait between attempts, in seconds; waits grow up to it."
    )
    keepalive_s: float = declare(10.0, seconds(A_MOMENT_S), "Seconds between checks that the scheduler is still there.")

    def conflicts(self) -> Iterator[Conflict]:
        if not self.use_tls:
            for name in ("ca_file", "crt_file", "key_file", "server_name"):
                if getattr(self, name):
                    yield (name, "use_tls"), "needs use_tls = true"
        if self.crt_file and not self.key_file:
            yield ("crt_file", "key_file"), "needs key_file as well"
        if self.key_file and not self.crt_file:
            yield ("key_file", "crt_file"), "needs crt_file as well"
        if self.backoff_initial_s > self.backoff_max_s:
            text = f"{self.backoff_initial_s:g} must not be more than backoff_max_s, {self.backoff_max_s:g}"
            yield ("backoff_initial_s", "backoff_max_s"), "backoff_initial_s " + text


@dataclass(frozen=True, slots=True, kw_only=True)
class JobsConfig(Section):
    """How jobs run, where the request does not say otherwise."""

    cwd: Path = declare(
        "", Directory(lambda place: place.cwd), "Working directory of jobs. Empty: the one the worker was started in."
    )
    slots: int = declare(
        0, Whole(0, 100_000), "Jobs that run at once. 0: automatic, the larger of 16 and 4 a usable CPU."
    )
    queue_length: int = declare(
        10_000, Whole(0, 10_000_000), "Jobs that may wait for a slot; more are refused. 0: none may wait."
    )
    timeout_s: float = declare(0.0, seconds(), "Seconds a job may run before it is stopped. 0: no limit.")
    stop_signal: str = declare(
        "SIGTERM", SIGNAL, 'Signal that asks a job to end, by name ("SIGTERM", "TERM") or number ("15").'
    )
    stop_grace_s: float = declare(10.0, seconds(), "Seconds a job has to stop before it is killed.")
    pass_env: tuple[str, ...] = declare(
        ["PATH", "HOME", "LANG", "LC_ALL", "TZ", "USER", "LOGNAME", "SHELL", "TMPDIR"],
        VARIABLE_NAMES,
        "Variables of the worker's own environment that jobs get.",
    )
    env: Variables = declare(
        {}, VariableTable(), "Fixed variables for every job, over those passed on. Values are never logged."
    )
    user: str = declare(
        "", TEXT, "User that jobs run as, by name or number, with its groups; needs root. Empty: the worker's own."
    )
    no_new_privs: bool = declare(
        True, Bool(), "Whether no program that a job runs can gain privileges: setuid bits and the like are ignored."
    )
    leader_exit: LeaderExitName = declare(
        "kill",
        Choice(LeaderExitName),
        'When a job\'s first process exits: "kill" what is left of the job, or "wait" for it.',
    )
    on_reboot: OnReboot = declare(
        "start", Choice(OnReboot), 'Jobs still queued when the machine reboots: "start" or "drop".'
    )

    @property
    def resolved_slots(self) -> int:
        """Jobs that run at once: `slots`, or the automatic number for the CPUs this process may use now."""
        return self.slots or max(16, 4 * _usable_cpus())

    @property
    def stop_signal_number(self) -> int:
        return parse_signal(self.stop_signal)


@dataclass(frozen=True, slots=True, kw_only=True)
class StateConfig(Section):
    """Where jobs, their records and their output are kept."""

    dir: Path = declare(
        "",
        Directory(default_state_dir),
        "State directory. Empty: $STATE_DIRECTORY (set by systemd), else $XDG_STATE_HOME/worker-svc, "
        "else ~/.local/state/worker-svc.",
        at_load=True,
    )
    min_free_bytes: int = declare(
        256 * 1024 * 1024,
        Whole(0, 2**60),
        "Free bytes below which no new job is taken (RESOURCE_EXHAUSTED). 0: no floor.",
    )
    min_free_inodes: int = declare(1000, Whole(0, 2**40), "Free inodes below which no new job is taken. 0: no floor.")


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputConfig(Section):
    """What is kept of a job's output while it writes."""

    via: OutputViaName = declare(
        "pipe",
        Choice(OutputViaName),
        'How output gets into its file: by a "pipe", or the job has the "file" itself, which scripts that write to '
        "/dev/stderr truncate.",
    )
    max_bytes: int = declare(
        1024 * 1024 * 1024,
        Whole(0, 2**60),
        "Bytes of output kept of a job, where the request does not say otherwise. 0: all.",
    )
    max_bytes_limit: int = declare(0, Whole(0, 2**60), "The most that a request may ask for. 0: no limit.")
    policy: OutputPolicyName = declare(
        "drop_head",
        Choice(OutputPolicyName),
        'When a job writes more: "drop_head" gives the oldest bytes back, "stop" stops the job, "none" keeps all.',
    )

    def conflicts(self) -> Iterator[Conflict]:
        if self.max_bytes_limit and not 0 < self.max_bytes <= self.max_bytes_limit:
            text = f"{self.max_bytes} must be from 1 to max_bytes_limit, {self.max_bytes_limit}"
            yield ("max_bytes", "max_bytes_limit"), "max_bytes " + text
        if self.max_bytes_limit and self.policy == "none":
            yield ("policy", "max_bytes_limit"), 'policy "none" keeps all, so max_bytes_limit cannot hold'


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionConfig(Section):
    """How long finished jobs, their records and their output, are kept. The oldest go first."""

    max_age_s: float = declare(30 * 86400.0, seconds(), "Seconds after its end that a job is kept. 0: for ever.")
    max_jobs: int = declare(100_000, Whole(0, 10**9), "Finished jobs that are kept. 0: all.")
    max_bytes: int = declare(
        10 * 1024 * 1024 * 1024, Whole(0, 2**60), "Bytes on disk that output of finished jobs may take. 0: any."
    )
    max_events: int = declare(
        1_000_000, Whole(1000, 10**9), "Transitions that are kept to be watched again, once they are logged."
    )
    max_ids: int = declare(
        100_000,
        Whole(0, 10**9),
        "Job ids that are remembered of the latest jobs that retention or PruneJobs took: who repeats the start of one "
        "is told that it is finished, and nothing runs again. 0: none.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorConfig(Section):
    """The supervisor process, parent of the jobs."""

    idle_exit_s: float = declare(60.0, seconds(), "Seconds it stays while it has neither a job nor a worker.")
    containment: ContainmentName = declare(
        "auto",
        Choice(ContainmentName),
        'How jobs are held together: "cgroup", "subreaper" or "auto", the best there is. For a new supervisor.',
    )
    spawner: SpawnerName = declare(
        "auto",
        Choice(SpawnerName),
        'What starts processes: "native" (the C extension), "python" or "auto". For a new supervisor.',
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig(Section):
    """The worker's log."""

    format: LogFormat = declare(
        "auto", Choice(LogFormat), '"json", "console" or "auto": console on a terminal, else json.'
    )
    level: LogLevel = declare(
        "info", Choice(LogLevel), 'The least that is logged: "debug", "info", "warning" or "error".'
    )
    file: Path | None = declare(
        "", FilePath(), "File to append to. Empty: standard error. Opened anew on SIGHUP, and when it was moved away."
    )
    when_unwritable: WhenUnwritable = declare(
        "refuse",
        Choice(WhenUnwritable),
        'While the log file cannot be written, calls that change something: "refuse", "hold" until it can, or "serve".',
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole configuration. Made by hand it needs only `state`, and paths stay as they are."""

    grpc_server: GrpcServerConfig = field(default_factory=GrpcServerConfig)
    access: AccessConfig = field(default_factory=AccessConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    transport: TransportConfig = field(default_factory=TransportConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    jobs: JobsConfig = field(default_factory=JobsConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    state: StateConfig
    output: OutputConfig = field(default_factory=OutputConfig)
    retention: RetentionConfig = field(default_factory=RetentionConfig)
    supervisor: SupervisorConfig = field(default_factory=SupervisorConfig)
    log: LogConfig = field(default_factory=LogConfig)


def _usable_cpus() -> int:
    # Where there is affinity, it is what containers and taskset limit.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
