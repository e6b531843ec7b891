"""The log: structlog set-up, and each transition as one line, exactly once and in order.

The worker can be killed between a line and the note that it was written. The note, `worker.cursor` in the state
directory, follows its line at once; and when the log is a file, its own tail has the last word.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import stat
import sys
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Final

import structlog
from structlog.typing import FilteringBoundLogger

from worker_svc import frames
from worker_svc.config import LogConfig
from worker_svc.job import JobState, Outcome, Transition, signal_name
from worker_svc.masking import MASK, Masker
from worker_svc.supervisor import crashpoints

_CATCH_UP_PAGE: Final = 512
_TAIL_BYTES: Final = 256 * 1024
_CONSOLE_TRANSITION: Final = re.compile(rb"job\.transition\s+worker=(\w+)\s+sequence=(\d+)")
_ANSI: Final = re.compile(rb"\x1b\[[0-9;]*m")


class _LineLogger:
    """Writes each line with one write(2), so that lines of several writers do not mix."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._is_cut = False
        """Whether the last line was written in part."""

    def msg(self, line: str) -> bool:
        """False: it could not be written (a full disk, a pipe nobody reads): no reason for the worker to end."""
        whole = (b"\n" if self._is_cut else b"") + line.encode("utf-8", "backslashreplace") + b"\n"
        rest = memoryview(whole)
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError:
            self._is_cut = self._is_cut or len(rest) < len(whole)
            return False
        self._is_cut = False
        return True

    debug = info = warning = error = critical = exception = msg


class _Forward(logging.Handler):
    """What libraries log goes into our log."""

    def __init__(self, log: FilteringBoundLogger) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        self._log.log(record.levelno, "library.log", logger=record.name, message=text)


class _MaskSecrets:
    """Of every line: values whose keys look like a secret's, wherever in the line they stand."""

    def __init__(self, masker: Masker) -> None:
        self._masker = masker

    def __call__(self, logger: object, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        for key, value in event.items():
            if value is not None and not isinstance(value, int | float):
                event[key] = self._shown(value)
        return event

    def _shown(self, value: Any) -> Any:
        match value:
            case str():
                return self._masker.text(value)
            case None | int() | float():
                return value
            case Mapping():
                return {
                    key: MASK if isinstance(inner, str) and self._masker.hides(str(key)) else self._shown(inner)
                    for key, inner in value.items()
                }
            # Of a NamedTuple the repr: it hides what is secret.
            case list() | tuple() if not hasattr(value, "_fields"):
                return [self._shown(inner) for inner in value]
        return self._masker.text(repr(value))


def set_up_log(config: LogConfig, masker: Masker | None = None) -> tuple[FilteringBoundLogger, int]:
    """The logger for everything, and the fd it writes to. Raises OSError if the log file cannot be opened."""
    fd = 2 if config.file is None else _open_log(config.file)
    is_terminal = os.isatty(fd)
    with_colors = is_terminal and not os.environ.get("NO_COLOR")
    as_json = config.format == "json" or (config.format == "auto" and not is_terminal)
    render: Any = (
        structlog.processors.JSONRenderer(serializer=_to_json)
        if as_json
        else structlog.dev.ConsoleRenderer(colors=with_colors, sort_keys=False)
    )
    level = logging.getLevelNamesMapping()[config.level.upper()]
    log: FilteringBoundLogger = structlog.wrap_logger(
        _LineLogger(fd),
        processors=[
            structlog.processors.format_exc_info,
            _MaskSecrets(masker or Masker()),
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([_event_first] if as_json else []),
            render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
    )
    logging.basicConfig(handlers=[_Forward(log)], format="%(message)s", level=max(level, logging.WARNING), force=True)
    return log, fd


def audit_log(log: FilteringBoundLogger) -> FilteringBoundLogger:
    """The same log, whatever its level: who did what is written in any case."""
    bound: Any = log.bind()
    unfiltered: FilteringBoundLogger = structlog.wrap_logger(
        bound._logger,
        processors=bound._processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.NOTSET),
    )
    return unfiltered


def _open_log(path: Path) -> int:
    # A link could lead to any file of ours, and we would append to it. Those in /dev are the machine's.
    no_link = 0 if path.parent == Path("/dev") else os.O_NOFOLLOW
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | no_link, 0o600)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "is a symbolic link: name the file itself", str(path)) from None
        raise


def _to_json(event: Mapping[str, Any], **options: Any) -> str:
    return json.dumps(event, separators=(",", ":"), default=repr, ensure_ascii=False)


