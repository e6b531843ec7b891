"""What looks like a secret does not show: in no log, no error, and in no answer.

Whether something is one is told by its key, in `KEY=VALUE` wherever that stands, in tables and in options.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from worker_svc.job import JobRecord, JobSpec

MASK: Final = "(hidden)"
# Not KEY alone: what comes before says what it opens.
DEFAULT_PATTERN: Final = "(?i)pass|pwd|secret|token|credential|auth|.key"

# A key is what stands before the `=`, back to a blank, a quote or whatever else keys do not have. Not beyond 128
# characters, so that no text takes long.
_PAIR: Final = re.compile(r"([A-Za-z0-9_.-]{1,128})=('[^']*'|\"[^\"]*\"|[^\s,;&'\"]+)")


class Masker:
    def __init__(self, pattern: str = DEFAULT_PATTERN) -> None:
        """Of keys; empty: none is a secret's. Raises re.error."""
        self._pattern = re.compile(pattern) if pattern else None

    def hides(self, key: str) -> bool:
        return self._pattern is not None and self._pattern.search(key) is not None

    def text(self, text: str) -> str:
        """With the values of `KEY=VALUE` masked where the key looks like a secret's."""
        if "=" not in text or self._pattern is None:
            return text
        return _PAIR.sub(lambda pair: f"{pair[1]}={MASK}" if self.hides(pair[1].lstrip("-")) else pair[0], text)

    def table(self, table: Mapping[str, str], *, whole: bool = False) -> dict[str, str]:
        """`whole`: not even values whose keys look harmless are shown."""
        return {key: MASK if whole or self.hides(key) else value for key, value in table.items()}

    def arguments(self, arguments: Sequence[str]) -> tuple[str, ...]:
        """`--token=x`, `TOKEN=x` and `--token x`."""
        masked: list[str] = []
        is_value = False
        for argument in arguments:
            key, equals, _ = argument.partition("=")
            if is_value and not argument.startswith("-"):
                masked.append(MASK)
                is_value = False
                continue
            name = key.lstrip("-")
            is_value = not equals and argument.startswith("--") and self.hides(name)
            masked.append(f"{key}={MASK}" if equals and self.hides(name) and " " not in key else self.text(argument))
        return tuple(masked)

    def spec(self, spec: JobSpec, *, shows_env: bool) -> JobSpec:
        """As it may be shown; `shows_env`: to its owner or an admin."""
        return spec._replace(
            args=self.arguments(spec.args),
            env=self.table(spec.env, whole=not shows_env),
            labels=self.table(spec.labels),
        )

    def record(self, record: JobRecord, *, shows_env: bool) -> JobRecord:
        return record._replace(spec=self.spec(record.spec, shows_env=shows_env), reason=self.text(record.reason))
