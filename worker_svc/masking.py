"""What looks like a secret does not show: in no log, no error, and in no answer.

Whether something is one is told by its key: in `KEY=VALUE` wherever that stands, in tables, options, headers and JSON;
and by its place in `scheme://user:PASSWORD@host`. Rather too much is masked than too little.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from worker_svc.job import JobRecord, JobSpec

MASK: Final = "(hidden)"
# Not KEY alone: what comes before says what it opens.
DEFAULT_PATTERN: Final = "(?i)pass|pwd|secret|token|credential|auth|.key"
# Of a longer key only the end counts, so that no text takes long.
_KEY_MAX_CHARS: Final = 128

# Possessive, all of them: there is no second way to read a text, and so none that takes long.
_KEY: Final = r"(?<![\w.-])(?P<key>[\w.-]++)"
# To the next blank, as a shell reads a word: quoted blanks belong to it.
_WORD: Final = r"""(?:'[^']*+'|"(?:[^"\\]|\\[\s\S])*+"|\\[\s\S]|\S)++"""
_PAIR: Final = re.compile(rf"(?P<lead>{_KEY}\]{{0,2}}+[:+]?=){_WORD}")
# JSON, also within JSON, and what looks like it.
_QUOTED_KEY: Final = re.compile(
    r"""(?P<lead>(?P<quote>\\*+["'])(?P<key>[\w.-]++)(?P=quote)\s*+[:=]\s*+)"""
    r"""(?:"(?:[^"\\]|\\.)*+"?|'(?:[^'\\]|\\.)*+'?|\\++["'].*?(?:\\["']|$)|\[[^\]]*+\]?|\{[^}]*+\}?|[^\s,}\]]++)""",
    re.DOTALL,
)
# Up to the `@` before the path; or, unless it is a port, the next one: not all passwords are quoted as they should be.
_URL_PASSWORD: Final = re.compile(r"(?P<lead>://[^\s/?#:@]*+:)(?:[^\s/?#]*@|(?!\d{1,5}[/?#])\S{0,256}?@)")
# To the end of the line, or of what is quoted.
_QUOTED_HEADER: Final = re.compile(
    r"""(?P<lead>(?P<quote>["'])(?P<key>[\w.-]++):)(?!//)(?:\\.|(?!(?P=quote))[^\n])++"""
)
_HEADER: Final = re.compile(rf"(?P<lead>(?<!@){_KEY}:)(?!//|{re.escape(MASK)})[^\n]++")
_SPACED_PAIR: Final = re.compile(rf"(?P<lead>{_KEY}[ \t]++=[ \t]*+){_WORD}")
_OPTION: Final = re.compile(rf"(?P<lead>(?<!\S)(?P<key>--?[\w.-]++)\s++)(?!--[a-z]++(?:-[a-z]++)*+(?:[\s=]|\Z)){_WORD}")
_PLAIN_KEY: Final = re.compile(r"[\w.\[\]-]+[:+]?")
# Clearly an option, and not the value of the one before it. Passwords of nothing but lower-case letters after two
# hyphens are rarer than options that take no value.
_LONG_OPTION: Final = re.compile(r"--[a-z]+(?:-[a-z]+)*(?:=|\Z)")

_ANYWHERE: Final = (_QUOTED_HEADER, _QUOTED_KEY, _PAIR)
# Only in what jobs are started with: our own texts have a colon after the name of a field or a file.
_IN_ARGUMENTS: Final = (_HEADER, _SPACED_PAIR, _OPTION)


class Masker:
    def __init__(self, pattern: str = DEFAULT_PATTERN) -> None:
        """Of keys; empty: nothing is a secret. Raises re.error."""
        self._pattern = re.compile(pattern) if pattern else None

    def hides(self, key: str) -> bool:
        return self._pattern is not None and self._pattern.search(key[-_KEY_MAX_CHARS:]) is not None

    def text(self, text: str) -> str:
        """A text of ours, with the secrets masked that it may quote."""
        return self._masked(text, _ANYWHERE)

    def argument(self, argument: str) -> str:
        """One that stands alone: what comes before it could make it a secret too, see `arguments`."""
        return self._masked(argument, _ANYWHERE + _IN_ARGUMENTS)

    def _masked(self, text: str, places: tuple[re.Pattern[str], ...]) -> str:
        if self._pattern is None or not (":" in text or "=" in text or "-" in text):
            return text
        for place in places:
            text = place.sub(self._hide, text)
        return _URL_PASSWORD.sub(rf"\g<lead>{MASK}@", text) if "://" in text else text

    def _hide(self, found: re.Match[str]) -> str:
        return f"{found['lead']}{MASK}" if self.hides(found["key"].lstrip("-")) else found[0]

    def table(self, table: Mapping[str, str], *, whole: bool = False) -> dict[str, str]:
        """`whole`: not even values whose keys look harmless are shown."""
        return {key: MASK if whole or self.hides(key) else self.argument(value) for key, value in table.items()}

    def arguments(self, arguments: Sequence[str]) -> tuple[str, ...]:
        """`--token x` and `-token x` too, also if x begins with a hyphen."""
        masked: list[str] = []
        is_value = False
        for argument in arguments:
            hidden = is_value and not _LONG_OPTION.match(argument)
            masked.append(MASK if hidden else self._argument(argument))
            # Of what was hidden too: `--auth --password x` has either one secret or two.
            is_value = self._announces(argument)
        return tuple(masked)

    def _announces(self, argument: str) -> bool:
        """Whether the next argument is the secret: after an option, and `Authorization:`."""
        is_name = argument.startswith("-") and "=" not in argument and " " not in argument
        return (is_name or argument.endswith(":")) and self.hides(argument.lstrip("-").rstrip(":"))

    def _argument(self, argument: str) -> str:
        key, equals, _ = argument.partition("=")
        if equals and _PLAIN_KEY.fullmatch(key) and self.hides(key.lstrip("-")):
            return f"{key}={MASK}"  # blanks and all
        return self.argument(argument)

    def spec(self, spec: JobSpec, *, shows_env: bool) -> JobSpec:
        """As it may be shown; `shows_env`: to its owner or an admin."""
        # The path is the program's first argument.
        arguments = self.arguments((spec.path, *spec.args))
        return spec._replace(
            command=self.argument(spec.command),
            path=arguments[0],
            args=arguments[1:],
            cwd=self.argument(spec.cwd),
            env=self.table(spec.env, whole=not shows_env),
            labels=self.table(spec.labels),
        )

    def record(self, record: JobRecord, *, shows_env: bool) -> JobRecord:
        return record._replace(spec=self.spec(record.spec, shows_env=shows_env), reason=self.text(record.reason))
