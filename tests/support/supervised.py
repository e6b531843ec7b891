"""What several tests of the supervisor share."""

from __future__ import annotations

import os
from pathlib import Path

from tests.support.workers import (
    SupervisorProcess,
)

IS_ROOT = os.geteuid() == 0


def with_slots(state: Path, slots: int, queue_length: int = 100) -> SupervisorProcess:
    return SupervisorProcess(state, slots=slots, queue_length=queue_length)
