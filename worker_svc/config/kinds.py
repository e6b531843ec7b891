"""The kinds of value a key can have: each parses and checks it, and says what it expects."""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args

import tomli

from worker_svc.address import MAX_UNIX_PATH_BYTES, Address
from worker_svc.config.errors import Fault, Invalid
from worker_svc.config.values import Variables, quote, show, show_type
from worker_svc.job import DURATION_MAX_S, parse_signal, signal_name

T_co = TypeVar("T_co", covariant=True)

_WHOLE = re.compile(r"[+-]?[0-9]{1,18}", re.ASCII)
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


@dataclass(frozen=True, slots=True)
class Seconds(Kind[float]):
    low: float = 0
    high: float = DURATION_MAX_S
    type_name = "float"

    @property
    def expects(self) -> str:
        return f"a number of seconds from {self.low:g} to {self.high:.0f}"

    def from_toml(self, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refuse(value)
        # The comparison is false for nan, and comes before float(), which a huge integer would overflow.
        if not self.low <= value <= self.high:
            raise self.refuse(value)
        return float(value)

    def from_text(self, text: str) -> float:
        if not _DECIMAL.fullmatch(text.strip()):
            raise self.refuse(text)
        number = float(text)
        if not math.isfinite(number):
            raise self.refuse(text)
        return self.from_toml(number)


class Text(Kind[str]):
    expects = "text on one line"

    def from_toml(self, value: object) -> str:
        if not isinstance(value, str) or not value.isprintable():
            raise self.refuse(value)
        return value


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


class SignalName(Kind[str]):
    """A signal; the parsed value is its canonical name: "SIGTERM", "SIGRTMIN+3"."""

    expects = 'a signal, by name ("SIGTERM" or "TERM") or by number as text ("15")'

    def from_toml(self, value: object) -> str:
        if not isinstance(value, str):
            raise self.refuse(value)
        try:
            return signal_name(parse_signal(value))
        except ValueError:
            raise self.refuse(value) from None


class FilePath(Kind[Path | None]):
    """A path, None when empty; relative ones are resolved against the place the value was written at."""

    type_name = "path"
    expects = "a path"

    def from_toml(self, value: object) -> Path | None:
        return _path(self, value)

    def resolve(self, value: Path | None, place: Place) -> Path | None:
        return value and place.base / value


# What an empty path is parsed to. Told by identity: the path "." is equal and means something else.
_UNSET = Path()


class StartedIn(Kind[Path]):
    """A directory; when empty, the one the worker was started in."""

    type_name = "path"
    expects = "a path"

    def from_toml(self, value: object) -> Path:
        return _path(self, value) or _UNSET

    def resolve(self, value: Path, place: Place) -> Path:
        return _told(place.cwd if value is _UNSET else place.base / value)


class StateDirectory(Kind[Path]):
    """A directory; when empty, the first that the environment gives a home to."""

    type_name = "path"
    expects = "a path"

    def from_toml(self, value: object) -> Path:
        return _path(self, value) or _UNSET

    def resolve(self, value: Path, place: Place) -> Path:
        return _told(_default_state_dir(place.environ) if value is _UNSET else place.base / value)


def _default_state_dir(environ: Mapping[str, str]) -> Path:
    # systemd lists several directories when the unit has several; the first is the main one.
    candidates = (
        Path(environ.get("STATE_DIRECTORY", "").split(":")[0]),
        Path(environ.get("XDG_STATE_HOME", "")) / "worker-svc",
        Path(environ.get("HOME", "")) / ".local/state/worker-svc",
    )
    for candidate in candidates:
        # The XDG specification has relative paths ignored; an unset variable leaves one too.
        if candidate.is_absolute():
            return candidate
    raise Invalid(
        "no directory to keep state in: none of $STATE_DIRECTORY, $XDG_STATE_HOME and $HOME is set to an "
        "absolute path; set state.dir"
    )


def _told(path: Path) -> Path:
    """One that clients are told of, and jobs' records: gRPC, SQLite and JSON hold no bytes but UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise Invalid(f"{quote(str(path))} is not UTF-8, so that clients cannot be told of it: name another") from None
    return path


def _path(kind: Kind[Any], value: object) -> Path | None:
    if not isinstance(value, str):
        raise kind.refuse(value)
    if "\0" in value:
        raise kind.refuse(value, "it contains NUL")
    if value.startswith("~"):
        raise kind.refuse(value, "~ is not expanded here, write the whole path")
    return Path(value) if value else None


class ListenAddress(Kind[Address]):
    type_name = "address"
    expects = "host:port, [ipv6]:port or unix:/path"

    def from_toml(self, value: object) -> Address:
        return _address(self, value)

    def resolve(self, value: Address, place: Place) -> Address:
        return _resolve_address(value, place)


class DialAddress(Kind[Address | None]):
    """An address that someone connects to: it needs a host and a port. None when empty."""

    type_name = "address"
    expects = "host:port, [ipv6]:port or unix:/path (or empty)"

    def from_toml(self, value: object) -> Address | None:
        if value == "":
            return None
        address = _address(self, value)
        if not address.is_unix and not address.host:
            raise self.refuse(value, "the host is missing")
        if not address.is_unix and not address.port:
            raise self.refuse(value, "port 0 can't be connected to")
        return address

    def resolve(self, value: Address | None, place: Place) -> Address | None:
        return value and _resolve_address(value, place)


def _address(kind: Kind[Any], value: object) -> Address:
    if not isinstance(value, str):
        raise kind.refuse(value)
    try:
        return Address.parse(value)
    except ValueError as error:
        raise kind.refuse(value, str(error)) from error


def _resolve_address(address: Address, place: Place) -> Address:
    if not address.is_unix:
        return address
    path = str(_told(place.base / address.unix_path))
    size = len(os.fsencode(path))
    if size > MAX_UNIX_PATH_BYTES:
        raise Invalid(f"the socket's path {show(path)} has {size} bytes; at most {MAX_UNIX_PATH_BYTES} are possible")
    return address._replace(unix_path=path)


class VariableNames(Kind[tuple[str, ...]]):
    """Names of environment variables; a name given twice counts once."""

    type_name = "list of text"
    expects = "a list of variable names"

    def from_toml(self, value: object) -> tuple[str, ...]:
        if not isinstance(value, list | tuple):
            raise self.refuse(value)
        faults = []
        for number, name in enumerate(value, 1):
            if not isinstance(name, str):
                faults.append(Fault(f"entry {number} must be a variable name, not {show(name)}"))
            elif not _is_variable_name(name):
                # Nor is the entry itself shown: it may be "NAME=secret".
                text = f"entry {number} must be a variable name: not empty, without = and NUL"
                faults.append(Fault(text))
        if faults:
            raise Invalid(*faults)
        return tuple(dict.fromkeys(value))

    def from_text(self, text: str) -> tuple[str, ...]:
        return self.from_toml([name.strip() for name in text.split(",")] if text.strip() else [])


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
            return self.from_toml(self._inline_table(text))
        pairs: dict[str, str] = {}
        for number, piece in enumerate(text.split(",") if text.strip() else [], 1):
            name, equals, value = piece.partition("=")
            if not equals:
                raise Invalid(
                    f"part {number} must be NAME=value; where a value has a comma, write {{ NAME = 'value' }}"
                )
            pairs[name.strip()] = value
        return self.from_toml(pairs)

    @staticmethod
    def _inline_table(text: str) -> object:
        try:
            parsed = tomli.loads(f"table = {text}")
        except (ValueError, RecursionError):
            # tomli's own words could quote a piece of a value: they are not passed on, not even as the cause.
            raise Invalid("must be a TOML table on one line, such as { NAME = 'value' }") from None
        if len(parsed) != 1:
            raise Invalid("must be one TOML table and nothing after it")
        return parsed["table"]


def _is_variable_name(name: str) -> bool:
    return bool(name) and "=" not in name and "\0" not in name
