"""The real worker, run as its users run it, and the real supervisor with a plain client of its socket."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from tests.support.state_dirs import StateDir
from tests.support.waiting import PATIENCE_S as PATIENCE_S
from tests.support.waiting import eventually_sync
from worker_svc.client import WorkerClient
from worker_svc.ipc import frames, messages
from worker_svc.job import JobRecord
from worker_svc.record import paths
from worker_svc.supervisor.settings import DEFAULTS

ROOT: Final = Path(__file__).parent.parent.parent
BASE_ENV: Final = {"PATH": "/usr/local/bin:/usr/bin:/bin", "MARK": "from base_env"}


class Worker(StateDir):
    """`python -m worker_svc serve` with its own state directory and log under `tmp_path`: `with Worker(tmp_path) as w`.

    Keys of the configuration are given as they stand in the environment, without the prefix: `JOBS_SLOTS="2"`.
    """

    def __init__(self, tmp_path: Path, *, state_dir: Path | None = None, log: str = "worker.log", **keys: str) -> None:
        super().__init__(state_dir or tmp_path / "state")
        self.tmp_path = tmp_path
        self.log_path = tmp_path / log
        self.keys = {
            "GRPC_SERVER_ADDR": "127.0.0.1:0",
            "SCHEDULER_ADDR": "",
            "STATE_DIR": str(self.path),
            "JOBS_CWD": str(tmp_path),
            "LOG_FILE": str(self.log_path),
            "LOG_FORMAT": "json",
            **keys,
        }
        self.environment: dict[str, str] = {}
        """Besides the keys and the bare minimum."""
        self.run_as: list[str] = []
        """A command to run it with, such as setpriv."""
        self.options: tuple[str, ...] = ()
        """More of its own."""
        self.process: subprocess.Popen[bytes] | None = None
        self.address = ""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()
        self.clean_up()

    def spawn(self) -> subprocess.Popen[bytes]:
        """Runs the worker without waiting for it."""
        environment = {f"WORKER_SVC_{key}": value for key, value in self.keys.items()}
        with (self.tmp_path / "worker.out").open("ab") as printed:
            self.process = subprocess.Popen(
                [*self.run_as, sys.executable, "-m", "worker_svc", "serve"],
                cwd=self.tmp_path,
                env={"PATH": BASE_ENV["PATH"], "PYTHONPATH": str(ROOT), **self.environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
            )
        return self.process

    def start(self) -> None:
        process = self.spawn()

        def serving() -> dict[str, Any] | None:
            assert process.poll() is None, f"the worker ended with {process.poll()}: {self.tail()}"
            events = [line for line in self.log_events("worker.serving") if line["pid"] == process.pid]
            return events[-1] if events else None

        found = eventually_sync(serving, PATIENCE_S, "the worker does not serve")
        assert found is not None
        self.address = found["address"]

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def client(self) -> WorkerClient:
        return WorkerClient(self.address)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(PATIENCE_S)

    def terminate(self) -> int:
        """Asks it to leave, and returns its exit status."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(PATIENCE_S)

    def restart(self) -> None:
        """As by a crash: kill -9, and a new one."""
        self.kill()
        self.start()

    def log_events(self, event: str = "") -> list[dict[str, Any]]:
        """The lines of the log; of one event, if it is named. A line that is being written is left out."""
        if not self.log_path.exists():
            return []
        lines = self.log_path.read_bytes().split(b"\n")[:-1]
        read = [json.loads(line) for line in lines if line]
        return [line for line in read if not event or line["event"] == event]

    def wait_log(self, event: str, count: int = 1) -> dict[str, Any]:
        """The last line of this event, once there are so many."""
        eventually_sync(
            lambda: len(self.log_events(event)) >= count, PATIENCE_S, f"no {event} in the log ({self.tail()})"
        )
        return self.log_events(event)[-1]

    def tail(self) -> str:
        printed = self.tmp_path / "worker.out"
        return str(self.log_events()[-5:]) + (printed.read_text()[-2000:] if printed.exists() else "")


