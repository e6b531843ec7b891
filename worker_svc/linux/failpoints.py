"""Places where tests kill the process: a JSON object in the state directory, point → at which pass.

`crash-points` is the supervisor's, `worker-crash-points` the worker's. Each start reads its file once and removes it,
so that the next one is not hit again. Without that file `is_armed` is false, and that is all it costs.
"""

from __future__ import annotations

import json
import os
import signal
from typing import Final

FILE_NAME: Final = "crash-points"
WORKER_FILE_NAME: Final = "worker-crash-points"
# One line for each process that was killed at a point: its pid and the point.
REACHED_NAME: Final = "crash-points.reached"

is_armed = False
_passes: dict[str, int] = {}
_reached_path = ""


def arm(state_dir: str, file_name: str = FILE_NAME) -> None:
    """Reads the file, if there is one."""
    global is_armed, _reached_path
    path = f"{state_dir}/{file_name}"
    try:
        with open(path, encoding="utf-8") as file:
            _passes.update(json.load(file))
        os.unlink(path)
    except FileNotFoundError:
        return
    _reached_path = f"{state_dir}/{REACHED_NAME}"
    is_armed = True


def reach(point: str) -> None:
    left = _passes.get(point, 0)
    if not left:
        return
    _passes[point] = left - 1
    if left == 1:
        fd = os.open(_reached_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        os.write(fd, f"{os.getpid()} {point}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)
