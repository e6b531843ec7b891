"""Commands in odd surroundings: standard descriptors that are closed, full, or non-blocking; and what they show of
texts that others wrote."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.waiting import eventually_sync
from tests.support.workers import BASE_ENV, PATIENCE_S, ROOT, Worker
from worker_svc.job import JobState, Outcome


def shell(worker: Worker, command: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[bytes]:
    """`$W` is the program."""
    program = f"{sys.executable} -m worker_svc"
    env = {"PATH": BASE_ENV["PATH"], "PYTHONPATH": str(ROOT), "WORKER_SVC_ADDR": worker.address, "W": program, **env}
    return subprocess.run(["bash", "-c", command], cwd=cwd, env=env, capture_output=True, timeout=PATIENCE_S)


_PRINTING = ["start --id {} true", "run echo x", "list", "list --json", "prune --keep 99", "--version", "list --help"]


@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- 2>&-"])
@pytest.mark.parametrize("command", _PRINTING)
def test_what_is_closed_and_not_needed_is_not_missed(shared: Worker, command: str, closed: str) -> None:
    done = shell(shared, f"$W {command.format(uuid.uuid4().hex)} {closed}")
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("command", _PRINTING)
def test_a_closed_standard_output_loses_nothing_without_a_word(shared: Worker, command: str) -> None:
    name = command.split()[0]
    job_id = uuid.uuid4().hex
    done = shell(shared, f"$W {command.format(job_id)} >&-")
    was_started = f"job {job_id} was started; " if name == "start" else ""
    said = f"worker-svc: {name}: {was_started}standard output: it is closed\n"
    assert (done.returncode, done.stderr.decode()) == (125 if name == "run" else 1, said)
    assert shell(shared, f"$W {command.format(uuid.uuid4().hex)} <&- >&- 2>&-").returncode == done.returncode


@pytest.mark.parametrize("command, status", [("run true", 0), ("run bash -c 'exit 3'", 3)])
def test_who_writes_nothing_needs_no_standard_output(shared: Worker, command: str, status: int) -> None:
    done = shell(shared, f"$W {command} >&-")
    assert (done.returncode, done.stderr) == (status, b"")


def test_a_closed_standard_input_is_an_empty_one(shared: Worker) -> None:
    done = shell(shared, "$W run --stdin - wc -c <&-")
    assert (done.returncode, done.stdout) == (0, b"0\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "command, status",
    [
        ("list --json", 1),
        ("list --help", 1),
        ("--help", 1),
        ("--version", 1),
        ("query {}", 1),
        ("logs {}", 1),
        ("run echo x", 125),
    ],
)
def test_a_full_standard_output(shared: Worker, command: str, status: int, unbuffered: str) -> None:
    job_id = shell(shared, "$W start echo x").stdout.decode().strip()
    shared.wait_finished(job_id)
    done = shell(shared, f"$W {command.format(job_id)} >/dev/full", PYTHONUNBUFFERED=unbuffered)
    name = command.split()[0]
    assert (done.returncode, done.stderr.decode()) == (
        status,
        f"worker-svc: {name}: standard output: No space left on device\n",
    )


def test_a_job_whose_id_cannot_be_written_is_named(shared: Worker) -> None:
    done = shell(shared, "$W start --id named true >/dev/full")
    said = "worker-svc: start: job named was started; standard output: No space left on device\n"
    assert (done.returncode, done.stderr.decode()) == (1, said)


@pytest.mark.parametrize("nowhere", ["2>/dev/full", "2>&-"])
@pytest.mark.parametrize(
    "command, status",
    [("run --separate-stderr bash -c 'echo x >&2'", 125), ("run bash -c 'exit 3'", 3), ("query none", 1)],
)
def test_a_standard_error_that_takes_nothing(shared: Worker, command: str, status: int, nowhere: str) -> None:
    """Where nothing can be said, the status tells."""
    assert shell(shared, f"$W {command} {nowhere}").returncode == status


@pytest.mark.parametrize("nowhere, status", [("2>/dev/full", 1), ("2>&-", 0)])
def test_what_is_said_beside_is_missed_unless_nobody_wants_it(shared: Worker, nowhere: str, status: int) -> None:
    assert shell(shared, f"$W list --label no=such {nowhere}").returncode == status


def test_a_job_of_run_does_not_outlive_a_full_output(shared: Worker) -> None:
    assert shell(shared, "$W run --id full sh -c 'echo x; sleep 999' >/dev/full").returncode == 125
    assert shared.wait_state("full", JobState.FINISHED).outcome is Outcome.STOPPED


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_pipe_that_somebody_made_non_blocking(shared: Worker, unbuffered: str) -> None:
    size = 300_000
    job_id = shell(shared, f"$W start head -c {size} /dev/zero").stdout.decode().strip()
    shared.wait_finished(job_id)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    environment = {"PATH": BASE_ENV["PATH"], "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(
        [sys.executable, "-m", "worker_svc", "logs", job_id, "--addr", shared.address], env=environment, stdout=writer
    ) as process:
        os.close(writer)
        with open(reader, "rb") as pipe:
            assert len(pipe.read()) == size
    assert process.returncode == 0


def test_in_a_directory_that_was_removed(shared: Worker, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    done = shell(shared, "rmdir $PWD; $W query x --addr 127.0.0.1:9", tmp_path / "gone")
    assert done.returncode == 1
    assert done.stderr.decode().startswith("worker-svc: query: no connection")


@contextmanager
def worker_serving(worker: Worker, path: Path) -> Iterator[None]:
    """One whose log cannot be read."""
    worker.spawn()
    try:
        eventually_sync(path.is_socket, PATIENCE_S, "it does not serve")
        yield
    finally:
        worker.__exit__(None, None, None)


def test_serve_with_descriptors_closed(tmp_path: Path) -> None:
    """Whatever it opens first is not taken for its log."""
    worker = Worker(tmp_path, LOG_FILE="")
    worker.run_as = ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash"]
    worker.keys["GRPC_SERVER_ADDR"] = f"unix:{tmp_path}/w.sock"
    with worker_serving(worker, tmp_path / "w.sock"):
        links = [str(Path(f"/proc/{worker.pid}/fd/{fd}").readlink()) for fd in range(3)]
        assert links == ["/dev/null"] * 3
        supervisor = eventually_sync(worker.supervisor_pid, PATIENCE_S, "no supervisor")
        assert Path(f"/proc/{supervisor}/fd/0").readlink() == Path("/dev/null")
    assert not any(b"worker.serving" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
