"""`worker-svc demo` as a newcomer runs it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

LIMIT_S = 30


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    directory = tmp_path / "t"
    directory.mkdir()
    return directory


def start_demo(temporary: Path) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WORKER_SVC_")}
    # pytest may have been started with SIGINT ignored, which children inherit.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "worker_svc", "demo"],
            # A setting of the user's own must not reach the demo's worker.
            env={**environment, "TMPDIR": str(temporary), "WORKER_SVC_GRPC_SERVER_USE_TLS": "true"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)


def assert_nothing_is_left(output: str, temporary: Path) -> None:
    assert list(temporary.iterdir()) == []
    for pid in re.findall(r"\(pid (\d+)\)", output):
        status = Path(f"/proc/{pid}/status")
        # Where nothing reaps orphans, a supervisor that ended stays as a zombie.
        assert not status.exists() or "State:\tZ" in status.read_text()


def test_all_goes_as_it_should(temporary: Path) -> None:
    with start_demo(temporary) as demo:
        out, err = demo.communicate(timeout=LIMIT_S)
    assert (demo.returncode, err) == (0, ""), out
    assert "✗" not in out
    assert "\x1b" not in out
    assert out.count("✓") >= 10
    assert "bash    │ tick 4 of 4\n" in out
    assert re.search(r"python +yes +yes +exit status 3 +failed +3 ", out)
    assert re.search(r"long +yes +yes +signal: terminated +stopped +SIGTERM ", out)
    assert "All went as it should" in out
    assert len(re.findall(r"\(pid \d+\)", out)) == 2
    assert_nothing_is_left(out, temporary)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_nothing_behind(temporary: Path, number: signal.Signals) -> None:
    with start_demo(temporary) as demo:
        assert demo.stdout is not None
        seen = ""
        while "mile 1 of 60" not in seen:
            line = demo.stdout.readline()
            assert line, seen
            seen += line
        demo.send_signal(number)
        rest, err = demo.communicate(timeout=LIMIT_S)
    assert (demo.returncode, err) == (130, ""), rest
    assert "Interrupted; everything was cleaned up." in rest
    assert_nothing_is_left(seen + rest, temporary)
