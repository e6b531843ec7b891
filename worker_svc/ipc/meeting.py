"""What a worker and a supervisor find each other by, beside the socket: the key, and the log of a supervisor that the
worker starts."""

from __future__ import annotations

import os
from typing import Final

from worker_svc.record.paths import KEY_NAME, SUPERVISOR_LOG_NAME

KEY_BYTES: Final = 32


def read_key(state_dir: str) -> str:
    """What a worker has to show; empty: it is not there (yet), or no file."""
    try:
        fd = os.open(f"{state_dir}/{KEY_NAME}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:  # whoever asks without it is told what is missing
        return ""
    try:
        return os.read(fd, 4 * KEY_BYTES).decode(errors="replace")
    finally:
        os.close(fd)


def open_log(state_dir: str) -> int:
    """Never waits, now or when it is written to: whoever made a FIFO of it may stand still. Raises OSError."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
    return os.open(f"{state_dir}/{SUPERVISOR_LOG_NAME}", flags, 0o600)
