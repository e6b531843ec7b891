"""The log: structlog set-up, the audit, and each transition as one line, once and in order."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import structlog
from structlog.typing import FilteringBoundLogger

from worker_svc.config import LogConfig
from worker_svc.job import Transition, Unavailable
from worker_svc.masking import MASK, Masker
from worker_svc.printable import printable
from worker_svc.telemetry.file import LogFile
from worker_svc.telemetry.transitions import TransitionLog, fields_of
from worker_svc.telemetry.writer import HELD_MAX_BYTES, LogWriter
from worker_svc.token_bucket import TokenBucket

__all__ = ["Audit", "Log", "TransitionLog", "fields_of", "set_up_log"]

_LEAVE_TIMEOUT_S: Final = 2.0
_STRANGERS_BURST: Final = 100.0
_STRANGERS_PER_S: Final = 1.0
_LEFT_OUT_TOLD_S: Final = 10.0
# What is held back of ordinary lines leaves as much room for those of the audit.
_ORDINARY_MAX_BYTES: Final = HELD_MAX_BYTES // 2


class Log:
    """The worker's log: its lines, those of the audit, and what writes them."""

    def __init__(self, config: LogConfig, masker: Masker) -> None:
        """Raises OSError if the log file cannot be opened."""
        file = LogFile(config.file)
        self.writer = LogWriter(file)
        level = logging.getLevelNamesMapping()[config.level.upper()]
        processors = _processors(config.format, masker, is_terminal=os.isatty(file.fd))

        def logger(take: Callable[[bytes], object], least: int = level) -> FilteringBoundLogger:
            made: FilteringBoundLogger = structlog.wrap_logger(
                _LineLogger(take), processors=processors, wrapper_class=structlog.make_filtering_bound_logger(least)
            )
            return made

        self._lines = logger(bytes)
        self.events = logger(partial(self.writer.put, most_bytes=_ORDINARY_MAX_BYTES))
        # No level leaves out who did what.
        any_line = logger(bytes, logging.NOTSET)
        self.writer.notice = any_line.warning
        self.audit = Audit(logger(self.writer.put, logging.NOTSET), any_line, self.writer, config.when_unwritable)
        if file.is_torn:
            self.writer.put(b"\n")
        self._transitions: TransitionLog | None = None
        self._level = max(level, logging.WARNING)

    def transitions(
        self, state_dir: Path, worker_id: str, read: Callable[[int, int], Sequence[Transition]], latest: int
    ) -> TransitionLog:
        """See TransitionLog. Closed with the log."""
        self._transitions = TransitionLog(self.events, self._lines, self.writer, state_dir, worker_id, read, latest)
        return self._transitions

    def take_over(self) -> None:
        """What libraries and the interpreter have to say goes here too: standard error may stand still."""
        logging.basicConfig(handlers=[_Forward(self.events)], format="%(message)s", level=self._level, force=True)
        logging.captureWarnings(True)
        sys.unraisablehook = self._on_unraisable

    def _on_unraisable(self, found: sys.UnraisableHookArgs) -> None:
        self.events.error("library.unraisable", reason=found.err_msg, exc_info=found.exc_value)

    def close(self, timeout_s: float = _LEAVE_TIMEOUT_S) -> None:
        """Writes what is held back, unless that takes longer."""
        self.audit.tell_left_out()
        self.writer.close(timeout_s)
        if self._transitions is not None:
            self._transitions.close()
            self._transitions = None


