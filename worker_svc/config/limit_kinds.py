"""The kinds of value that limits and sandboxes have."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from worker_svc.config.errors import Fault, Invalid
from worker_svc.config.kinds import Kind
from worker_svc.config.values import quote, show
from worker_svc.job.limit_texts import cpus_text, parse_cpus, parse_rlimit, parse_size, parse_umask, rlimit_text


@dataclass(frozen=True, slots=True)
class MaybeWhole(Kind[int | None]):
    """A whole number; None when empty, which zero is not."""

    low: int
    high: int
    type_name = "integer"

    @property
    def expects(self) -> str:
        return f'a whole number from {self.low} to {self.high}, or ""'

    def from_toml(self, value: object) -> int | None:
        if value == "":
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not self.low <= value <= self.high:
            raise self.refuse(value)
        return value

    def from_text(self, text: str) -> int | None:
        if text.strip() and not re.fullmatch(r"[+-]?[0-9]{1,19}", text.strip(), re.ASCII):
            raise self.refuse(text)
        return self.from_toml(int(text) if text.strip() else "")


@dataclass(frozen=True, slots=True)
class MaybeBytes(MaybeWhole):
    """A number of bytes, also as text with a unit: "512M"."""

    type_name = "integer"

    @property
    def expects(self) -> str:
        return f'a number of bytes from {self.low} to {self.high} (or text such as "512M"), or ""'

    def from_toml(self, value: object) -> int | None:
        return self.from_text(value) if isinstance(value, str) else MaybeWhole.from_toml(self, value)

    def from_text(self, text: str) -> int | None:
        if not text.strip():
            return None
        try:
            number = parse_size(text)
        except ValueError:
            raise self.refuse(text) from None
        return MaybeWhole.from_toml(self, number)


@dataclass(frozen=True, slots=True)
class MaybeDecimal(Kind[float | None]):
    low: float
    high: float
    type_name = "float"

    @property
    def expects(self) -> str:
        return f'a number from {self.low:g} to {self.high:g}, or ""'

    def from_toml(self, value: object) -> float | None:
        if value == "":
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            raise self.refuse(value)
        return float(value)

    def from_text(self, text: str) -> float | None:
        try:
            number = float(text) if text.strip() else None
        except ValueError:
            raise self.refuse(text) from None
        if number is not None and not math.isfinite(number):
            raise self.refuse(text)
        return self.from_toml("" if number is None else number)


class Umask(Kind[str]):
    """Octal digits; the parsed value has four of them. Empty: none."""

    expects = 'octal digits as text, such as "0027", or ""'

    def from_toml(self, value: object) -> str:
        if value == "":
            return ""
        if not isinstance(value, str):
            raise self.refuse(value)
        try:
            return f"{parse_umask(value):04o}"
        except ValueError:
            raise self.refuse(value) from None


class CpuNumbers(Kind[str]):
    """CPU numbers as text, in order. Empty: all."""

    expects = 'CPU numbers as text, such as "0,2-3", or ""'

    def from_toml(self, value: object) -> str:
        if value == "":
            return ""
        if not isinstance(value, str):
            raise self.refuse(value)
        try:
            return cpus_text(parse_cpus(value))
        except ValueError:
            raise self.refuse(value) from None


class Listed(Kind[tuple[str, ...]]):
    """A list of texts, each of which one function checks and puts into its one form."""

    type_name = "list of text"

    def __init__(self, entries: str, parse: Callable[[str], str]) -> None:
        self.expects_entries = entries
        self._parse = parse

    @property
    def expects(self) -> str:
        return f"a list of {self.expects_entries}"

    def from_toml(self, value: object) -> tuple[str, ...]:
        if not isinstance(value, list | tuple):
            raise self.refuse(value)
        faults: list[Fault] = []
        parsed: list[str] = []
        for number, entry in enumerate(value, 1):
            try:
                if not isinstance(entry, str):
                    raise ValueError(f"must be text, not {show(entry)}")
                parsed.append(self._parse(entry))
            except ValueError as error:
                faults.append(Fault(f"entry {number} {error}"))
        if faults:
            raise Invalid(*faults)
        return tuple(dict.fromkeys(parsed))

    def from_text(self, text: str) -> tuple[str, ...]:
        return self.from_toml([entry.strip() for entry in text.split(",")] if text.strip() else [])


def rlimits(entries: str = 'limits such as "nofile=1024:4096"') -> Listed:
    def parse(text: str) -> str:
        name, (soft, hard) = parse_rlimit(text)
        if hard >= 0 and not 0 <= soft <= hard:
            raise ValueError(f"has a soft limit above the hard one: {quote(text)}")
        return rlimit_text(name, soft, hard)

    return Listed(entries, parse)


def rlimit_maxima() -> Listed:
    def parse(text: str) -> str:
        name, (most, also) = parse_rlimit(text)
        if ":" in text or most < 0:
            raise ValueError(f"must be one number, the most that the hard limit may be, not {quote(text)}")
        return rlimit_text(name, most, also)

    return Listed('maxima such as "nofile=4096"', parse)


def absolute_paths() -> Listed:
    def parse(text: str) -> str:
        if not text.startswith("/"):
            raise ValueError(f"must be an absolute path, not {quote(text)}")
        if "\0" in text:
            raise ValueError("must not contain NUL")
        return text

    return Listed("absolute paths", parse)
