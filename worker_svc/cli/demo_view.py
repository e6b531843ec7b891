"""What the demo looks like in a terminal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from worker_svc.cli.command import program
from worker_svc.printable import printable

_LABEL_WIDTH: Final = 8
_LOG_LINES: Final = 40

_BOLD, _DIM, _RED, _GREEN = "1", "2", "31", "32"


class View:
    """Prints sections, checks and the lines of jobs; counts what failed."""

    def __init__(self) -> None:
        self.failures = 0
        self._sections = 0
        self._colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        self._unicode = "utf" in (sys.stdout.encoding or "").lower()

    def title(self, text: str) -> None:
        self._print(self._paint(text, _BOLD))

    def section(self, text: str) -> None:
        self._sections += 1
        self._print()
        self._print(self._paint(f"{self._sections}  {text}", _BOLD))

    def done(self, text: str, *, since_s: float | None = None) -> None:
        took = "" if since_s is None else self._paint(f"  {time.monotonic() - since_s:.2f} s", _DIM)
        tick = "✓" if self._unicode else "ok"
        self._print(f"   {self._paint(tick, _GREEN)} {text}{took}")

    def check(self, good: bool, text: str, *, but: str = "") -> None:
        """An expectation: a tick if it is met, otherwise a cross, and what was there instead."""
        if good:
            self.done(text)
            return
        self.failures += 1
        cross = "✗" if self._unicode else "FAILED:"
        instead = f", but: {but}" if but else ""
        self._print(f"   {self._paint(f'{cross} {text}{instead}', _RED)}")

    def line(self, label: str, text: str, *, own: bool = False) -> None:
        """A line that the job `label` wrote, or with `own` one about it."""
        bar = self._paint("│" if self._unicode else "|", _DIM)
        shown = printable(text)
        self._print(f"   {label:<{_LABEL_WIDTH}}{bar} {self._paint(shown, _DIM) if own else shown}")

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        """Aligned; the first row is the head."""
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        for number, row in enumerate(rows):
            cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
            line = "   " + "  ".join(cells).rstrip()
            self._print(line if number else self._paint(line, _DIM))
        self._print()

    def note(self, text: str) -> None:
        self._print()
        self._print(text)

    def log(self, name: str, path: Path) -> None:
        """The end of a log, for whoever has to find out what failed."""
        self._print()
        self._print(self._paint(f"   {name}:", _BOLD))
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        for line in lines[-_LOG_LINES:] or ["(empty)"]:
            self._print(f"   {printable(line)}")

    def verdict(self, took_s: float) -> None:
        self._print()
        if self.failures:
            self._print(self._paint(f"Not all went as it should: {self.failures} of the above failed.", _RED))
            return
        self._print(f"{self._paint('All went as it should', _GREEN)}, in {took_s:.1f} s. Now by hand:")
        self._print(
            f"   {program()} serve                            # in one terminal; a scheduler may be there or not"
        )
        self._print(f"   {program()} run bash -c 'echo hi; exit 3'    # in another; then: {program()} list")

    def _paint(self, text: str, style: str) -> str:
        return f"\x1b[{style}m{text}\x1b[0m" if self._colour else text

    def _print(self, text: str = "") -> None:
        print(text, flush=True)
