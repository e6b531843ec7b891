"""What runs under us cannot act on us: the supervisor takes no job for a worker, whatever it has read and wherever it
went."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support import programs
from tests.support.waiting import eventually_sync
from tests.support.workers import PATIENCE_S, Refused, SocketClient, SupervisorProcess
from worker_svc.ipc import messages
from worker_svc.job import JobState, LeaderExit
from worker_svc.record import paths
from worker_svc.supervisor.settings import DEFAULTS

# As a worker, with the right key, which the job can read here; says in a file what came of it.
ASK: Final = """
import json, os, socket, struct, sys
state, said, way, protocol = sys.argv[1:]
key = open(f"{state}/supervisor.key").read()
hello = {"r": 1, "op": "hello", "protocol": int(protocol), "version": "x", "key": key, "settings": {}}
hello = json.dumps(hello).encode()
s = socket.socket(socket.AF_UNIX)
os.chdir(state)
if way == "by a child that is gone":
    if os.fork() == 0:
        s.connect("supervisor.sock")
        os._exit(0)
    os.wait()
else:
    s.connect("supervisor.sock")
try:
    s.sendall(struct.pack("!II", len(hello), 0) + hello)
    answer = s.recv(4096)
except OSError:
    answer = b""
with open(said + ".new", "w") as file:
    file.write("answered" if answer else "refused")
os.rename(said + ".new", said)
"""
KEYLESS: Final[dict[str, Any]] = {
    "protocol": messages.PROTOCOL_VERSION,
    "version": "x",
    "key": "",
    "settings": DEFAULTS,
    "exclusive": False,
}
PROTOCOL: Final = str(messages.PROTOCOL_VERSION)
WAYS: Final = {
    "itself": '"$@"',
    "by a child that is gone": '"$@"',
    "a child": '"$@"; :',
    "a child without its environment": 'env -i "$@"; :',
    "of a long line": 'd() { n=$1; shift; if [ $n = 0 ]; then "$@"; else (d $((n-1)) "$@"; :); fi; }; d 99 "$@"',
    "an orphan": '(setsid "$@" &)',
    "an orphan without its environment": '(setsid env -i "$@" &)',
}


@pytest.fixture
def supervisor_options(level: str) -> tuple[str, ...]:
    return ("--containment", level)


def answer_to(supervisor: SupervisorProcess, tmp_path: Path, way: str, *, after: str = ":") -> str:
    """What a job is told that asks by this way, once a shell script is through."""
    said = tmp_path / "said"
    ask = [sys.executable, "-S", "-E", "-c", ASK, str(supervisor.path), str(said), way, PROTOCOL]
    script = f"{after}; {WAYS[way]}; exec sleep 999"
    supervisor.run("asks", ["sh", "-c", script, "sh", *ask], leader_exit=int(LeaderExit.WAIT))
    return str(said)


@pytest.mark.parametrize("way", WAYS)
def test_a_job_is_no_worker(supervisor: SupervisorProcess, tmp_path: Path, way: str) -> None:
    said = Path(answer_to(supervisor, tmp_path, way))
    eventually_sync(said.exists, PATIENCE_S, "the job did not get as far")
    assert said.read_text() == "refused"
    eventually_sync(lambda: "the peer is a job" in supervisor.log(), PATIENCE_S, "it is not noted")
    assert supervisor.client.ask("status")["running"] == 1


@pytest.mark.parametrize("way", [way for way in WAYS if "orphan without" not in way])
def test_nor_is_the_job_of_an_earlier_supervisor(supervisor: SupervisorProcess, tmp_path: Path, way: str) -> None:
    """It does not descend from this one."""
    gate = tmp_path / "gate"
    said = Path(answer_to(supervisor, tmp_path, way, after=f"until [ -e {gate} ]; do sleep 0.02; done"))
    supervisor.kill()
    supervisor.start()
    gate.touch()
    eventually_sync(said.exists, PATIENCE_S, "the job did not get as far")
    assert said.read_text() == "refused"


def test_refused_peers_do_not_fill_the_log(supervisor: SupervisorProcess) -> None:
    code = f"""
import socket
for _ in range(500):
    s = socket.socket(socket.AF_UNIX)
    s.connect({str(supervisor.path / paths.SOCKET_NAME)!r})
    s.close()
"""
    assert supervisor.finish("floods", programs.python(code)).exit_code == 0
    eventually_sync(lambda: "the peer is a job" in supervisor.log(), PATIENCE_S)
    supervisor.client.ask("status")
    assert supervisor.log().count("the peer is a job") < 100


def test_who_does_not_know_the_key_is_refused(supervisor: SupervisorProcess) -> None:
    supervisor.run("j", programs.SLEEP)
    for key in ("", "0" * 64, "\u0660" * 64):
        client = SocketClient(supervisor.path)
        with pytest.raises(Refused, match=r"supervisor\.key"):
            client.ask("hello", **KEYLESS | {"key": key})
        with pytest.raises(Refused, match="must be hello"):
            client.ask("stop", job_id="j")
        client.close()
    assert supervisor.record("j").state is JobState.RUNNING


@pytest.mark.parametrize("content", [None, b"", b"\xff" * 64])
def test_a_key_that_is_lost_is_made_again(supervisor: SupervisorProcess, content: bytes | None) -> None:
    """As soon as somebody asks in vain; and by a new supervisor."""
    path = supervisor.path / paths.KEY_NAME
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    client = SocketClient(supervisor.path)
    with pytest.raises(Refused):
        client.ask("hello", **KEYLESS)
    client.hello()
    client.close()
    assert path.stat().st_mode & 0o777 == 0o600
    path.unlink()
    supervisor.kill()
    supervisor.start()
    supervisor.connect().close()


def test_the_house_is_let_in(supervisor: SupervisorProcess) -> None:
    """A process beside the jobs: another session, other parents, no environment."""
    said = supervisor.path.parent / "said"
    ask = [sys.executable, "-S", "-E", "-c", ASK, str(supervisor.path), str(said), "itself", PROTOCOL]
    subprocess.run(ask, env={}, start_new_session=True, check=True)
    assert said.read_text() == "answered"