class Audit:
    """Who did what, and what was not let be done."""

    def __init__(
        self, log: FilteringBoundLogger, lines: FilteringBoundLogger, writer: LogWriter, when_unwritable: str
    ) -> None:
        """`lines` makes lines, as bytes."""
        self._log = log
        self._lines = lines
        self._writer = writer
        self._when_unwritable = when_unwritable
        self._strangers = TokenBucket(_STRANGERS_PER_S, _STRANGERS_BURST, time.monotonic())
        self._left_out = 0
        self._last = 0

    def allowed(self, **fields: object) -> int:
        """The line's number; 0: there is no room to hold it back."""
        self._last = self._log.info("audit", decision="allowed", **fields)
        return self._last

    def not_allowed(self, **fields: object) -> None:
        self._last = self._log.warning("audit", **fields)

    async def settled(self) -> None:
        """Returns once all lines are written, or held back: they come before what the caller is told."""
        await self._writer.settled(self._last)

    def stranger(self, **fields: object) -> None:
        """As `not_allowed`, for callers without a role: anybody can make such lines, so only so many are written."""
        if self._strangers.take(time.monotonic()):
            self.not_allowed(**fields)
            return
        if not self._left_out:
            asyncio.get_running_loop().call_later(_LEFT_OUT_TOLD_S, self.tell_left_out)
        self._left_out += 1

    def handshake_refused(self, peer: str, reason: str) -> None:
        rule = f"TLS handshake: {reason}"
        self.stranger(identity="", role="none", peer=peer, rpc="", job_id="", decision="denied", rule=rule)

    def tell_left_out(self) -> None:
        left_out, self._left_out = self._left_out, 0
        if left_out:
            self._log.warning("audit.left_out", lines=left_out, reason="denials of callers without a role")

    async def allowed_first(self, *, makes_room: bool, **fields: object) -> None:
        """The line of what is done after it. Raises Unavailable if it cannot be written, and so must not be done.
        `makes_room`: it may use what of a full disk is kept for that."""
        writer = self._writer
        if self._when_unwritable == "serve":
            self.allowed(**fields)
            return
        is_urgent = makes_room and writer.problem
        if is_urgent and await writer.put_urgent(self._lines.info("audit", decision="allowed", **fields)):
            return
        if self._when_unwritable == "hold":
            await writer.usable()
        if writer.problem:
            raise _unwritable(writer.problem)
        number = self.allowed(**fields)
        if not number:
            raise _unwritable("too much waits to be written")
        # Where a reader stands still the line is held back, and nobody waits for it.
        if problem := await writer.settled(number):
            if self._when_unwritable == "refuse":
                raise _unwritable(problem)
            await writer.done(number)


def _unwritable(reason: str) -> Unavailable:
    return Unavailable(
        f"the worker's log cannot be written ({reason}), and what is not logged is not done "
        "(log.when_unwritable): ask again when its disk has room"
    )


def set_up_log(config: LogConfig, masker: Masker | None = None) -> Log:
    """The log for everything in this process. Raises OSError if the log file cannot be opened."""
    log = Log(config, masker or Masker())
    log.take_over()
    return log


def _processors(chosen: str, masker: Masker, *, is_terminal: bool) -> list[Any]:
    as_json = chosen == "json" or (chosen == "auto" and not is_terminal)
    with_colors = is_terminal and not os.environ.get("NO_COLOR")
    return [
        structlog.processors.format_exc_info,
        _MaskSecrets(masker),
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        *([_event_first, _to_json] if as_json else [_harmless, _console(colors=with_colors)]),
    ]


def _console(*, colors: bool) -> Any:
    return structlog.dev.ConsoleRenderer(colors=colors, sort_keys=False)


class _LineLogger:
    """What structlog calls with a finished line."""

    def __init__(self, take: Callable[[bytes], object]) -> None:
        self._take = take

    def msg(self, line: str) -> object:
        return self._take(line.encode("utf-8", "backslashreplace") + b"\n")

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
    """Hides in every line the values whose keys look like a secret's, wherever they stand."""

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
            # A NamedTuple is shown by its repr, which hides what is secret.
            case list() | tuple() if not hasattr(value, "_fields"):
                return [self._shown(inner) for inner in value]
        return self._masker.text(repr(value))


def _to_json(logger: object, method: str, event: MutableMapping[str, Any]) -> str:
    # Escaped as a whole: what is not printable can only stand within a string.
    return printable(json.dumps(event, separators=(",", ":"), default=repr, ensure_ascii=False))


def _harmless(logger: object, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """For the console, whose own colors must stay: each text by itself. A traceback keeps its lines, set in."""
    for key, value in event.items():
        if isinstance(value, str):
            lines = value.splitlines() if key == "exception" else ()
            event[key] = "\n".join(f"    {printable(line)}" for line in lines) or printable(value)
    return event


def _event_first(logger: object, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Time, level and event lead the line, for those who read it with their eyes."""
    lead = {key: event.pop(key) for key in ("timestamp", "level", "event")}
    return {**lead, **event}
