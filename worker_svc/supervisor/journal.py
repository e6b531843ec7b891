"""The supervisor's own log: JSON lines on standard error, which is `supervisor.log` in the state directory.

What happens to jobs is not logged here: that is in the store, and the worker logs it from there.
"""

from __future__ import annotations

import json
import os
import time

from worker_svc.supervisor.clocks import NS_PER_S, wall_ns


def note(event: str, **fields: object) -> None:
    try:
        seconds, ns = divmod(wall_ns(), NS_PER_S)
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
        line = json.dumps({"time": f"{moment}.{ns // 1000:06d}Z", "event": event, **fields})
        os.write(2, line.encode() + b"\n")
    except (OSError, MemoryError):
        # A full disk or a closed standard error: there is nowhere left to say so, and jobs matter more.
        return
