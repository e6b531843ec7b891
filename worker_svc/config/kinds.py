"""The kinds of value a key can have: each parses and checks it, and says what it expects."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, TypeVar, get_args

import tomli

from worker_svc.config.errors import Fault, Invalid
from worker_svc.config.values import Variables, quote, show, show_type
from worker_svc.job import DURATION_MAX_S, parse_signal, signal_name
from worker_svc.job.limit_texts import cpus_text, parse_cpus, parse_size, parse_umask

T_co = TypeVar("T_co", covariant=True)

_WHOLE = re.compile(r"[+-]?[0-9]{1,19}", re.ASCII)
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|[+-]?(?:inf|nan)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Place:
    """What completes values: `base` for relative paths, the directory started in, the environment."""

    base: Path
    cwd: Path
    environ: Mapping[str, str]


class Kind(Generic[T_co]):
    """One kind of value. All methods raise `Invalid`."""

    type_name = "text"
    """For the documentation: the TOML type."""

    @property
    def expects(self) -> str:
        """What a good value is; reads on from "must be"."""
        raise NotImplementedError

    def from_toml(self, value: object) -> T_co:
        raise NotImplementedError

    def from_text(self, text: str) -> T_co:
        """From an environment variable or a flag."""
        return self.from_toml(text)

    def resolve(self, value: Any, place: Place) -> T_co:
        """Complete a parsed value, or a default, with what is known only at load."""
        return value  # type: ignore[no-any-return]

    def refuse(self, value: object, why: str = "") -> Invalid:
        return Invalid(f"must be {self.expects}, not {show(value)}" + (f": {why}" if why else ""))


class Bool(Kind[bool]):
    type_name = "boolean"
    expects = "true or false"

    def from_toml(self, value: object) -> bool:
        if not isinstance(value, bool):
            raise self.refuse(value)
        return value

    def from_text(self, text: str) -> bool:
        match text.strip().lower():
            case "true" | "1":
                return True
            case "false" | "0":
                return False
        raise self.refuse(text)


@dataclass(frozen=True, slots=True)
class Whole(Kind[int]):
    low: int
    high: int
    type_name = "integer"

    @property
    def expects(self) -> str:
        return f"a whole number from {self.low} to {self.high}"

    def from_toml(self, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not self.low <= value <= self.high:
            raise self.refuse(value)
        return value

    def from_text(self, text: str) -> int:
        if not _WHOLE.fullmatch(text.strip()):
            raise self.refuse(text)
        return self.from_toml(int(text))


class Bytes(Whole):
    """A number of bytes, also as text with a unit: "512M"."""

    @property
    def expects(self) -> str:
        return f'a number of bytes from {self.low} to {self.high} (or text such as "512M")'

    def from_toml(self, value: object) -> int:
        return self.from_text(value) if isinstance(value, str) else Whole.from_toml(self, value)

    def from_text(self, text: str) -> int:
        try:
            return Whole.from_toml(self, parse_size(text))
        except ValueError:
            raise self.refuse(text) from None


@dataclass(frozen=True, slots=True)
class Decimal(Kind[float]):
    low: float
    high: float
    what: str = "a number"
    type_name = "float"

    @property
    def expects(self) -> str:
        return f"{self.what} from {self.low:.15g} to {self.high:.15g}"

    def from_toml(self, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refuse(value)
        # The comparison is false for nan, and comes before float(), which a huge integer would overflow.
        if not self.low <= value <= self.high:
            raise self.refuse(value)
        return float(value)

    def from_text(self, text: str) -> float:
        if not _DECIMAL.fullmatch(text.strip()) or not math.isfinite(float(text)):
            raise self.refuse(text)
        return self.from_toml(float(text))


def seconds(low: float = 0, high: float = DURATION_MAX_S) -> Decimal:
    return Decimal(low, high, "a number of seconds")


class Maybe(Kind[T_co | None]):
    """What another kind takes; None when empty, which zero is not."""

    def __init__(self, kind: Kind[T_co]) -> None:
        self._kind = kind
        self.type_name = kind.type_name

    @property
    def expects(self) -> str:
        return f'{self._kind.expects}, or ""'

    def from_toml(self, value: object) -> T_co | None:
        return self._unless_empty(value, self._kind.from_toml)

    def from_text(self, text: str) -> T_co | None:
        return self._unless_empty(text, self._kind.from_text)

    def _unless_empty(self, value: Any, parse: Callable[[Any], T_co]) -> T_co | None:
        if isinstance(value, str) and not value.strip():
            return None
        try:
            return parse(value)
        except Invalid:
            raise self.refuse(value) from None


class Parsed(Kind[str]):
    """Text that a function puts into its one form, or refuses by ValueError."""

    def __init__(self, expects: str, parse: Callable[[str], str], *, says_why: bool = False) -> None:
        self._expects = expects
        self._parse = parse
        self._says_why = says_why

    @property
    def expects(self) -> str:
        return self._expects

    def from_toml(self, value: object) -> str:
        if not isinstance(value, str):
            raise self.refuse(value)
        try:
            return self._parse(value)
        except ValueError as error:
            raise self.refuse(value, str(error) if self._says_why else "") from None


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError
    return text


def regex(text: str) -> str:
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(str(error)) from None
    return text


TEXT: Final = Parsed("text on one line", _one_line)
PATTERN: Final = Parsed("a regular expression", regex, says_why=True)
# The one form of a signal is its name: "SIGTERM", "SIGRTMIN+3".
SIGNAL: Final = Parsed(
    'a signal, by name ("SIGTERM" or "TERM") or by number as text ("15")', lambda text: signal_name(parse_signal(text))
)
UMASK: Final = Parsed(
    'octal digits as text, such as "0027", or ""', lambda text: f"{parse_umask(text):04o}" if text else ""
)
CPU_NUMBERS: Final = Parsed(
    'CPU numbers as text, such as "0,2-3", or ""', lambda text: cpus_text(parse_cpus(text)) if text else ""
)


class Choice(Kind[T_co]):
    """One of the strings of a `Literal` type."""

    def __init__(self, literal: Any) -> None:
        self.choices: tuple[T_co, ...] = get_args(literal)

    @property
    def expects(self) -> str:
        *most, last = (quote(str(choice)) for choice in self.choices)
        return f"{', '.join(most)} or {last}"

    def from_toml(self, value: object) -> T_co:
        for choice in self.choices:
            if choice == value:
                return choice
        raise self.refuse(value)


class Listed(Kind[tuple[str, ...]]):
    """A list of texts, each of which a function puts into its one form; what is given twice counts once."""

    type_name = "list of text"

    def __init__(self, entries: str, parse: Callable[[str], str], *, entry: str = "text") -> None:
        """`parse` raises ValueError, with words that go on from "entry 3"."""
        self._entries = entries
        self._entry = entry
        self._parse = parse

    @property
    def expects(self) -> str:
        return f"a list of {self._entries}"

    def from_toml(self, value: object) -> tuple[str, ...]:
        if not isinstance(value, list | tuple):
            raise self.refuse(value)
        faults: list[Fault] = []
        parsed: list[str] = []
        for number, entry in enumerate(value, 1):
            try:
                if not isinstance(entry, str):
                    raise ValueError(f"must be {self._entry}, not {show(entry)}")
                parsed.append(self._parse(entry))
            except ValueError as error:
                faults.append(Fault(f"entry {number} {error}"))
        if faults:
            raise Invalid(*faults)
        return tuple(dict.fromkeys(parsed))

    def from_text(self, text: str) -> tuple[str, ...]:
        return self.from_toml([entry.strip() for entry in text.split(",")] if text.strip() else [])


class VariableTable(Kind[Variables]):
    """Environment variables with their values. No message ever shows a value, or what might be one."""

    type_name = "table of text"
    expects = "a table of text values"

    def from_toml(self, value: object) -> Variables:
        if not isinstance(value, dict):
            raise Invalid(f"must be {self.expects}, not {show_type(value)}")
        faults = []
        for name, inner in value.items():
            if not _is_variable_name(name):
                # Whoever writes "NAME=secret" as the key must not find the secret in the log.
                before = name.partition("=")[0]
                faults.append(Fault("a variable's name must not be empty nor contain = or NUL", (before,)))
            elif not isinstance(inner, str):
                faults.append(Fault(f"must be text, not {show_type(inner)}", (name,)))
            elif "\0" in inner:
                faults.append(Fault("must not contain NUL", (name,)))
        if faults:
            raise Invalid(*faults)
        return Variables(value)

    def from_text(self, text: str) -> Variables:
        """From a TOML inline table, or `NAME=value,NAME=value`."""
        if text.lstrip().startswith("{"):
            return self.from_toml(inline_table(text, "a TOML table on one line, such as { NAME = 'value' }"))
        pairs: dict[str, str] = {}
        for number, piece in enumerate(text.split(",") if text.strip() else [], 1):
            name, equals, value = piece.partition("=")
            if not equals:
                raise Invalid(
                    f"part {number} must be NAME=value; where a value has a comma, write {{ NAME = 'value' }}"
                )
            pairs[name.strip()] = value
        return self.from_toml(pairs)


def inline_table(text: str, expected: str, *, shows_error: bool = False) -> object:
    try:
        parsed = tomli.loads(f"table = {text}")
    except (ValueError, RecursionError) as error:
        # tomli's words can quote a piece of a value, which may be a secret: they are not even passed on as the cause.
        raise Invalid(f"must be {expected}" + (f": {error}" if shows_error else "")) from None
    if len(parsed) != 1:
        raise Invalid("must be one TOML table and nothing after it")
    return parsed["table"]


def _variable_name(name: str) -> str:
    if not _is_variable_name(name):
        # The entry itself is not shown: it may be "NAME=secret".
        raise ValueError("must be a variable name: not empty, without = and NUL")
    return name


def _is_variable_name(name: str) -> bool:
    return bool(name) and "=" not in name and "\0" not in name


VARIABLE_NAMES: Final = Listed("variable names", _variable_name, entry="a variable name")
