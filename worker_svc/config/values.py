"""How values look in TOML and in messages, and the table whose values never show."""

import re
from collections.abc import Iterator, Mapping
from pathlib import PurePath

from worker_svc.address import Address

HIDDEN = "(hidden)"
_SHOWN_CHARS = 60
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}


class Variables(Mapping[str, str]):
    """Environment variables: an immutable, hashable mapping whose values stay out of `repr` and logs."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, str] | None = None) -> None:
        self._items = dict(items or {})

    def __getitem__(self, name: str) -> str:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return f"Variables({', '.join(f'{name}={HIDDEN}' for name in self._items)})"


class Table:
    """A value that stands in the file as a table."""

    __slots__ = ()

    def entries(self) -> dict[str, object]:
        raise NotImplementedError


def quote(text: str) -> str:
    """`text` as a TOML basic string on one line, safe to print."""
    return '"' + "".join(_ESCAPES.get(char) or _printable(char) for char in text) + '"'


def _printable(char: str) -> str:
    if char.isprintable():
        return char
    return f"\\u{ord(char):04x}" if ord(char) <= 0xFFFF else f"\\U{ord(char):08x}"


def toml_key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else quote(name)


def toml_value(value: object) -> str:
    """A value of a `Config`, or the raw default of a key, as TOML; the values of `Variables` are hidden."""
    match value:
        case None:
            return '""'
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str() | PurePath() | Address():
            return quote(str(value))
        case tuple() | list():
            return "[" + ", ".join(map(toml_value, value)) + "]"
        case Variables():
            return toml_value(dict.fromkeys(value, HIDDEN))
        case Table():
            return toml_value(value.entries())
        case dict():
            pairs = ", ".join(f"{toml_key(name)} = {toml_value(inner)}" for name, inner in value.items())
            return f"{{ {pairs} }}" if pairs else "{}"
    raise TypeError(f"no TOML form for {type(value).__name__}")


def show(value: object) -> str:
    """A refused value for a message, cut short; whole tables and lists only by what they are."""
    match value:
        case bool():
            return toml_value(value)
        case int():
            # Python refuses to print very long integers, and nobody wants to read them.
            return repr(value) if abs(value) < 10**18 else "a number that large"
        case float():
            return repr(value)
        case str():
            return quote(value if len(value) <= _SHOWN_CHARS else value[:_SHOWN_CHARS] + "…")
    return show_type(value)


def show_type(value: object) -> str:
    """What kind of TOML value it is, for values that may be secret."""
    match value:
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case list():
            return "a list"
        case dict():
            return "a table"
    return "a date or time"