class Refused(Exception):
    """The supervisor answered with an error."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code
        self.text = text


def key_of(state_dir: Path) -> str:
    """What the supervisor there wants to be shown."""
    return (state_dir / paths.KEY_NAME).read_text()


class SocketClient:
    """A worker's end of the unix socket, as plain as can be."""

    def __init__(self, state_dir: Path, timeout_s: float = PATIENCE_S) -> None:
        self.state_dir = state_dir
        folder = os.open(state_dir, os.O_RDONLY)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.connect(f"/proc/self/fd/{folder}/{paths.SOCKET_NAME}")
        except OSError:
            self._socket.close()
            raise
        finally:
            os.close(folder)
        self._decoder = frames.Decoder()
        self._answers: dict[int, messages.Message] = {}
        self._number = 0
        self.sequence = 0
        """The latest doorbell's."""

    def hello(self, *, exclusive: bool = False, **settings: Any) -> dict[str, Any]:
        settings = {"slots": 1000, "queue_length": 1000, "base_env": BASE_ENV, "idle_exit_s": 60.0, **settings}
        return self.ask("hello", **hello_fields(self.state_dir, exclusive=exclusive, **settings))

    def ask(self, op: str, body: bytes = b"", **fields: Any) -> dict[str, Any]:
        """Raises Refused."""
        return self.answer(self.send(op, body, **fields))

    def send(self, op: str, body: bytes = b"", **fields: Any) -> int:
        """Returns the request's number, for `answer`."""
        number, frame = self.frame(op, body, **fields)
        self.send_bytes(frame)
        return number

    def frame(self, op: str, body: bytes = b"", **fields: Any) -> tuple[int, bytes]:
        """A request to be sent together with others, by `send_bytes`."""
        self._number += 1
        if "spec" in fields:
            fields |= {"spec": json.dumps(fields["spec"]).encode(), "stdin": body}
        return self._number, messages.encode(self._number, messages.KIND_OF_OP[op](**fields))

    def send_bytes(self, data: bytes) -> None:
        self._socket.sendall(data)

    def answer(self, number: int) -> dict[str, Any]:
        """Raises Refused, or ConnectionError when the supervisor has hung up."""
        while number not in self._answers:
            self.receive()
        answer = self._answers.pop(number)
        if isinstance(answer, messages.Refused):
            raise Refused(*answer)
        return answer._asdict()

    def receive(self) -> list[messages.Message]:
        """What comes next, doorbells and all. Raises ConnectionError at its end."""
        received = self._socket.recv(65536)
        if not received:
            raise ConnectionError("the supervisor has hung up")
        arrived = []
        for frame in self._decoder.feed(received):
            number, message = messages.number_of(frame), messages.decode(frame)
            arrived.append(message)
            if isinstance(message, messages.Doorbell):
                self.sequence = message.sequence
            else:
                self._answers[number] = message
        return arrived

    def wait_hung_up(self) -> None:
        try:
            while True:
                self.receive()
        except ConnectionError:
            return

    def close(self) -> None:
        self._socket.close()


def hello_fields(state_dir: Path, *, exclusive: bool = False, **settings: Any) -> dict[str, Any]:
    return {
        "protocol": messages.PROTOCOL_VERSION,
        "version": "test",
        "key": key_of(state_dir),
        "settings": DEFAULTS._replace(**settings),
        "exclusive": exclusive,
    }


def with_spec(header: dict[str, Any], stdin: bytes = b"") -> tuple[dict[str, Any], bytes]:
    """The header and the body of a start, of which nothing need be right."""
    if "spec" not in header:
        return header, stdin
    text = json.dumps(header["spec"]).encode()
    return {"owner": "", "is_new": False, **header, "spec": len(text), "stdin": len(stdin), "secrets": 0}, text + stdin


def start_fields(
    job_id: str, argv: list[str], *, stdin: bytes = b"", fingerprint: str = "", **spec: Any
) -> dict[str, Any]:
    """The fields of a start request."""
    whole = {"command": argv[0], "args": argv[1:], "cwd": "/", "stdin_size_bytes": len(stdin), **spec}
    return {"job_id": job_id, "fingerprint": fingerprint, "spec": whole}


