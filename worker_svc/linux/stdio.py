"""Standard input, output and error: there in any case, and nothing else in their place."""

from __future__ import annotations

import os


def ensure_descriptors() -> frozenset[int]:
    """/dev/null in place of those that whoever started us has closed: what we open next would be taken for them.
    Returns which."""
    closed = set()
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
        closed.add(fd)
    os.close(fd)
    return frozenset(closed)
