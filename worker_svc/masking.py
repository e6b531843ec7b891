"""What looks like a secret does not show to those whose job it is not, nor in the log.

This is the second line. The first is that arguments, values of variables and the like are not shown at all (`record`),
and are in no reason, error or log line. Where a text is shown all the same, what follows the first word in it that is
the key of a secret is hidden, up to the end: rather too much than too little, and nothing has to be understood of how
values are quoted. A text is read once, from left to right.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from worker_svc.job import JobRecord, JobSpec, Sandbox, name_of

MASK: Final = "(hidden)"
# Not KEY alone: what comes before says what it opens.
DEFAULT_PATTERN: Final = "(?i)pass|pwd|secret|token|credential|auth|.key"
# Only the end of a longer key counts, so that the pattern, which is the administrator's, never meets a long text.
_KEY_MAX_CHARS: Final = 128
_SHOWN_MAX_CHARS: Final = 8192

# A word as keys are written, or one of those that make a password of `USER:PASSWORD@HOST`.
_PIECE: Final = re.compile(r"[\w.-]++|[:@\s]")
# After a key in a text of ours, which has colons also after the names of fields and files.
_ASSIGNED: Final = re.compile(r"""[\\"'\])}]*+\s*+[:+?]?=|\\*+["']\s*+:""")


class Masker:
    def __init__(self, pattern: str = DEFAULT_PATTERN, *, show_arguments: bool = False) -> None:
        """`pattern` is of keys; empty: nothing is a secret. Raises re.error."""
        self._pattern = re.compile(pattern) if pattern else None
        self._show_arguments = show_arguments

    def hides(self, key: str) -> bool:
        return self._pattern is not None and self._pattern.search(key[-_KEY_MAX_CHARS:]) is not None

    def text(self, text: str) -> str:
        """A text of ours, with the secrets hidden that it may quote, each to the end of its line."""
        text = _cut(text)
        if self._pattern is None or not (":" in text or "=" in text or "-" in text):
            return text
        shown = []
        for line in text.splitlines(keepends=True):
            end = self._end_of_shown(line, is_ours=True)
            shown.append(line if end == len(line) else line[:end] + MASK + "\n" * line.endswith("\n"))
        return "".join(shown)

    def argument(self, argument: str) -> str:
        """One that stands alone: what comes before it could make it a secret too, see `arguments`."""
        return self._argument(argument)[0]

    def _argument(self, argument: str) -> tuple[str, bool]:
        """And whether the next one is the secret, since this one ends with its key."""
        shown = _cut(argument)
        end = self._end_of_shown(f"{shown} ")
        if end > len(shown):
            return shown, False
        is_cut = len(shown) != len(argument)
        return (shown, True) if end == len(shown) else (f"{shown[:end]}{MASK}", is_cut)

    def _end_of_shown(self, text: str, *, is_ours: bool = False) -> int:
        """The length of `text` if all of it may be seen."""
        if self._pattern is None:
            return len(text)
        colon_end = 0
        """Behind the first colon in a word: what comes after it may belong to the secret that is found later."""
        for piece in _PIECE.finditer(text):
            end = piece.end()
            match text[end - 1]:
                case ":":
                    colon_end = colon_end or end
                case "@":
                    if colon_end:
                        return colon_end
                case blank if blank.isspace():
                    colon_end = 0
                case _ if end < len(text) and self.hides(piece[0].lstrip("-")):
                    if not is_ours or piece[0].startswith("-") or _ASSIGNED.match(text, end):
                        return colon_end or end + (text[end] in ":=")
        return len(text)

    def table(self, table: Mapping[str, str]) -> dict[str, str]:
        return {key: MASK if self.hides(key) else self.argument(value) for key, value in table.items()}

    def arguments(self, arguments: Sequence[str]) -> tuple[str, ...]:
        """`--token x` and `Authorization: x` too, also if x looks like an option."""
        shown: list[str] = []
        is_value = False
        for argument in arguments:
            text, announces = self._argument(argument)
            shown.append(MASK if is_value else text)
            # What was hidden can announce a value too: `--auth --password x` has either one secret or two.
            is_value = announces
        return tuple(shown)

    def spec(self, spec: JobSpec) -> JobSpec:
        """As those may see it whose job it is not."""
        if self._show_arguments:
            arguments = self.arguments((spec.command, spec.path, *spec.args))
            return spec._replace(
                command=arguments[0],
                path=arguments[1],
                args=arguments[2:],
                cwd=self.argument(spec.cwd),
                env=self.table(spec.env),
                labels=self.table(spec.labels),
            )
        return spec._replace(
            command=name_of(spec.command),
            path=name_of(spec.path),
            args=(MASK,) if spec.args else (),
            cwd=name_of(spec.cwd),
            env=dict.fromkeys(spec.env, MASK),
            labels=self.table(spec.labels),
            sandbox=_without_paths(spec.sandbox),
        )

    def told(self, spec: JobSpec) -> dict[str, Any]:
        """What the log says of a job that is started."""
        command = {"command": name_of(spec.command)}
        return {**command, "arguments": [*self.arguments(spec.argv)[1:]]} if self._show_arguments else command

    def record(self, record: JobRecord) -> JobRecord:
        """As those may see it whose job it is not."""
        return record._replace(spec=self.spec(record.spec), reason=self.text(record.reason))


def _cut(text: str) -> str:
    if len(text) <= _SHOWN_MAX_CHARS:
        return text
    return f"{text[:_SHOWN_MAX_CHARS]}… ({len(text) - _SHOWN_MAX_CHARS} more characters)"


def _without_paths(sandbox: Sandbox) -> Sandbox:
    if not (sandbox.read_only_paths or sandbox.read_write_paths):
        return sandbox
    return sandbox._replace(
        read_only_paths=(MASK,) if sandbox.read_only_paths else (),
        read_write_paths=(MASK,) if sandbox.read_write_paths else (),
    )
