"""What to run: a job's specification and what can be wrong with it."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from itertools import chain
from json.encoder import encode_basestring_ascii
from typing import Any, Final, NamedTuple

from worker_svc.job.errors import InvalidArgument
from worker_svc.job.identity import PATH_MAX_BYTES, Identity, Sandbox
from worker_svc.job.limits import Limits, check_limits, limits_from_json
from worker_svc.job.secrets import NO_SECRETS
from worker_svc.job.texts import name_of

STDIN_MAX_BYTES: Final = 1024 * 1024
ARGS_MAX: Final = 4096
ENV_MAX: Final = 4096
LABELS_MAX: Final = 64
LABEL_KEY_MAX_BYTES: Final = 128
LABEL_VALUE_MAX_BYTES: Final = 1024
# One argument or environment string: MAX_ARG_STRLEN of execve(2), with its NUL.
ARG_MAX_BYTES: Final = 128 * 1024 - 1
# All of them together: a quarter of the usual 8 MiB stack is what execve(2) allows.
ARGV_ENV_MAX_BYTES: Final = 2 * 1024 * 1024 - 64 * 1024
# The one rule for the size of all that is asked for together, but standard input: of the JSON that is stored. Every
# frame, row and answer has room for it, so that what is accepted fits whatever comes later.
SPEC_MAX_BYTES: Final = 3 * 1024 * 1024
DURATION_MAX_S: Final = 10 * 366 * 24 * 3600.0

_WHOLE_MAX: Final = 2**63 - 1
# ASCII, since an environment can hold bytes that are no UTF-8, which Python keeps as lone surrogates (PEP 383).
_encode_json: Final = json.JSONEncoder(separators=(",", ":"), sort_keys=True).encode
# A character below U+10000 takes as many bytes at most (\u0001), others twice as many.
_JSON_GROWTH: Final = 6

_JOB_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")


def check_job_id(job_id: str, field: str = "jobID") -> None:
    """Raises InvalidArgument unless the id is well-formed (it becomes a file name)."""
    if not job_id:
        raise InvalidArgument(field, "must not be empty")
    if not is_job_id(job_id):
        raise InvalidArgument(
            field, "must be 1 to 128 letters, digits, '.', '_' or '-', and start with a letter or digit"
        )


def is_job_id(text: str) -> bool:
    return _JOB_ID.match(text) is not None


class OutputPolicy(IntEnum):
    """What happens when a job has written more than its output_max_bytes; the numbers are those of the wire."""

    DROP_HEAD = 1
    STOP = 2
    NONE = 3


class OutputVia(IntEnum):
    """How what a job writes gets into its output file; the numbers are those of the wire."""

    FILE = 1
    PIPE = 2


class LeaderExit(IntEnum):
    """What becomes of the rest of a job when its first process exits; the numbers are those of the wire."""

    KILL = 1
    WAIT = 2


class CheckedFile(NamedTuple):
    """A file that the policy has looked at: this one is run (or run in), or none."""

    field: str
    """`command`; `path`, the script, which is the first argument; or `cwd`, the directory."""
    path: str
    """Its real one, without symbolic links."""
    device: int
    inode: int
    changed_ns: int
    """Its ctime: of a file that is written to, or linked to, it moves. 0 of a directory, in which each new file moves
    it."""


class JobSpec(NamedTuple):
    """What to run, complete: a scheduler's request with the worker's defaults filled in.

    `env` is what the request asked for; the worker's own additions are not part of it. Its values, arguments (`path` is
    the first) and standard input can be secrets: they appear in no repr and no log line.
    """

    command: str
    path: str = ""
    args: tuple[str, ...] = ()
    env: dict[str, str] = {}  # noqa: RUF012 - never mutated; NamedTuple has no default_factory
    cwd: str = ""
    stdin_size_bytes: int = 0
    timeout_s: float = 0.0
    stop_signal: int = int(signal.SIGTERM)
    stop_grace_s: float = 10.0
    labels: dict[str, str] = {}  # noqa: RUF012
    separate_stderr: bool = False
    output_max_bytes: int = 0
    """Zero: no limit."""
    output_policy: OutputPolicy = OutputPolicy.DROP_HEAD
    limits: Limits = {}  # noqa: RUF012
    identity: Identity = Identity()
    sandbox: Sandbox = Sandbox()
    leader_exit: LeaderExit = LeaderExit.KILL
    checked: tuple[CheckedFile, ...] = ()
    """Empty: no policy restricts which files are run."""
    secret_env: tuple[str, ...] = ()
    """Names of variables whose values are nowhere but with the supervisor, until the process has them."""
    output_via: OutputVia = OutputVia.FILE
    """A record that does not say it is from when there was no other way."""

    def __repr__(self) -> str:
        return f"JobSpec(command={name_of(self.command)!r}, arguments={len(self.argv) - 1}, env={sorted(self.env)})"

    @property
    def argv(self) -> list[str]:
        return [self.command, *([self.path] if self.path else []), *self.args]

    @property
    def checked_argv(self) -> list[str]:
        """The script by the real path that was checked: its interpreter opens it by that."""
        script = next((file.path for file in self.checked if file.field == "path"), "")
        return [self.command, script, *self.argv[2:]] if script else self.argv

    @property
    def variables(self) -> tuple[str, ...]:
        """The names of all that the request sets."""
        return (*self.env, *self.secret_env)

    def validate(self, secrets: Mapping[str, str] = NO_SECRETS) -> None:
        """Raises InvalidArgument for the first field that is malformed, whatever the machine. `secrets`: the values of
        `secret_env`."""
        if not self.command:
            raise InvalidArgument("command", "must not be empty: name a program, such as bash")
        _check_string("path", self.path)
        for field, text in (("command", self.command), ("cwd", self.cwd)):
            _check_string(field, text, PATH_MAX_BYTES)
        if len(self.args) > ARGS_MAX:
            raise InvalidArgument("args", f"must be at most {ARGS_MAX}, not {len(self.args)}")
        for index, text in enumerate(self.args):
            _check_string(f"args[{index}]", text)
        _check_env("env", self.env)
        _check_env("secret_env", secrets)
        _check_secret_names(self)
        total = sum(len(text.encode()) + 9 for text in self.argv)
        total += sum(len(f"{key}={value}".encode()) + 9 for key, value in (*self.env.items(), *secrets.items()))
        if total > ARGV_ENV_MAX_BYTES:
            raise InvalidArgument("args", f"and env together must be below {ARGV_ENV_MAX_BYTES} bytes, not {total}")
        if self.cwd and not self.cwd.startswith("/"):
            raise InvalidArgument("cwd", f"must be an absolute path, not {name_of(self.cwd)!r}")
        if self.stdin_size_bytes > STDIN_MAX_BYTES:
            raise InvalidArgument("stdin", f"must be at most {STDIN_MAX_BYTES} bytes, not {self.stdin_size_bytes}")
        if self.output_max_bytes > _WHOLE_MAX:
            raise InvalidArgument("output_max_bytes", f"must be at most {_WHOLE_MAX}, not {self.output_max_bytes}")
        check_duration("timeout", self.timeout_s)
        check_duration("stop_grace", self.stop_grace_s)
        check_labels(self.labels)
        self._validate_nested()

    def _validate_nested(self) -> None:
        # Most jobs ask for none of these, and are told so by one comparison.
        if self[_FIRST_NESTED:_END_NESTED] != _DEFAULTS[_FIRST_NESTED:_END_NESTED]:
            check_limits(self.limits)
            self.identity.validate()
            self.sandbox.validate()

    def to_json(self) -> dict[str, Any]:
        """A JSON object of the fields that are not at their defaults, always with `command`."""
        columns = zip(self._fields, self, _DEFAULTS, strict=True)
        fields: dict[str, Any] = {name: value for name, value, default in columns if value != default}
        for name in _NESTED:
            if name in fields:
                fields[name] = fields[name].to_json()
        return fields

    def to_text(self) -> str:
        """The JSON of it as it is sent and stored, in ASCII. Raises InvalidArgument if it is too large."""
        fields = self.to_json()
        text = _encode_json(fields)
        if len(text) > SPEC_MAX_BYTES:
            raise _too_large(max(fields, key=lambda name: len(_encode_json(fields[name]))))
        return text

    @property
    def brief(self) -> JobSpec:
        """Without what can be large and seldom matters among many jobs."""
        return self._replace(args=(), env={})

    @classmethod
    def from_text(cls, text: str) -> JobSpec:
        """The inverse of `to_text`. Raises TypeError, ValueError."""
        return cls.from_json(json.loads(text))

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> JobSpec:
        """The inverse of `to_json`; fields of a newer version are an error, TypeError."""
        fields = dict(fields)
        # Specs recorded up to 0.1.0 have them apart.
        apart = [fields.pop(name, {}) for name in ("process_limits", "cgroup_limits")]
        if any(apart):
            fields["limits"] = {**apart[0], **apart[1]}
        for name, kind in _KINDS.items():
            if name in fields:
                fields[name] = kind(fields[name])
        return cls(**fields)


# `command` has no default: the None in its place equals no command.
_DEFAULTS: Final = tuple(JobSpec._field_defaults.get(name) for name in JobSpec._fields)
_NESTED: Final = ("identity", "sandbox")
_FIRST_NESTED: Final = JobSpec._fields.index("limits")
_END_NESTED: Final = JobSpec._fields.index(_NESTED[-1]) + 1
# What JSON has no values of.
_KINDS: Final[dict[str, Callable[[Any], Any]]] = {
    "args": tuple,
    "secret_env": tuple,
    "output_policy": OutputPolicy,
    "limits": limits_from_json,
    "identity": Identity.from_json,
    "sandbox": Sandbox.from_json,
    "leader_exit": LeaderExit,
    "output_via": OutputVia,
    "checked": lambda files: tuple(CheckedFile(*file) for file in files),
}


def _check_string(field: str, text: str, most_bytes: int = ARG_MAX_BYTES) -> None:
    if "\0" in text:
        raise InvalidArgument(field, "must not contain a NUL character")
    size = len(text.encode())
    if size > most_bytes:
        raise InvalidArgument(field, f"must be at most {most_bytes} bytes, not {size}")


def _check_secret_names(spec: JobSpec) -> None:
    for name in spec.secret_env:
        if name in spec.env:
            raise InvalidArgument("secret_env", f"{name_of(name)!r} is in env too: give it in one of them")
        if name == "PATH":  # by which programs are looked up, also by those who must not know what is secret
            raise InvalidArgument("secret_env", "PATH is no secret: give it in env")


def _check_env(field: str, env: Mapping[str, str]) -> None:
    if len(env) > ENV_MAX:
        raise InvalidArgument(field, f"must be at most {ENV_MAX}, not {len(env)}")
    for key, value in env.items():
        if not key:
            raise InvalidArgument(field, "has an empty key")
        if "=" in key or "\0" in key:
            raise InvalidArgument(field, f"key {name_of(key)!r} must not contain '=' or NUL")
        if "\0" in value:
            raise InvalidArgument(field, f"the value of {name_of(key)!r} must not contain NUL")
        if len(key.encode()) + len(value.encode()) >= ARG_MAX_BYTES:
            raise InvalidArgument(field, f"{name_of(key)!r} and its value must be below {ARG_MAX_BYTES} bytes")


def check_size(texts: Mapping[str, Sequence[str]]) -> None:
    """Raises InvalidArgument for what is certainly too large a spec, before anything is made of all of it. The texts
    are by field, those that can be large."""
    if sum(sum(map(len, field)) for field in texts.values()) <= SPEC_MAX_BYTES // (2 * _JSON_GROWTH):
        return
    left = SPEC_MAX_BYTES
    for text in chain.from_iterable(texts.values()):
        left -= len(encode_basestring_ascii(text))
        if left < 0:
            raise _too_large(max(texts, key=lambda field: sum(map(len, texts[field]))))


def _too_large(field: str) -> InvalidArgument:
    problem = f"too large: all that is asked for must take at most {SPEC_MAX_BYTES} bytes as JSON in ASCII"
    return InvalidArgument(field, f"{problem}: pass large data in files or on standard input")


def check_labels(labels: Mapping[str, str]) -> None:
    """Raises InvalidArgument unless a job can have all of them."""
    if len(labels) > LABELS_MAX:
        raise InvalidArgument("labels", f"must be at most {LABELS_MAX}, not {len(labels)}")
    for key, value in labels.items():
        if not key or len(key.encode()) > LABEL_KEY_MAX_BYTES:
            raise InvalidArgument("labels", f"key {name_of(key)!r} must be 1 to {LABEL_KEY_MAX_BYTES} bytes long")
        if len(value.encode()) > LABEL_VALUE_MAX_BYTES:
            raise InvalidArgument(
                "labels", f"the value of {name_of(key)!r} must be at most {LABEL_VALUE_MAX_BYTES} bytes long"
            )


def check_duration(field: str, seconds: float) -> None:
    """Raises InvalidArgument unless `seconds` is from zero to ten years."""
    if seconds < 0:
        raise InvalidArgument(field, f"must not be negative, not {seconds:g} s")
    if seconds > DURATION_MAX_S:
        raise InvalidArgument(field, f"must be at most {DURATION_MAX_S:.0f} s (ten years), not {seconds:.0f} s")
