"""What can be wrong with a configuration."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing to put right.

    `source` is the file as it was named, "environment", or empty for a flag; `line` counts from 1 and is None
    where there are no lines; `key` is as the operator wrote it (`jobs.slots`, `WORKER_SVC_JOBS_SLOTS`,
    `--jobs-slots`), or empty when the trouble is with the whole file.
    """

    source: str
    line: int | None
    key: str
    text: str

    def __str__(self) -> str:
        where = self.source if self.line is None else f"{self.source}:{self.line}"
        return ": ".join(part for part in (where, self.key, self.text) if part)


class ConfigError(Exception):
    """The configuration can't be used: `problems` holds all that is wrong, `str()` one line for each."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with one value, wherever it came from. `below`: the entry of a table that is at fault."""

    text: str
    below: tuple[str, ...] = ()


class Invalid(Exception):
    """Raised by a `Kind` for a value it refuses."""

    def __init__(self, *faults: Fault | str) -> None:
        self.faults = tuple(Fault(fault) if isinstance(fault, str) else fault for fault in faults)
        super().__init__("; ".join(fault.text for fault in self.faults))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean …?`, or nothing when no known name is near."""
    # Case and hyphens are no difference: [grpc-server] is near grpc_server, whatever difflib would say.
    plain = {candidate.lower().replace("-", "_"): candidate for candidate in known}
    near = difflib.get_close_matches(name.lower().replace("-", "_"), plain, n=1)
    return f"; did you mean {plain[near[0]]}?" if near else ""