class SupervisorProcess(StateDir):
    """`python -m worker_svc.supervisor`, started as the worker starts it: `with SupervisorProcess(path) as s`."""

    def __init__(self, path: Path, **settings: Any) -> None:
        super().__init__(path)
        self.settings = settings
        self.process: subprocess.Popen[bytes] | None = None
        self._client: SocketClient | None = None
        self.run_as: list[str] = []
        """A command to run it with, such as setpriv."""
        self.options: tuple[str, ...] = ()
        """More options of its own."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.hang_up()
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE_S)
        self.clean_up()

    def spawn(self) -> tuple[subprocess.Popen[bytes], str]:
        """Runs one more on the directory; returns it, and what it said when it was ready, or not."""
        self.path.mkdir(mode=0o700, exist_ok=True)
        reader, writer = os.pipe()
        command = [*self.run_as, sys.executable, "-S", "-s", "-P", "-m", "worker_svc.supervisor"]
        process = subprocess.Popen(
            [*command, "--state-dir", str(self.path), "--ready-fd", str(writer), *self.options],
            env={"PYTHONPATH": str(ROOT), "LANG": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(writer,),
            start_new_session=True,
        )
        os.close(writer)
        with open(reader) as lines:
            return process, lines.read().strip()

    def start(self) -> None:
        self.process, said = self.spawn()
        assert said == f"ready {self.process.pid}", f"{said!r}: {self.log()}"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def client(self) -> SocketClient:
        """Connected and greeted, once it is asked for."""
        if self._client is None:
            self._client = SocketClient(self.path)
            self._client.hello(**self.settings)
        return self._client

    def connect(self) -> SocketClient:
        """One more, greeted."""
        client = SocketClient(self.path)
        client.hello(**self.settings)
        return client

    def hang_up(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def run(
        self, job_id: str, argv: list[str], *, stdin: bytes = b"", fingerprint: str = "", **spec: Any
    ) -> dict[str, Any]:
        """Starts a job and returns the answer. Raises Refused."""
        return self.client.ask(
            "start", stdin, **start_fields(job_id, argv, stdin=stdin, fingerprint=fingerprint, **spec)
        )

    def finish(self, job_id: str, argv: list[str], *, stdin: bytes = b"", **spec: Any) -> JobRecord:
        """Runs a job to its end."""
        self.run(job_id, argv, stdin=stdin, **spec)
        return self.wait_finished(job_id)

    def wait_exit(self) -> int:
        assert self.process is not None
        return self.process.wait(PATIENCE_S)

    def kill(self) -> None:
        assert self.process is not None
        self.hang_up()
        self.process.kill()
        self.process.wait(PATIENCE_S)

    def paused(self) -> _Paused:
        """Stopped meanwhile, so that all that happens is found in one turn of its loop."""
        return _Paused(self.pid)

    def log(self) -> str:
        try:
            return (self.path / paths.SUPERVISOR_LOG_NAME).read_text()
        except FileNotFoundError:
            return ""


class _Paused:
    def __init__(self, pid: int) -> None:
        self._pid = pid

    def __enter__(self) -> None:
        os.kill(self._pid, signal.SIGSTOP)

        def stopped() -> bool:
            # All threads of it: a spawner thread could else still be at work.
            tasks = Path(f"/proc/{self._pid}/task").iterdir()
            return all((task / "stat").read_bytes().rpartition(b")")[2].split()[0] == b"T" for task in tasks)

        eventually_sync(stopped, PATIENCE_S, "the supervisor does not stop")

    def __exit__(self, *_: object) -> None:
        os.kill(self._pid, signal.SIGCONT)


async def until(call: Callable[[], Awaitable[object]]) -> None:
    """Makes the call again and again until what it returns is true."""
    async with asyncio.timeout(PATIENCE_S):
        while not await call():  # noqa: ASYNC110 - the worker is another process
            await asyncio.sleep(0.01)


def environment_of(pid: int) -> Mapping[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in entries if entry)
