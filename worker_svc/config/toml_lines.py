"""At which line of a TOML document each key stands; tomli does not tell."""

import re
from collections.abc import Mapping
from typing import Any

import tomli

KeyPath = tuple[str, ...]

# Triple-quoted strings may end in up to two more quotes that belong to the text.
_STRING = (
    r'"""(?:\\.|[^\\])*?"""(?:"{0,2})'
    r"|'''.*?'''(?:'{0,2})"
    r'|"(?:\\.|[^"\\\n])*"'
    r"|'[^'\n]*'"
)
_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_BLANK_OR_COMMA = re.compile(r"(?:[ \t\r\n,]|#[^\n]*)*")
_KEY = re.compile(rf"(?:{_STRING}|[^\"'=\]\n])*", re.DOTALL)
_HEADER = re.compile(r"\[\[?")
_SCALAR = re.compile(rf"{_STRING}|[^,\]}}\n#]*", re.DOTALL)
_TOKEN = re.compile(rf"{_STRING}|#[^\n]*|[\[{{]|[\]}}]|[^\[\]{{}}\"'#]+", re.DOTALL)

_DEEPEST = 3
"""section.key.entry: what lies deeper is no key of ours."""


def key_lines(document: str) -> Mapping[KeyPath, int]:
    """The line, from 1, at which each table and key first appears. `document` must be valid TOML."""
    return _Finder(document).find()


class _Finder:
    def __init__(self, document: str) -> None:
        self._text = document
        self._lines: dict[KeyPath, int] = {}
        # Lines are counted on from the last place looked at, so that the whole takes linear time.
        self._counted_to = 0
        self._line = 1

    def find(self) -> Mapping[KeyPath, int]:
        table: KeyPath = ()
        at = self._skip(_BLANK, 0)
        while at < len(self._text):
            if header := _HEADER.match(self._text, at):
                end = self._skip(_KEY, header.end())
                table = self._note((), header.end(), end)
                at = end + len(header[0])
            else:
                at = self._pair(table, at)
            at = self._skip(_BLANK, at)
        return self._lines

    def _pair(self, table: KeyPath, start: int) -> int:
        """Take in `key = value` at `start`; where it ends."""
        end = self._skip(_KEY, start)
        path = self._note(table, start, end)
        at = self._skip(_BLANK, end + 1)
        if self._text[at] == "{" and len(path) < _DEEPEST:
            at = self._skip(_BLANK_OR_COMMA, at + 1)
            while self._text[at] != "}":
                at = self._skip(_BLANK_OR_COMMA, self._pair(path, at))
            return at + 1
        if self._text[at] in "[{":
            return self._brackets(at)
        return self._skip(_SCALAR, at)

    def _brackets(self, at: int) -> int:
        """Where the array or inline table that opens at `at` has closed."""
        depth = 0
        while token := _TOKEN.match(self._text, at):
            at = token.end()
            if token[0] in ("[", "{"):
                depth += 1
            elif token[0] in ("]", "}"):
                depth -= 1
                if depth == 0:
                    break
        return at

    def _note(self, table: KeyPath, start: int, end: int) -> KeyPath:
        """Record the (perhaps dotted) key written between `start` and `end`; its full path."""
        self._line += self._text.count("\n", self._counted_to, start)
        self._counted_to = start
        path = table
        for part in _key_parts(self._text[start:end]):
            path = (*path, part)
            self._lines.setdefault(path, self._line)
        return path

    def _skip(self, pattern: re.Pattern[str], at: int) -> int:
        match = pattern.match(self._text, at)
        return match.end() if match else at


def _key_parts(written: str) -> list[str]:
    # tomli knows best how quotes, escapes and dots in a key are read.
    parts: list[str] = []
    inner: Any = tomli.loads(f"{written.strip()} = 0")
    while isinstance(inner, dict):
        [(name, inner)] = inner.items()
        parts.append(name)
    return parts
