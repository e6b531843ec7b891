"""Jobs whose output is bounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from tests.support import programs
from worker_svc.job import (
    OutputPolicy,
    OutputVia,
)

MIB: Final = 1 << 20

# Writes argv[1] bytes of `pattern` to the fd argv[2] as fast as it can, touching the file argv[3] (if given) after the
# first MiB and waiting for argv[4] (if given) at the end.
PATTERN: Final = """
import os, sys, time
total, fd = int(sys.argv[1]), int(sys.argv[2])
begun, go = sys.argv[3:5] if len(sys.argv) > 3 else ("", "")
for at in range(0, total, 1 << 20):
    data = memoryview(b"".join(b"%015d\\n" % n for n in range(at // 16, min(total, at + (1 << 20)) // 16 + 1)))
    data = data[: min(total - at, 1 << 20)]
    while data: data = data[os.write(fd, data):]
    if begun: open(begun, "w").close(); begun = ""
while go and not os.path.exists(go): time.sleep(0.01)
"""


def writes(total: int, fd: int = 1, begun: Path | str = "", go: Path | str = "") -> list[str]:
    return programs.python(PATTERN, str(total), str(fd), str(begun), str(go))


def capped(cap: int, policy: OutputPolicy = OutputPolicy.DROP_HEAD, via: OutputVia = OutputVia.FILE) -> dict[str, Any]:
    return {"output_max_bytes": cap, "output_policy": int(policy), "output_via": int(via)}
