"""Texts that others wrote, made harmless where they leave us: in log lines, error messages and on terminals."""

from __future__ import annotations


def printable(text: str) -> str:
    """`text` on one line, without anything that a terminal or a reader of lines would act on: control characters (C0,
    C1, DEL), line and paragraph separators, bidirectional and invisible ones, bytes that are no UTF-8.

    They are written as JSON writes them, `\\u001b`: what was JSON stays JSON, and a text that went through here once
    stays the same.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    import json  # seldom needed, and 1 ms to import

    return "\\u007f" if char == "\x7f" else json.dumps(char)[1:-1]
