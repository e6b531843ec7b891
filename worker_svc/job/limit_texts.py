"""Limits as people write them, in the configuration and on the command line. ValueError has a text for the user.

Not part of what the supervisor loads.
"""

from __future__ import annotations

import re
from typing import Final

from worker_svc.job.limits import BY_NAME, INT64_MAX, RLIMIT_NAMES, UNLIMITED

_UNITS: Final = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def rlimit_name(text: str) -> str:
    """`nofile` from "nofile", "NOFILE" or "RLIMIT_NOFILE"; not checked."""
    return text.strip().lower().removeprefix("rlimit_")


def parse_rlimit(text: str) -> tuple[str, tuple[int, int]]:
    """Name, soft and hard limit from `nofile=1024:4096`, `core=0` (both are 0) or `stack=8388608:unlimited`."""
    name, equals, value = text.partition("=")
    name = rlimit_name(name)
    if not equals:
        raise ValueError(f"must be NAME=SOFT or NAME=SOFT:HARD, not {text!r}")
    if name not in RLIMIT_NAMES:
        raise ValueError(f"there is no limit {name!r}: use one of {', '.join(RLIMIT_NAMES)}")
    soft, colon, hard = value.partition(":")
    return name, (_amount(soft), _amount(hard if colon else soft))


def rlimit_text(name: str, soft: int, hard: int | None) -> str:
    """The inverse; of a hard limit that is None nothing is said."""
    both = [soft] if hard is None or hard == soft else [soft, hard]
    return f"{name}={':'.join('unlimited' if one == UNLIMITED else str(one) for one in both)}"


def _amount(text: str) -> int:
    text = text.strip().lower()
    if text in ("unlimited", "infinity"):
        return UNLIMITED
    if not (text.isascii() and text.isdigit() and int(text) <= INT64_MAX):
        raise ValueError(f'a limit must be a whole number from 0 up, or "unlimited", not {text!r}')
    return int(text)


def parse_cpus(text: str) -> tuple[int, ...]:
    """CPU numbers in order, each once, from `0,2-3`."""
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,5})(?:-([0-9]{1,5}))?\s*", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last <= BY_NAME["cpu_affinity"].high:
            raise ValueError(f"must be CPU numbers such as 0,2-3, not {text!r}")
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def cpus_text(cpus: tuple[int, ...] | list[int]) -> str:
    """The inverse: `0,2-3`."""
    runs: list[list[int]] = []
    for number in sorted(set(cpus)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def parse_umask(text: str) -> int:
    """From octal digits, `027`."""
    if not re.fullmatch(r"0?[0-7]{1,3}", text.strip(), re.ASCII):
        raise ValueError(f"must be octal digits such as 027, from 0 to 0777, not {text!r}")
    return int(text, 8)


def parse_size(text: str) -> int:
    """Bytes from `1048576`, `512M` or `1.5G` (powers of 1024; a B or iB after the letter is fine)."""
    match = re.fullmatch(r"([0-9]{1,19}(?:\.[0-9]{1,6})?)\s*([kKmMgGtT]?)(?:i?[bB])?", text.strip(), re.ASCII)
    if match is None:
        raise ValueError(f"must be a number of bytes such as 1048576, 512M or 1.5G, not {text!r}")
    number, unit = match.groups()
    factor = _UNITS[unit.upper()]
    return int(number) * factor if number.isdigit() else round(float(number) * factor)
