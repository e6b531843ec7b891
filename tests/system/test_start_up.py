"""What a worker makes of where it is started: directories that are not ours, addresses, inherited signals, names."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.served import failure_of
from tests.support.waiting import eventually_sync
from tests.support.workers import PATIENCE_S, ROOT, Worker
from worker_svc.record.paths import STORE_NAME, SUPERVISOR_LOCK_NAME

# Directories that are not ours


def looked_at(folder: Path) -> list[object]:
    """All that a start could change."""
    found = [folder, *sorted(folder.rglob("*"))] if folder.is_dir() else [folder]
    return [(str(path), tuple(path.lstat())[:7], path.lstat().st_mtime_ns) for path in found]


# How it is made of an empty one, in the directory that has it, and what is said of it.
FOREIGN = {
    "with a file": ("touch state/passwd", "not empty ('passwd')"),
    "with a name to be careful with": (r"touch state/$'\e[2J'", r"not empty ('\x1b[2J')"),
    "with much": ("touch state/{0..8}", "('0', '1', '2' and 6 more)"),
    "with a file, for all": ("touch state/x; chmod 1777 state", "not empty ('x')"),
    "with another's database": (f"cp other.sqlite3 state/{STORE_NAME}", "is another program's database"),
    "with another's file": (f"echo x >state/{STORE_NAME}", "is no database (any more)"),
    "with another's folder": (f"mkdir state/{STORE_NAME}", "is no file"),
    "with another's FIFO": (f"mkfifo state/{STORE_NAME}", "is no file"),
    "with a log and a file": ("touch state/supervisor.log state/x", "not empty ('x')"),
    "a file": ("rmdir state; touch state", "is no directory"),
    "below a file": ("rmdir state; cd ..; rmdir over; touch over", "is no directory"),
    "a link to nothing": ("rmdir state; ln -s gone state", "is a link to gone"),
    "a link to one that is everybody's": ("rmdir state; ln -s /tmp state", "is there for everybody"),
    "a link to a foreign one": ("rmdir state; ln -s /etc state", "is no state directory"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_directory_that_is_not_ours_is_left_alone(tmp_path: Path, kind: str) -> None:
    script, told = FOREIGN[kind]
    state = tmp_path / "over" / "state"
    state.mkdir(parents=True, mode=0o755)
    if "other.sqlite3" in script:
        with closing(sqlite3.connect(tmp_path / "over" / "other.sqlite3")) as db, db:
            db.execute("CREATE TABLE jobs (theirs)")
    subprocess.run(["bash", "-c", script], cwd=tmp_path / "over", check=True)
    before = looked_at(tmp_path / "over")
    (tmp_path / "log").mkdir()
    worker = Worker(tmp_path / "log", state_dir=state)
    reason = failure_of(worker)
    assert reason.startswith(f"state.dir: {state}")
    assert told in reason
    environment = {"PATH": "/", "PYTHONPATH": str(ROOT), "WORKER_SVC_STATE_DIR": str(state)}
    command = [sys.executable, "-m", "worker_svc", "check-config"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert told in done.stderr
    assert looked_at(tmp_path / "over") == before


OURS = {
    "empty": "true",
    "empty, of others": "chmod 777 state",
    "empty, as a tmpfs of Docker": "chmod 1777 state",
    "not there": "rmdir state",
    "nor what is above": "rmdir state; cd ..; rmdir over",
    "a link to an empty one": "mv state real; ln -s real state",
    "the top of a disk": "mkdir state/lost+found",
    "left half-way": f"mkdir state/output; touch state/worker.lock state/supervisor.lock state/{STORE_NAME}",
    "with the log": "touch state/worker.log",
}


@pytest.mark.parametrize("kind", OURS)
def test_a_directory_that_can_be_ours(tmp_path: Path, kind: str) -> None:
    state = tmp_path / "over" / "state"
    state.mkdir(parents=True, mode=0o700)
    subprocess.run(["bash", "-c", OURS[kind]], cwd=tmp_path / "over", check=True)
    worker = Worker(tmp_path, state_dir=state)
    if kind == "with the log":
        worker.log_path = state / "worker.log"
        worker.keys["LOG_FILE"] = str(worker.log_path)
    with worker:
        assert worker.path.stat().st_mode & 0o777 == 0o700


def test_one_of_ours_with_something_beside(tmp_path: Path) -> None:
    with Worker(tmp_path) as worker:
        worker.terminate()
        (worker.path / "notes of an operator").touch()
        worker.start()


@pytest.mark.parametrize("is_there", [False, True], ids=["missing", "empty"])
async def test_a_store_that_is_gone(tmp_path: Path, is_there: bool) -> None:
    with Worker(tmp_path) as worker:
        async with worker.client() as client:
            await client.start("true")
            await client.shutdown()
        assert worker.process is not None
        worker.process.wait(PATIENCE_S)
        (worker.path / STORE_NAME).unlink()
        if is_there:
            (worker.path / STORE_NAME).touch()
        reason = failure_of(worker)
        assert f"{STORE_NAME}: is {'empty' if is_there else 'missing'}, though there were jobs here" in reason
        assert not (worker.path / SUPERVISOR_LOCK_NAME).exists()
        shutil.rmtree(worker.path)


# Addresses


def taken_port(tmp_path: Path) -> tuple[str, socket.socket]:
    held = socket.create_server(("127.0.0.1", 0))
    return f"127.0.0.1:{held.getsockname()[1]}", held


def taken_path(tmp_path: Path) -> tuple[str, socket.socket]:
    held = socket.socket(socket.AF_UNIX)
    held.bind(str(tmp_path / "x.sock"))
    held.listen()
    return f"unix:{tmp_path}/x.sock", held


@pytest.mark.parametrize("take", [taken_port, taken_path])
def test_an_address_that_is_taken(tmp_path: Path, take: Callable[[Path], tuple[str, socket.socket]]) -> None:
    """Nothing is made, and no supervisor is started, by one that cannot serve."""
    address, held = take(tmp_path)
    with held:
        worker = Worker(tmp_path, GRPC_SERVER_ADDR=address)
        assert failure_of(worker) == f"grpc_server.addr: {address}: address already in use"
        assert not worker.path.exists()
        if address.startswith("unix:"):
            assert (tmp_path / "x.sock").is_socket()


@pytest.mark.parametrize(
    "key, value",
    [
        ("GRPC_SERVER_ADDR", "unix:{}/none/x.sock"),
        ("GRPC_SERVER_ADDR", "192.0.2.1:1"),
        ("SCHEDULER_CA_FILE", "{}/none"),
    ],
)
def test_what_else_keeps_it_from_serving(tmp_path: Path, key: str, value: str) -> None:
    keys = {"GRPC_SERVER_INSECURE": "true", "SCHEDULER_USE_TLS": "true", key: value.format(tmp_path)}
    worker = Worker(tmp_path)
    worker.keys |= {"SCHEDULER_ADDR": "127.0.0.1:1", **keys}
    failure_of(worker)
    assert not worker.path.exists()


def test_a_socket_is_taken_back_when_the_start_fails(tmp_path: Path) -> None:
    with Worker(tmp_path):
        assert "in use by another worker" in failure_of(
            Worker(tmp_path, log="second.log", GRPC_SERVER_ADDR=f"unix:{tmp_path}/x.sock")
        )
        assert not (tmp_path / "x.sock").exists()


@pytest.mark.parametrize("address", ["[::ffff:127.0.0.1]:0", "[::ffff:7f00:1]:0", "LOCALHOST.:0", "127.9.9.9:0"])
async def test_what_passes_as_loopback_serves(tmp_path: Path, address: str) -> None:
    with Worker(tmp_path, GRPC_SERVER_ADDR=address) as worker:
        async with worker.client() as client:
            assert (await client.worker()).running == 0


# What whoever started it left to it


async def test_signals_that_were_blocked_or_ignored(tmp_path: Path) -> None:
    """They end the worker all the same, and reach neither supervisor nor jobs."""
    if not shutil.which("env") or subprocess.run(["env", "--block-signal", "true"], check=False).returncode:
        pytest.skip("env (coreutils 8.31) is not there")
    worker = Worker(tmp_path)
    worker.run_as = ["env", "--ignore-signal", "--block-signal"]
    with worker:
        async with worker.client() as client:
            job = await client.start("grep", args=["^Sig[BI]", "/proc/self/status"])
            await client.wait(job.job_id)
            lines = worker.output(job.job_id).decode().split()
            assert lines == ["SigBlk:", "0" * 16, "SigIgn:", "0" * 16]
        supervisor = Path(f"/proc/{worker.supervisor_pid()}/status").read_text()
        assert f"SigBlk:\t{'0' * 16}" in supervisor
        assert worker.terminate() == 0
        os.kill(worker.supervisor_pid(), signal.SIGTERM)
        eventually_sync(lambda: worker.supervisor_pid() == 0, PATIENCE_S)


@pytest.mark.parametrize("key, variable", [("state.dir", "HOME"), ("state.dir", "XDG_STATE_HOME"), ("jobs.cwd", "cwd")])
def test_names_that_are_not_utf_8(tmp_path: Path, key: str, variable: str) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    Path(os.fsdecode(folder)).mkdir()
    environment = {b"PATH": b"/", b"PYTHONPATH": os.fsencode(ROOT), b"HOME": b"/none", os.fsencode(variable): folder}
    command = [sys.executable, "-m", "worker_svc", "serve", "--grpc-server-addr", "127.0.0.1:0"]
    cwd = folder if variable == "cwd" else os.fsencode(tmp_path)
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, check=False)
    assert done.returncode == 2
    told = done.stderr.decode()
    assert told.startswith(f'{key}: "{tmp_path}/caf\\udce9')
    assert "is not UTF-8" in told


def test_the_variables_of_a_service_in_kubernetes(tmp_path: Path) -> None:
    worker = Worker(tmp_path)
    for name in ("WORKER_SVC", "WORKER_SVC_JOBS"):
        worker.environment |= {
            f"{name}_SERVICE_HOST": "10.96.7.8",
            f"{name}_SERVICE_PORT": "50000",
            f"{name}_SERVICE_PORT_GRPC": "50000",
            f"{name}_PORT": "tcp://10.96.7.8:50000",
            f"{name}_PORT_50000_TCP": "tcp://10.96.7.8:50000",
            f"{name}_PORT_50000_TCP_PROTO": "tcp",
            f"{name}_PORT_50000_TCP_PORT": "50000",
            f"{name}_PORT_50000_TCP_ADDR": "10.96.7.8",
        }
    with worker:
        pass


@pytest.mark.parametrize(
    "name, value",
    [("WORKER_SVC_PORT", "50000"), ("WORKER_SVC_GRPC_SERVER_PORT", "50001"), ("WORKER_SVC_JOBS_SLOT", "1")],
)
def test_what_could_be_meant_for_us_is_still_told(tmp_path: Path, name: str, value: str) -> None:
    worker = Worker(tmp_path)
    worker.environment = {name: value}
    assert worker.spawn().wait(PATIENCE_S) == 2
    assert f"{name}: unknown variable" in (tmp_path / "worker.out").read_text()
