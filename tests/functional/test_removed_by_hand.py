"""What an operator removes of a state directory while a supervisor is there: it stays the only one, and mends it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import programs
from tests.support.waiting import eventually_sync
from tests.support.workers import PATIENCE_S, Refused, SocketClient, SupervisorProcess
from worker_svc.ipc import messages
from worker_svc.job import Outcome
from worker_svc.record import paths
from worker_svc.record.paths import OUTPUT_NAME, STORE_NAME, SUPERVISOR_LOCK_NAME

LOCK, SOCKET, LOG = SUPERVISOR_LOCK_NAME, paths.SOCKET_NAME, paths.SUPERVISOR_LOG_NAME


@pytest.mark.parametrize("names", [(SOCKET,), (LOCK,), (LOCK, SOCKET, LOG)], ids="+".join)
def test_a_second_supervisor_has_the_first_mend_it(supervisor: SupervisorProcess, names: tuple[str, ...]) -> None:
    supervisor.run("j", programs.SLEEP)
    for name in names:
        (supervisor.path / name).unlink()
    second, said = supervisor.spawn()
    assert second.wait(PATIENCE_S) == messages.EXIT_LOCKED
    assert said.startswith(f"failed: {supervisor.path} has a supervisor already (pid {supervisor.pid})")
    assert all(name in said for name in names if name != LOG)
    eventually_sync(lambda: '"supervisor.mended"' in supervisor.log(), PATIENCE_S)
    assert (supervisor.path / LOCK).read_text() == f"{supervisor.pid}\n"
    client = supervisor.connect()
    assert client.ask("status")["running"] == 1
    assert supervisor.client.ask("status")["running"] == 1, "the connection it had is there as well"
    client.ask("shutdown", stop_jobs=True)
    client.close()
    assert supervisor.wait_exit() == 0
    assert not (supervisor.path / SOCKET).exists()
    assert not (supervisor.path / LOCK).exists()


def test_something_else_in_the_place_of_the_socket(supervisor: SupervisorProcess) -> None:
    supervisor.client.ask("status")
    (supervisor.path / SOCKET).unlink()
    (supervisor.path / SOCKET).touch()
    supervisor.spawn()[0].wait(PATIENCE_S)
    eventually_sync(lambda: '"supervisor.mended"' in supervisor.log(), PATIENCE_S)
    client = SocketClient(supervisor.path)
    client.hello()
    client.close()


def test_it_leaves_in_peace_without_them(supervisor: SupervisorProcess) -> None:
    client = supervisor.client
    for name in (LOCK, SOCKET):
        (supervisor.path / name).unlink()
    client.ask("shutdown")
    assert supervisor.wait_exit() == 0
    assert '"supervisor.left"' in supervisor.log()


def test_the_folder_of_the_output(supervisor: SupervisorProcess, tmp_path: Path) -> None:
    supervisor.run("before", programs.until_exists(tmp_path / "go", 3))
    shutil.rmtree(supervisor.path / OUTPUT_NAME)
    record = supervisor.finish("after", ["echo", "hi"], separate_stderr=True)
    assert (record.outcome, supervisor.output("after")) == (Outcome.SUCCEEDED, b"hi\n")
    assert "output.folder_made_anew" in supervisor.log()
    assert (supervisor.path / OUTPUT_NAME).stat().st_mode & 0o777 == 0o700
    (tmp_path / "go").touch()
    assert supervisor.wait_finished("before").exit_code == 3


@pytest.mark.parametrize("is_there", [False, True], ids=["missing", "empty"])
def test_a_store_that_is_gone_is_not_made_anew(supervisor: SupervisorProcess, is_there: bool) -> None:
    supervisor.finish("j", programs.TRUE)
    supervisor.client.ask("shutdown")
    supervisor.wait_exit()
    store = supervisor.path / STORE_NAME
    kept = store.read_bytes()
    store.unlink()
    if is_there:
        store.touch()
    process, said = supervisor.spawn()
    assert process.wait(PATIENCE_S) == 1
    assert said.startswith(f"failed: {store}: is {'empty' if is_there else 'missing'}, though there were jobs here")
    store.write_bytes(kept)
    supervisor.hang_up()
    supervisor.start()
    assert supervisor.record("j").outcome is Outcome.SUCCEEDED


@pytest.mark.parametrize(
    "instead, told",
    [
        (None, "no such file or directory"),
        (Path.touch, "something else was put in its place"),
        (Path.mkdir, "something else was put in its place"),
    ],
    ids=["nothing", "an empty file", "a folder"],
)
def test_a_store_that_is_removed_in_use_takes_no_job(
    supervisor: SupervisorProcess, tmp_path: Path, instead: Callable[[Path], None] | None, told: str
) -> None:
    supervisor.run("j", programs.until_exists(tmp_path / "go", 3))
    store = supervisor.path / STORE_NAME
    store.rename(tmp_path / STORE_NAME)
    if instead is not None:
        instead(store)
    with pytest.raises(Refused, match=f"disk: {store}: {told}: no job can be recorded") as caught:
        supervisor.run("k", programs.TRUE)
    assert caught.value.code == "unavailable"
    if store.is_dir():
        store.rmdir()
    (tmp_path / STORE_NAME).rename(store)
    (tmp_path / "go").touch()
    assert supervisor.wait_finished("j").exit_code == 3
    assert supervisor.finish("k", programs.TRUE).outcome is Outcome.SUCCEEDED


def test_a_start_that_ended_half_way_is_no_store(tmp_path: Path) -> None:
    state = tmp_path / "state"
    (state / OUTPUT_NAME).mkdir(parents=True, mode=0o700)
    (state / STORE_NAME).touch()
    (state / LOCK).write_text("4711\n")
    with SupervisorProcess(state) as supervisor:
        assert supervisor.finish("j", programs.TRUE).outcome is Outcome.SUCCEEDED


def test_a_second_worker(supervisor: SupervisorProcess) -> None:
    """Whatever became of worker.lock, a supervisor has one worker; the next is let in as soon as that has hung up."""
    reader, writer = os.pipe()
    first = SocketClient(supervisor.path)
    first.hello(exclusive=True)
    child = os.fork()
    if not child:  # another process: that is what tells them apart
        try:
            second = SocketClient(supervisor.path)
            second.hello(exclusive=True)
        except Refused as refused:
            os.write(writer, f"{refused.code}: {refused.text}".encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with open(reader) as said:
        whose = f"{supervisor.path} is in use by another worker (pid {os.getpid()})"
        assert said.read() == f"second_worker: state.dir: {whose}: end that one, or set another"
    first.close()
