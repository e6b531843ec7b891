"""The supervisor's own log: JSON lines on standard error, which is `supervisor.log` in the state directory.

What happens to jobs is not logged here: that is in the store, and the worker logs it from there.
"""

from __future__ import annotations

import json
import os
import time


def note(event: str, **fields: object) -> None:
    seconds, ns = divmod(time.time_ns(), 1_000_000_000)
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    line = json.dumps({"time": f"{moment}.{ns // 1000:06d}Z", "event": event, **fields})
    try:
        os.write(2, line.encode() + b"\n")
    except OSError:
        # A full disk or a closed standard error: there is nowhere left to say so, and jobs matter more.
        return
