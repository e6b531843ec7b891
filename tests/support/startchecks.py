"""What the checks before a start find."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from worker_svc.access.startchecks import Finding, check
from worker_svc.config import (
    Config,
    StateConfig,
)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


def config(tmp_path: Path, **fields: Any) -> Config:
    return Config(**{"state": StateConfig(dir=tmp_path / "state"), **fields})


def found(config: Config, file: Path | None = None, *, is_named: bool = True) -> list[Finding]:
    return check(config, file, is_named=is_named)


def mended_by(findings: list[Finding]) -> None:
    """Does what the texts say."""
    for finding in findings:
        subprocess.run(shlex.split(finding.text.rpartition(": ")[2]), check=True)
