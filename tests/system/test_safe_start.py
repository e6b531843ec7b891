"""The worker as it starts: what it refuses, what it warns of, and the certificates and commands of the manual."""

from __future__ import annotations

import os
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.state_dirs import StateDir
from tests.support.workers import PATIENCE_S, ROOT, Worker
from worker_svc.client import WorkerClient
from worker_svc.job import JobNotFound, PermissionDenied

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")


def ended(worker: Worker) -> tuple[int, str]:
    """The exit status of a worker that does not start, and what it said."""
    status = worker.spawn().wait(PATIENCE_S)
    printed = (worker.tmp_path / "worker.out").read_text()
    reasons = [line["reason"] for line in worker.log_events("worker.failed")]
    assert not (worker.path / "jobs.sqlite3").exists()
    return status, printed + "\n".join(reasons)


def test_no_start_where_other_machines_reach_it(tmp_path: Path) -> None:
    status, said = ended(Worker(tmp_path, GRPC_SERVER_ADDR="0.0.0.0:0"))
    assert status == 2
    assert "WORKER_SVC_GRPC_SERVER_ADDR: 0.0.0.0:0 can be reached from other machines" in said
    assert "insecure = true" in said


def test_insecure_in_so_many_words_is_told_at_each_start(tmp_path: Path) -> None:
    with Worker(tmp_path, GRPC_SERVER_ADDR="0.0.0.0:0", GRPC_SERVER_INSECURE="true") as worker:
        for count in (1, 2):
            line = worker.log_events("worker.insecure")[-1]
            assert len(worker.log_events("worker.insecure")) == count
            assert line["level"] == "warning"
            assert "serves on 0.0.0.0:0 without TLS: everybody who can reach it" in line["reason"]
            worker.restart()


def certificates(tmp_path: Path) -> Path:
    subprocess.run([sys.executable, "-m", "worker_svc", "gen-certs", str(tmp_path / "certs")], check=True, cwd=ROOT)
    return tmp_path / "certs"


def test_no_start_with_a_key_that_all_can_read(tmp_path: Path) -> None:
    certs = certificates(tmp_path)
    (certs / "server.key").chmod(0o644)
    keys: dict[str, Any] = {
        "GRPC_SERVER_USE_TLS": "true",
        "GRPC_SERVER_CRT_FILE": str(certs / "server.pem"),
        "GRPC_SERVER_KEY_FILE": str(certs / "server.key"),
    }
    status, said = ended(Worker(tmp_path, **keys))
    assert status == 1
    assert f"is readable by everybody (mode 0644): chmod 600 {certs}/server.key" in said
    (certs / "server.key").chmod(0o600)
    with Worker(tmp_path, **keys):
        pass


def test_the_configuration_file(tmp_path: Path) -> None:
    file = tmp_path / "worker.toml"
    file.write_text("[jobs]\nenv = { TOKEN = 'x' }\n")
    file.chmod(0o666)
    status, said = ended(Worker(tmp_path))
    assert status == 1
    assert "everybody can change what jobs run (mode 0666): chmod go-w worker.toml" in said
    file.chmod(0o644)
    with Worker(tmp_path) as worker:
        line = worker.log_events("worker.insecure")[-1]
        assert "jobs.env may hold secrets: chmod 640 worker.toml" in line["reason"]


def test_no_start_with_an_authority_that_all_can_replace(tmp_path: Path) -> None:
    certs = certificates(tmp_path)
    keys: dict[str, Any] = {
        "GRPC_SERVER_USE_TLS": "true",
        "GRPC_SERVER_CRT_FILE": str(certs / "server.pem"),
        "GRPC_SERVER_KEY_FILE": str(certs / "server.key"),
        "GRPC_SERVER_CLIENT_CA_FILE": str(certs / "ca.pem"),
        "ACCESS_ADMINS": "dns:admin",
    }
    (certs / "ca.pem").chmod(0o666)
    status, said = ended(Worker(tmp_path, **keys))
    assert status == 1
    assert f"{certs}/ca.pem: everybody can change who is let in, as whom (mode 0666): chmod go-w {certs}/ca.pem" in said
    (certs / "ca.pem").chmod(0o644)
    with Worker(tmp_path, **keys) as worker:
        # Nor is it read again so.
        (certs / "ca.pem").chmod(0o666)
        os.kill(worker.pid, signal.SIGHUP)
        assert "everybody can change who is let in" in worker.wait_log("tls.not_reloaded")["reason"]


def test_a_state_directory_is_closed(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o755)
    with Worker(tmp_path) as worker:
        assert stat.S_IMODE(worker.path.stat().st_mode) == 0o700
        [line] = worker.log_events("worker.mended")
        assert "was open to other users (mode 0755)" in line["what"]


