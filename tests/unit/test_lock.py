"""pyproject.toml, uv.lock and the two requirements files that pip installs say the same."""

import os
import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]


def test_lock_is_fresh() -> None:
    done = subprocess.run(
        [TOP / "scripts/lock", "--check"],
        env={**os.environ, "LOCK_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
