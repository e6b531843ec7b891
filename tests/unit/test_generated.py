"""worker_svc/pb is what scripts/gen-protos makes of protos/."""

import os
import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]


def generated(directory: Path) -> dict[str, str]:
    return {str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*.py")}


def test_stubs_are_fresh(tmp_path: Path) -> None:
    done = subprocess.run(
        [TOP / "scripts/gen-protos", tmp_path],
        env={**os.environ, "PROTO_PYTHON": sys.executable},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    fresh, committed = generated(tmp_path), generated(TOP / "worker_svc/pb")
    stale = sorted(name for name in fresh.keys() | committed.keys() if fresh.get(name) != committed.get(name))
    assert not stale, f"worker_svc/pb does not fit protos/ (run scripts/gen-protos): {stale}"
