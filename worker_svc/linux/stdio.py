"""Standard input, output and error: there in any case, and nothing else in their place."""

from __future__ import annotations

import os


def ensure_descriptors() -> None:
    """/dev/null in place of those that whoever started us has closed: what we open next would be taken for them."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
