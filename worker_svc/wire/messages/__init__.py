"""Between the contract's messages and our own types; nothing else. Raises InvalidArgument, naming the field."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from worker_svc.job import (
    STDIN_MAX_BYTES,
    InvalidArgument,
    JobRecord,
    JobSpec,
    JobState,
    Outcome,
    OutputPolicy,
    SecretEnv,
    Transition,
    check_duration,
    check_job_id,
    check_size,
    parse_signal,
    signal_name,
)
from worker_svc.pb import jobscheduler as pb
from worker_svc.wire.messages.defaults import Defaults
from worker_svc.wire.messages.limits import (
    asked_for,
    identity_from,
    identity_message,
    limits_from,
    limits_message,
    sandbox_from,
    sandbox_message,
    way_from,
)

if TYPE_CHECKING:
    from worker_svc.ipc.messages import Status  # of which a client has no use

LIST_PAGE_MAX = 1000
LIST_PAGE_DEFAULT = 100
_DEFAULT_VIEW = pb.JobView(pb.JobView.UNSPECIFIED)


class Start(NamedTuple):
    spec: JobSpec
    stdin: bytes
    secrets: SecretEnv = SecretEnv()

    def __repr__(self) -> str:
        return f"Start({self.spec!r})"


def start_from(message: pb.StartJobReq, defaults: Defaults) -> Start:
    if len(message.stdin) > STDIN_MAX_BYTES:
        raise InvalidArgument("stdin", f"must be at most {STDIN_MAX_BYTES} bytes, not {len(message.stdin)}")
    spec = JobSpec(
        command=message.command,
        path=message.path,
        args=tuple(message.args),
        env=dict(message.env),
        cwd=message.cwd or defaults.cwd,
        stdin_size_bytes=len(message.stdin),
        timeout_s=seconds_from("timeout", message.timeout, defaults.timeout_s),
        stop_signal=signal_from("stop_signal", message.stop_signal, defaults.stop_signal),
        stop_grace_s=seconds_from("stop_grace", message.stop_grace, defaults.stop_grace_s),
        labels=dict(message.labels),
        separate_stderr=message.separate_stderr,
        output_max_bytes=_output_max_bytes_from(message.output_max_bytes, defaults),
        output_policy=_output_policy_from(message.output_policy, defaults),
        limits=limits_from(message.limits, defaults.limits),
        identity=identity_from(message.identity, defaults.limits),
        sandbox=sandbox_from(message.sandbox, defaults.limits),
        leader_exit=way_from("leader_exit", message.leader_exit, defaults.limits.leader_exit),
        secret_env=tuple(sorted(message.secret_env)),
        output_via=way_from("output_via", message.output_via, defaults.output_via),
    )
    secrets = SecretEnv(message.secret_env)
    spec.validate(secrets)
    return Start(spec, message.stdin, secrets)


def secrets_from(message: pb.StartJobReq) -> SecretEnv:
    """The secrets of a request whose job exists. Raises InvalidArgument."""
    secrets = SecretEnv(message.secret_env)
    JobSpec(message.command, secret_env=tuple(sorted(secrets))).validate(secrets)
    return secrets


def _output_max_bytes_from(asked: int | None, defaults: Defaults) -> int:
    if asked is None:
        return defaults.output_max_bytes
    limit = defaults.output_max_bytes_limit
    if limit and not 0 < asked <= limit:
        raise InvalidArgument("output_max_bytes", f"must be from 1 to {limit} on this worker, not {asked}")
    return asked


def _output_policy_from(asked: pb.OutputPolicy, defaults: Defaults) -> OutputPolicy:
    if asked not in OutputPolicy._value2member_map_ and asked != pb.OutputPolicy.UNSPECIFIED:
        raise InvalidArgument("output_policy", f"there is no policy {int(asked)}")
    policy = defaults.output_policy if asked == pb.OutputPolicy.UNSPECIFIED else OutputPolicy(asked)
    if policy is OutputPolicy.NONE and defaults.output_max_bytes_limit:
        raise InvalidArgument("output_policy", "NONE is not allowed on this worker, which limits output_max_bytes")
    return policy


def check_start_size(message: pb.StartJobReq) -> None:
    """Raises InvalidArgument."""
    texts: dict[str, Sequence[str]] = {"args": message.args, "env": [*message.env, *message.env.values()]}
    if message.sandbox is not None:
        texts["sandbox"] = [*message.sandbox.read_only_paths, *message.sandbox.read_write_paths]
    check_size(texts)


def fingerprint_of(message: pb.StartJobReq) -> str:
    """A digest of what is asked for, before any default of the worker: the same for the same request only, and for
    ever. Empty without a job id: it is by that that a request is repeated. Raises InvalidArgument."""
    if not message.job_id:
        return ""
    check_job_id(message.job_id, "job_id")
    asked: list[object] = [
        message.command,
        message.path,
        message.args,
        sorted(message.env.items()),
        message.cwd,
        hashlib.sha256(message.stdin).hexdigest(),
        None if message.timeout is None else message.timeout.total_seconds(),
        message.stop_signal,
        None if message.stop_grace is None else message.stop_grace.total_seconds(),
        sorted(message.labels.items()),
        message.separate_stderr,
        message.output_max_bytes,
        int(message.output_policy),
    ]
    if more := asked_for(message):
        asked.append(more)
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def seconds_from(field: str, duration: timedelta | None, default_s: float) -> float:
    if duration is None:
        return default_s
    seconds = duration.total_seconds()
    check_duration(field, seconds)
    return seconds


def signal_from(field: str, text: str, default: int) -> int:
    if not text:
        return default
    try:
        return parse_signal(text)
    except ValueError as error:
        raise InvalidArgument(field, str(error)) from error


def states_from(states: Sequence[pb.JobState]) -> tuple[JobState, ...]:
    known = []
    for state in states:
        if state == pb.JobState.UNSPECIFIED or state not in JobState._value2member_map_:
            raise InvalidArgument("states", f"there is no state {int(state)}")
        known.append(JobState(state))
    return tuple(known)


def ns_from(moment: datetime | None) -> int | None:
    """No further off than the store's times can be, which have 64 bits: from 1677 to 2262."""
    if moment is None:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    since_epoch = moment - _EPOCH
    ns = (since_epoch.days * 86_400 + since_epoch.seconds) * 1_000_000_000 + since_epoch.microseconds * 1000
    return max(-(2**63), min(ns, 2**63 - 1))


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def _moment(ns: int | None) -> datetime | None:
    return None if ns is None else _EPOCH + timedelta(microseconds=ns // 1000)


def _duration(ns: int | None) -> timedelta | None:
    return None if ns is None else timedelta(microseconds=ns // 1000)


def spec_message(spec: JobSpec) -> pb.JobSpec:
    return pb.JobSpec(
        command=spec.command,
        path=spec.path,
        args=list(spec.args),
        env=dict(spec.env),
        cwd=spec.cwd,
        stdin_size_bytes=spec.stdin_size_bytes,
        timeout=timedelta(seconds=spec.timeout_s),
        stop_signal=signal_name(spec.stop_signal),
        stop_grace=timedelta(seconds=spec.stop_grace_s),
        labels=dict(spec.labels),
        separate_stderr=spec.separate_stderr,
        output_max_bytes=spec.output_max_bytes,
        output_policy=pb.OutputPolicy(int(spec.output_policy)),
        limits=limits_message(spec.limits),
        identity=identity_message(spec.identity),
        sandbox=sandbox_message(spec.sandbox),
        leader_exit=pb.LeaderExit(int(spec.leader_exit)),
        secret_env=list(spec.secret_env),
        output_via=pb.OutputVia(int(spec.output_via)),
    )


class OutputFiles(NamedTuple):
    """A job's output files: paths (of standard error empty if it is not separate) and sizes in bytes."""

    output: str
    stderr: str
    output_size_bytes: int
    stderr_size_bytes: int


def job_message(record: JobRecord, files: OutputFiles, monotonic_ns: int, view: pb.JobView = _DEFAULT_VIEW) -> pb.Job:
    """`monotonic_ns`: the time by the machine's monotonic clock."""
    wall_ns = record.wall_ns
    if record.state in (JobState.RUNNING, JobState.STOPPING) and record.started_ns is not None:
        wall_ns = max(0, monotonic_ns - record.started_monotonic_ns)
    has_spec = view != pb.JobView.NO_SPEC
    job = pb.Job(
        job_id=record.job_id,
        state=pb.JobState(int(record.state)),
        outcome=pb.Outcome(int(record.outcome)),
        exit_code=record.exit_code,
        signal="" if record.signal is None else signal_name(record.signal),
        error_text=record.reason if is_error(record) else "",
        pid=record.pid,
        accepted_at=_moment(record.accepted_ns),
        started_at=_moment(record.started_ns),
        finished_at=_moment(record.finished_ns),
        wall_time=_duration(wall_ns),
        cpu_time=_duration(record.cpu_ns),
        peak_memory_bytes=record.peak_memory_bytes,
        output_file=files.output,
        stderr_file=files.stderr,
        output_size_bytes=files.output_size_bytes,
        stderr_size_bytes=files.stderr_size_bytes,
        last_sequence=record.last_sequence,
        paused=bool(record.paused),
        stuck=record.stuck,
        owner=record.owner,
        output_loss=record.output_loss,
        left_out=[] if has_spec and not record.is_brief else ["spec.args", "spec.env"] if has_spec else ["spec"],
    )
    if has_spec:
        job.spec = spec_message(record.spec)
    return job


def query_message(record: JobRecord, files: OutputFiles, monotonic_ns: int) -> pb.QueryJobRes:
    job = job_message(record, files, monotonic_ns)
    return pb.QueryJobRes(
        done=record.state is JobState.FINISHED,
        error=is_error(record),
        error_text=job.error_text,
        job=job,
    )


def is_error(record: JobRecord) -> bool:
    return record.state is JobState.FINISHED and record.outcome is not Outcome.SUCCEEDED


def worker_message(status: Status, **known: Any) -> pb.GetWorkerRes:
    """From the supervisor's status; `known` is what the worker knows by itself."""
    return pb.GetWorkerRes(
        running=status.running,
        queued=status.queued,
        containment=status.containment,
        containment_reason=status.containment_reason,
        spawner=status.spawner,
        unenforceable={f"limits.{field}": reason for field, reason in status.unenforceable.items()},
        supervisor_uptime=_duration(status.uptime_ns),
        supervisor_pid=status.pid,
        last_sequence=status.sequence,
        can_drop_head=status.can_drop_head,
        output_degraded=status.output_degraded,
        **known,
    )


def transition_message(moved: Transition) -> pb.JobTransition:
    return pb.JobTransition(
        sequence=moved.sequence,
        job_id=moved.job_id,
        at=_moment(moved.at_ns),
        from_state=pb.JobState(int(moved.from_state)),
        to_state=pb.JobState(int(moved.to_state)),
        pid=moved.pid,
        outcome=pb.Outcome(int(moved.outcome)),
        exit_code=moved.exit_code,
        signal="" if moved.signal is None else signal_name(moved.signal),
        reason=moved.reason,
    )


def view_from(view: pb.JobView) -> pb.JobView:
    if view not in list(pb.JobView):
        raise InvalidArgument("view", f"there is no view {int(view)}")
    return view


def page_size_from(asked: int) -> int:
    if asked < 0:
        raise InvalidArgument("page_size", f"must not be negative, not {asked}")
    return min(asked or LIST_PAGE_DEFAULT, LIST_PAGE_MAX)


def page_token_from(token: str) -> int | None:
    """The ordinal that the page ends below."""
    if not token:
        return None
    if not (token.isascii() and token.isdigit() and len(token) < 19):
        raise InvalidArgument("page_token", "is not one that ListJobs gave")
    return int(token)