@needs_root
def test_no_start_in_somebody_elses_state_directory(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    os.chown(tmp_path / "state", 1234, 0)
    status, said = ended(Worker(tmp_path))
    assert status == 1
    assert f"belongs to user 1234, who could change what jobs run: chown -R 0 {tmp_path}/state" in said


# The unix socket


@contextmanager
def user(uid: int) -> Iterator[None]:
    """What connects meanwhile is this user's."""
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


async def test_the_unix_socket_is_its_owners(tmp_path: Path) -> None:
    path = tmp_path / "w.sock"
    with Worker(tmp_path, GRPC_SERVER_ADDR=f"unix:{path}", ACCESS_ANONYMOUS="none") as worker:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        async with worker.client() as client:
            job_id = (await client.start("true")).job_id
            assert (await client.job(job_id)).owner == f"uid:{os.geteuid()}"
        [line] = worker.log_events("audit")
        assert (line["identity"], line["role"], line["peer"]) == (f"uid:{os.geteuid()}", "admin", f"pid:{os.getpid()}")


@needs_root
async def test_users_of_the_unix_socket_have_roles() -> None:
    with tempfile.TemporaryDirectory(prefix="worker-svc-test-") as folder:
        tmp_path = Path(folder)
        tmp_path.chmod(0o755)
        keys: dict[str, Any] = {"GRPC_SERVER_UNIX_MODE": "0666", "ACCESS_SUBMITTERS": "uid:1234,uid:1235"}
        with Worker(tmp_path, GRPC_SERVER_ADDR=f"unix:{tmp_path}/w.sock", **keys) as worker:
            clients = {}
            for uid in (1234, 1235, 1236):
                clients[uid] = await WorkerClient(worker.address).__aenter__()
                with user(uid), pytest.raises((JobNotFound, PermissionDenied)):
                    await clients[uid].query("none")
            job_id = (await clients[1234].start("sleep", args=["999"])).job_id
            assert (await clients[1234].job(job_id)).owner == "uid:1234"
            with pytest.raises(JobNotFound, match=r"^job not found$"):
                await clients[1235].stop(job_id)
            with pytest.raises(PermissionDenied, match="uid:1236 has no role"):
                await clients[1236].worker()
            await clients[1234].stop(job_id, wait=True)
            for client in clients.values():
                await client.__aexit__(None, None, None)


# The manual


def commands_of_the_manual() -> list[str]:
    text = (ROOT / "docs" / "security.md").read_text()
    match = re.search(r"in five commands.*?```sh\n(.*?)```", text, re.DOTALL)
    assert match
    return match[1].replace("\\\n", " ").strip().splitlines()


def test_five_commands_of_the_manual(tmp_path: Path) -> None:
    commands = commands_of_the_manual()
    assert len(commands) == 5
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "worker-svc"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m worker_svc "$@"\n')
    program.chmod(0o755)
    make, serve, environment, run, revoke = [command.replace("50000", str(port)) for command in commands]
    # Between them, what a reader does without being told: to wait until a thing is done.
    script = f"""set -eu
    {make}
    sed -i 's/:50000/:{port}/' certs/worker.toml
    {serve}
    until (exec 3<>/dev/tcp/localhost/{port}) 2>/dev/null; do sleep 0.05; done
    {environment}
    {run}
    WORKER_SVC_CRT=certs/viewer.pem WORKER_SVC_KEY=certs/viewer.key worker-svc list > listed
    {revoke}
    until grep -q tls.reloaded log; do sleep 0.05; done
    ! WORKER_SVC_CRT=certs/viewer.pem WORKER_SVC_KEY=certs/viewer.key worker-svc list 2> refused
    ! worker-svc shutdown 2>> refused
    WORKER_SVC_CRT=certs/admin.pem WORKER_SVC_KEY=certs/admin.key worker-svc shutdown
    wait
    """
    environ = {
        "PATH": f"{tmp_path}/bin:/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "HOME": str(tmp_path),
        "WORKER_SVC_SCHEDULER_ADDR": "",
        "WORKER_SVC_LOG_FILE": str(tmp_path / "log"),
    }
    try:
        done = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=50, check=False
        )
    finally:
        StateDir(tmp_path / ".local/state/worker-svc").clean_up()
    assert done.returncode == 0, done
    assert "\nhello\n" in done.stdout
    assert "echo " in (tmp_path / "listed").read_text()
    refused = (tmp_path / "refused").read_text()
    assert "no connection" in refused or "was lost" in refused
    assert "ShutdownWorker is not for role submitter, which dns:submitter has" in refused
