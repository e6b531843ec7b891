"""The real worker, run as its users run it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from pathlib import Path

from tests.support import programs
from tests.support.programs import rss_bytes, sleeps_for
from tests.support.served import MIX, assert_logged_exactly_once
from tests.support.waiting import eventually_sync
from tests.support.workers import PATIENCE_S, Worker
from worker_svc import JobState, Outcome
from worker_svc.ipc import frames, messages
from worker_svc.job import JobSpec, Transition
from worker_svc.job import JobState as State
from worker_svc.record import paths
from worker_svc.record.writer import JobStore
from worker_svc.supervisor.connections import listen


async def test_two_hundred_jobs_in_twenty_slots(tmp_path: Path) -> None:
    with Worker(tmp_path, JOBS_SLOTS="20") as worker:
        async with worker.client() as client:

            async def run(number: int) -> None:
                argv, outcome, exit_code, name = MIX[number % len(MIX)]
                started = await client.start(argv[0], args=argv[1:], labels={"number": str(number)})
                assert started.state in (JobState.RUNNING, JobState.QUEUED)
                job = await client.wait(started.job_id, PATIENCE_S)
                assert (job.outcome, job.exit_code, job.signal) == (outcome, exit_code, name), argv

            async with asyncio.timeout(50):
                await asyncio.gather(*(run(number) for number in range(200)))
            told = await client.worker()
            assert (told.running, told.queued) == (0, 0)
        running = 0
        for event in worker.events():
            running += (event.to_state is State.STARTING) - (event.to_state is State.FINISHED)
            assert running <= 20
        assert running == 0
        assert_logged_exactly_once(worker)
        assert programs.children_of(worker.supervisor_pid()) == []


async def test_secrets_are_in_no_log(worker: Worker) -> None:
    secret = "hunter2-hunter2"
    async with worker.client() as client:
        argv = programs.exits(1)
        started = await client.start(argv[0], args=argv[1:], env={"PASSWORD": secret}, stdin=secret.encode())
        await client.wait(started.job_id, PATIENCE_S)
        with contextlib.suppress(Exception):
            await client.start("no-such-command", env={"PASSWORD": secret}, stdin=secret.encode())
        with contextlib.suppress(Exception):
            await client.start("true", env={"PASSWORD": f"{secret}\0"})
    worker.restart()
    worker.terminate()
    written = [worker.log_path, worker.path / paths.SUPERVISOR_LOG_NAME, worker.tmp_path / "worker.out"]
    for path in written:
        assert secret not in path.read_text(), path


async def test_the_environment_passed_on(tmp_path: Path) -> None:
    worker = Worker(tmp_path)
    worker.environment = {"HOME": "/home/somebody", "LANG": "C.UTF-8", "SECRET": "not for jobs", "PYTHONWARNINGS": ""}
    with worker:
        async with worker.client() as client:
            started = await client.start("env", env={"MINE": "1"})
            await client.wait(started.job_id, PATIENCE_S)
        lines = set(worker.output(started.job_id).decode().splitlines())
        assert {"HOME=/home/somebody", "LANG=C.UTF-8", "MINE=1", f"WORKER_JOB_ID={started.job_id}"} <= lines
        names = {line.partition("=")[0] for line in lines}
        assert names == {"PATH", "HOME", "LANG", "MINE", "WORKER_JOB_ID", "WORKER_STATE_ID", "WORKER_JOB_MARK"}


async def test_an_environment_that_is_not_utf_8(tmp_path: Path) -> None:
    worker = Worker(tmp_path)
    worker.environment = {"HOME": os.fsdecode(b"/home/caf\xe9"), "LANG": "C.UTF-8"}
    with worker:
        async with worker.client() as client:
            started = await client.start("env")
            await client.wait(started.job_id, PATIENCE_S)
        assert b"HOME=/home/caf\xe9\n" in worker.output(started.job_id)


async def test_a_long_state_directory(tmp_path: Path) -> None:
    folder = tmp_path
    while len(str(folder)) < 200:
        folder /= "a-rather-long-name"
    with Worker(tmp_path, state_dir=folder) as worker:
        async with worker.client() as client:
            started = await client.start("true")
            assert (await client.wait(started.job_id, PATIENCE_S)).outcome == Outcome.SUCCEEDED


async def test_on_a_unix_socket(tmp_path: Path) -> None:
    with Worker(tmp_path, GRPC_SERVER_ADDR=f"unix:{tmp_path}/w.sock") as worker:
        async with worker.client() as client:
            started = await client.start("true")
            assert (await client.wait(started.job_id, PATIENCE_S)).outcome == Outcome.SUCCEEDED
        assert worker.terminate() == 0
        assert not (tmp_path / "w.sock").exists()


# What it costs


def test_idle_it_costs_next_to_nothing(worker: Worker) -> None:
    pids = (worker.pid, worker.supervisor_pid())
    eventually_sync(lambda: worker.log_events("worker.serving"))
    for pid in pids:
        eventually_sync(lambda pid=pid: sleeps_for(pid, 1.0), message="it does something all the time")  # type: ignore[misc]
    assert rss_bytes(pids[1]) < 20_000_000


# A supervisor of our own


class PlainSupervisor:
    """Answers hello, with a doorbell right behind it, and status."""

    def __init__(self, state_dir: Path, sequences: tuple[int, int]) -> None:
        self._listener = listen(str(state_dir))
        self._listener.setblocking(True)
        self._sequences = sequences
        self._connected: socket.socket | None = None
        self._store_id = "0123456789abcdef"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        self._connected, _ = self._listener.accept()
        decoder = frames.Decoder()
        while received := self._connected.recv(65536):
            for frame in decoder.feed(received):
                self._connected.sendall(self._answer(messages.number_of(frame), messages.decode(frame)))

    def _answer(self, number: int, request: messages.Message) -> bytes:
        said, rung = self._sequences
        if isinstance(request, messages.Hello):
            welcome = messages.Welcome(request.protocol, os.getpid(), time.time_ns(), self._store_id, "", said, False)
            return messages.encode(number, welcome) + messages.encode(0, messages.Doorbell(rung))
        status = messages.Status(0, 0, rung, 0, os.getpid(), "x", "", "", {}, True, "", False)
        return messages.encode(number, status)

    def close(self) -> None:
        if self._connected is not None:
            self._connected.shutdown(socket.SHUT_RDWR)
            self._connected.close()
        self._listener.close()


def test_a_doorbell_right_behind_the_hello(tmp_path: Path) -> None:
    """What happens while the worker starts is not left unread until something else happens."""
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    store = JobStore(str(state))
    store.begin()
    ordinal = store.add_job("j", JobSpec("true"), "", 1, b"")
    for _ in range(3):
        store.add_transition(ordinal, Transition(0, "j", 5, State.NEW, State.QUEUED), {})
    store.commit()
    supervisor = PlainSupervisor(state, (1, 3))
    worker = Worker(tmp_path)
    try:
        worker.start()
        worker.wait_log("job.transition", 3)
    finally:
        worker.kill()
        supervisor.close()
        store.close()
