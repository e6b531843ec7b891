"""How texts of ours may name what callers wrote: errors and reasons are read by more people than arguments are."""

from __future__ import annotations

import re
from typing import Final

_NAME_MAX_CHARS: Final = 256
# What programs and files are called, as a rule: no blank, quote, `=`, `:`, and so no argument and no password in a URL.
_NAME: Final = re.compile(rf"[\w./+@~-]{{0,{_NAME_MAX_CHARS}}}+")


def name_of(text: str) -> str:
    """The name of a program or file, as far as it is a plain one. `…` stands for the rest, whatever that is.

    `mysql --password x` as one command is `mysql…`.
    """
    found = _NAME.match(text)
    name = found[0] if found else ""
    return name if len(name) == len(text) else f"{name}…"