def _event_first(logger: object, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Time, level and event lead the line, for those who read it with their eyes."""
    lead = {key: event.pop(key) for key in ("timestamp", "level", "event")}
    return {**lead, **event}


class TransitionLog:
    """Logs transitions; knows across restarts which one was last."""

    def __init__(
        self,
        log: FilteringBoundLogger,
        log_fd: int,
        state_dir: Path,
        worker_id: str,
        read: Callable[[int, int], Sequence[Transition]],
    ) -> None:
        """`read` gives at most so many transitions after a sequence number. Raises OSError."""
        self._read = read
        self._log = log.bind(worker=worker_id)
        self._fd = os.open(state_dir / frames.CURSOR_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._worker_id = worker_id.encode()
        noted = os.pread(self._fd, 8 + len(self._worker_id) + 1, 0)
        # The cursor of a store that was removed says nothing of this one, whose numbers begin anew.
        known = int.from_bytes(noted[:8], "little") if noted[8:] == self._worker_id else 0
        self.sequence = max(known, _last_logged(log_fd, worker_id))
        """The last transition that was logged."""
        self._note()

    def write(self, batch: Sequence[Transition]) -> bool:
        """Logs those of the batch that are not logged. False: the log cannot be written now; `catch_up` later."""
        # What could not be written before comes first.
        if batch and batch[0].sequence > self.sequence + 1 and not self.catch_up():
            return False
        for moved in batch:
            if moved.sequence > self.sequence:
                # None: the level leaves such lines out.
                if self._log.info("job.transition", **fields_of(moved)) is False:
                    return False
                if crashpoints.is_armed:
                    crashpoints.reach("line-written")
                self.sequence = moved.sequence
                self._note()
        return True

    def catch_up(self) -> bool:
        """Logs all that the store has and the log has not. False: it still cannot be written."""
        while batch := self._read(self.sequence, _CATCH_UP_PAGE):
            # The store begins later than the log ends: what was removed there cannot be logged any more.
            self.sequence = max(self.sequence, batch[0].sequence - 1)
            if not self.write(batch):
                return False
        return True

    def _note(self) -> None:
        os.pwrite(self._fd, self.sequence.to_bytes(8, "little") + self._worker_id, 0)

    def close(self) -> None:
        os.close(self._fd)


def fields_of(moved: Transition) -> dict[str, Any]:
    """A transition's line: only what applies to it, durations in seconds."""
    fields: dict[str, Any] = {
        "sequence": moved.sequence,
        "job_id": moved.job_id,
        "from_state": moved.from_state.name,
        "to_state": moved.to_state.name,
        "at_ns": moved.at_ns,
    }
    if moved.pid:
        fields["pid"] = moved.pid
    if moved.to_state is JobState.FINISHED and moved.outcome is not Outcome.NONE:
        fields["outcome"] = moved.outcome.name
    if moved.exit_code is not None:
        fields["exit_code"] = moved.exit_code
    if moved.signal is not None:
        fields["signal"] = signal_name(moved.signal)
    if moved.reason:
        fields["reason"] = moved.reason
    for name, ns in (("queued_s", moved.queued_ns), ("wall_s", moved.wall_ns), ("cpu_s", moved.cpu_ns)):
        if ns is not None:
            fields[name] = round(ns / 1e9, 6)
    return fields


def _last_logged(fd: int, worker_id: str) -> int:
    """The last sequence number in the tail of the log, if that is a file. A line cut short is ended, not counted."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return 0
    path = f"/proc/self/fd/{fd}"
    try:
        reader = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:  # a file we may write and not read: the cursor alone has to do
        print(f"worker-svc: the log cannot be read back: {error}", file=sys.stderr)
        return 0
    try:
        size = os.fstat(reader).st_size
        tail = os.pread(reader, _TAIL_BYTES, max(0, size - _TAIL_BYTES))
    finally:
        os.close(reader)
    if tail and not tail.endswith(b"\n"):
        os.write(fd, b"\n")
        whole, newline, torn = tail.rpartition(b"\n")
        if not torn.startswith(b"{"):  # of JSON it shows whether only the line feed is missing
            tail = whole + newline
    for line in reversed(tail.splitlines()):
        if b"job.transition" in line:
            sequence = _sequence_in(line, worker_id)
            if sequence:
                return sequence
    return 0


def _sequence_in(line: bytes, worker_id: str) -> int:
    """Zero if the line is not a whole one of a transition of ours."""
    if line.startswith(b"{"):
        try:
            fields = json.loads(line)
        except ValueError:
            return 0  # cut short when the worker was killed: as good as not written
        is_ours = fields.get("event") == "job.transition" and fields.get("worker") == worker_id
        return int(fields.get("sequence", 0)) if is_ours else 0
    found = _CONSOLE_TRANSITION.search(_ANSI.sub(b"", line))
    return int(found[2]) if found and found[1] == worker_id.encode() else 0
