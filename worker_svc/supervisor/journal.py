"""The supervisor's own log: JSON lines on standard error, which is `supervisor.log` in the state directory.

What happens to jobs is not logged here: that is in the store, and the worker logs it from there.
"""

from __future__ import annotations

import json
import os
import time
from typing import Final

from worker_svc.ipc.meeting import open_log
from worker_svc.linux.clocks import NS_PER_S, wall_ns

_MAX_BYTES: Final = 1024 * 1024
_lost_lines = 0
_is_cut = False
"""Whether the last line was written in part."""


def use_log(state_dir: str) -> None:
    """Standard error is the log from now on; a large one is begun anew. Raises OSError."""
    log = open_log(state_dir)
    if os.fstat(log).st_size > _MAX_BYTES:
        os.ftruncate(log, 0)
    os.dup2(log, 2)
    os.close(log)


def note(event: str, **fields: object) -> None:
    """What cannot be written is counted, and told with the next line that can be: jobs matter more."""
    global _lost_lines, _is_cut
    try:
        if _lost_lines:
            fields["lost_lines"] = _lost_lines
        seconds, ns = divmod(wall_ns(), NS_PER_S)
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
        line = json.dumps({"time": f"{moment}.{ns // 1000:06d}Z", "event": event, **fields}).replace("\x7f", "\\u007f")
        whole = b"\n" * _is_cut + line.encode() + b"\n"
        written = os.write(2, whole)
    except (OSError, MemoryError):
        _lost_lines += 1
        return
    _is_cut = written < len(whole)
    _lost_lines = _lost_lines + 1 if _is_cut else 0
