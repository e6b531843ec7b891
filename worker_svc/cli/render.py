"""How jobs look to people and to programs. Pure: from messages to text, which `console.say` makes fit to be shown."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from worker_svc.cli.render_spec import (
    identity_json,
    identity_line,
    limits_json,
    limits_line,
    sandbox_json,
    sandbox_line,
)
from worker_svc.printable import printable

if TYPE_CHECKING:
    from worker_svc.pb.jobscheduler import Job, JobSpec

_SIZE_UNITS: Final = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_MINUTE_S: Final = 60
_HOUR_S: Final = 3600
_DAY_S: Final = 86400
# LeaderExit.WAIT, without the import that it would take.
_WAIT: Final = 2


def human_duration(duration: timedelta) -> str:
    """`4 ms`, `0.42 s`, `12.3 s`, `3m 05s`, `2h 04m`, `3d 04h`: about three figures."""
    total_s = max(duration.total_seconds(), 0)
    if total_s < 0.0995:
        return f"{total_s * 1000:.0f} ms"
    if total_s < 9.995:
        return f"{total_s:.2f} s"
    if total_s < 59.95:
        return f"{total_s:.1f} s"
    whole_s = round(total_s)
    if whole_s < _HOUR_S:
        return f"{whole_s // _MINUTE_S}m {whole_s % _MINUTE_S:02}s"
    if whole_s < _DAY_S:
        return f"{whole_s // _HOUR_S}h {whole_s % _HOUR_S // _MINUTE_S:02}m"
    return f"{whole_s // _DAY_S}d {whole_s % _DAY_S // _HOUR_S:02}h"


def human_size(size_bytes: int) -> str:
    """`0 B`, `1023 B`, `1.5 KiB`, `20 GiB`."""
    if size_bytes < 1024:
        return f"{size_bytes} B"
    size = float(size_bytes)
    for unit in _SIZE_UNITS:
        size /= 1024
        if size < 999.5 or unit == _SIZE_UNITS[-1]:
            break
    return f"{size:.1f} {unit}" if size < 99.95 else f"{size:.0f} {unit}"


def age(moment: datetime, now: datetime) -> str:
    """`5 s ago`, `3 min ago`, `2 h ago`, `4 d ago`; a clock that is a little ahead is no matter."""
    past_s = int((now - moment).total_seconds())
    if past_s < 1:
        return "just now"
    for unit_s, unit in ((_DAY_S, "d"), (_HOUR_S, "h"), (_MINUTE_S, "min")):
        if past_s >= unit_s:
            return f"{past_s // unit_s} {unit} ago"
    return f"{past_s} s ago"


def command_line(spec: JobSpec) -> str:
    """What the job executes, as one would type it into a shell."""
    argv = [spec.command, *([spec.path] if spec.path else []), *spec.args]
    return printable(shlex.join(argv))


def command_of(job: Job) -> str:
    return command_line(job.spec) + (" …" if "spec.args" in job.left_out else "")


def status_word(job: Job) -> str:
    """`running`, `running (paused)`; of a finished job how it ended: `failed`, `timed out`."""
    name = job.outcome.name if job.outcome else job.state.name
    word = (name or f"unknown ({int(job.state)})").lower().replace("_", " ")
    return f"{word} (paused)" if job.paused and not job.outcome else word


def exit_word(job: Job) -> str:
    """`3`, `SIGKILL`, or `-` if there is neither."""
    if job.exit_code is not None:
        return str(job.exit_code)
    return job.signal or "-"


_TABLE_HEAD: Final = ("ID", "STATUS", "EXIT", "STARTED", "WALL", "COMMAND")


def job_table(jobs: Sequence[Job], *, now: datetime, width: int | None) -> list[str]:
    """Aligned lines, the head first; cut at `width` characters unless that is None."""
    rows = [_TABLE_HEAD, *(_table_row(job, now) for job in jobs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_TABLE_HEAD) - 1)]
    lines = []
    for row in rows:
        padded = [f"{cell:<{cell_width}}" for cell, cell_width in zip(row, widths, strict=False)]
        lines.append(cut("  ".join([*padded, row[-1]]), width))
    return lines


def _table_row(job: Job, now: datetime) -> tuple[str, ...]:
    return (
        printable(job.job_id),
        status_word(job),
        printable(exit_word(job)),
        age(job.started_at, now) if job.started_at else "-",
        human_duration(job.wall_time) if job.wall_time is not None else "-",
        command_of(job),
    )


def cut(line: str, width: int | None) -> str:
    if width is None or len(line) <= width:
        return line
    return line[: max(width - 1, 0)] + "…"


def job_block(job: Job, *, now: datetime) -> list[str]:
    """All that is known of a job, as `key:  value` lines; what is unset is left out."""
    spec = job.spec
    facts = {
        "job": job.job_id,
        "owner": job.owner,
        "status": status_line(job),
        "command": command_of(job),
        "cwd": spec.cwd,
        # Values may be secret: --json shows them to those who ask.
        "env": ", ".join(spec.env),
        "secret env": ", ".join(spec.secret_env),
        "labels": ", ".join(f"{key}={value}" for key, value in spec.labels.items()),
        "stdin": human_size(spec.stdin_size_bytes) if spec.stdin_size_bytes else "",
        "pid": str(job.pid) if job.pid else "",
        "stuck": job.stuck,
        "accepted": _moment(job.accepted_at, now),
        "started": _moment(job.started_at, now),
        "finished": _moment(job.finished_at, now),
        "wall time": human_duration(job.wall_time) if job.wall_time is not None else "",
        "cpu time": human_duration(job.cpu_time) if job.cpu_time is not None else "",
        "peak memory": human_size(job.peak_memory_bytes) if job.peak_memory_bytes is not None else "",
        "timeout": _limit(spec.timeout) if spec.timeout else "",
        "to stop": _stop_line(spec),
        "limits": limits_line(spec.limits, human_size),
        "runs as": identity_line(spec.identity),
        "sandbox": sandbox_line(spec.sandbox),
        "ends": "when all of its processes are gone" if spec.leader_exit == _WAIT else "",
        "output limit": _output_limit(spec),
        "output": _file(job.output_file, job.output_size_bytes),
        "output loss": printable(job.output_loss),
        "stderr": _file(job.stderr_file, job.stderr_size_bytes) if spec.separate_stderr else "",
    }
    width = max(map(len, facts)) + 1
    return [f"{key + ':':<{width}}  {value}" for key, value in facts.items() if value]


def status_line(job: Job) -> str:
    """`running`, `running (paused)`, `succeeded`, `failed: exit status 3`, `timed out after 5 s (…)`."""
    word, text = status_word(job), job.error_text
    if not job.outcome or not text:
        return word
    if text.startswith(word):
        return text
    # "signaled: signal: killed" says it twice.
    return f"{word}: {text.removeprefix('signal: ') if word == 'signaled' else text}"


def _stop_line(spec: JobSpec) -> str:
    if not spec.stop_signal or spec.stop_grace is None:
        return spec.stop_signal
    if not spec.stop_grace:
        return "SIGKILL"
    return f"{spec.stop_signal}, then SIGKILL after {_limit(spec.stop_grace)}"


def _output_limit(spec: JobSpec) -> str:
    """The limit and what happens at it; nothing where there is none."""
    if not spec.output_max_bytes or spec.output_policy.name == "NONE":
        return ""
    at_limit = {"DROP_HEAD": ", the oldest goes", "STOP": ", then it is stopped"}
    return human_size(spec.output_max_bytes) + at_limit.get(spec.output_policy.name or "", "")


def _limit(duration: timedelta) -> str:
    """A duration that someone chose: 10 s, not 10.0 s."""
    total_s = duration.total_seconds()
    return f"{total_s:g} s" if total_s < _MINUTE_S else human_duration(duration)


def _moment(moment: datetime | None, now: datetime) -> str:
    return f"{moment.astimezone():%Y-%m-%d %H:%M:%S} ({age(moment, now)})" if moment else ""


def _file(path: str, size_bytes: int) -> str:
    return f"{path} ({human_size(size_bytes)})" if path else ""


def job_json(job: Job) -> dict[str, Any]:
    """For programs: plain names, seconds, bytes, UTC; null for what is not known (yet)."""
    spec = job.spec
    return {
        "job_id": job.job_id,
        "owner": job.owner,
        "state": job.state.name,
        "outcome": job.outcome.name if job.outcome else None,
        "exit_code": job.exit_code,
        "signal": job.signal or None,
        "error_text": job.error_text or None,
        "pid": job.pid or None,
        "accepted_at": _utc(job.accepted_at),
        "started_at": _utc(job.started_at),
        "finished_at": _utc(job.finished_at),
        "wall_time_s": _seconds(job.wall_time),
        "cpu_time_s": _seconds(job.cpu_time),
        "peak_memory_bytes": job.peak_memory_bytes,
        "output_file": job.output_file or None,
        "output_size_bytes": job.output_size_bytes,
        "stderr_file": job.stderr_file or None,
        "stderr_size_bytes": job.stderr_size_bytes,
        "output_loss": job.output_loss or None,
        "last_sequence": job.last_sequence,
        "paused": job.paused,
        "stuck": job.stuck or None,
        "left_out": list(job.left_out),
        "spec": {
            "command": spec.command,
            "path": spec.path,
            "args": list(spec.args),
            "env": _plain(spec.env),
            "secret_env": list(spec.secret_env),
            "cwd": spec.cwd,
            "stdin_size_bytes": spec.stdin_size_bytes,
            "timeout_s": _seconds(spec.timeout),
            "stop_signal": spec.stop_signal,
            "stop_grace_s": _seconds(spec.stop_grace),
            "labels": _plain(spec.labels),
            "separate_stderr": spec.separate_stderr,
            "output_max_bytes": spec.output_max_bytes,
            "output_policy": spec.output_policy.name,
            "output_via": spec.output_via.name,
            "limits": limits_json(spec.limits),
            "identity": identity_json(spec.identity),
            "sandbox": sandbox_json(spec.sandbox),
            "leader_exit": spec.leader_exit.name,
        },
    }


def _plain(table: Mapping[str, str]) -> dict[str, str]:
    return dict(table)


def _utc(moment: datetime | None) -> str | None:
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z") if moment else None


def _seconds(duration: timedelta | None) -> float | None:
    return None if duration is None else duration.total_seconds()
