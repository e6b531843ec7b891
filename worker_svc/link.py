"""The worker's end of the unix socket: finds the supervisor or starts one, asks it, and comes back when it is lost."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar

from worker_svc.ipc import frames
from worker_svc.ipc.meeting import open_log, read_key
from worker_svc.ipc.messages import (
    EXIT_LOCKED,
    PROTOCOL_VERSION,
    Delete,
    Doorbell,
    Hello,
    Leaving,
    Message,
    OtherProtocol,
    Refused,
    Request,
    SendSignal,
    Settings,
    Shutdown,
    Start,
    Welcome,
    decode,
    encode,
    number_of,
)
from worker_svc.job import ERRORS, InvalidArgument, JobError, Unavailable
from worker_svc.linux import failpoints
from worker_svc.linux.kinship import peer_credentials
from worker_svc.record import paths

# How long a request waits for a supervisor to be there, and a new supervisor may take to be ready.
PATIENCE_S: Final = 10.0
_START_TIMEOUT_S: Final = 30.0
_RETRY_S: Final = 0.05
_RETRY_MAX_S: Final = 2.0
_SHUTTING_DOWN: Final = "it was told to (ShutdownWorker), and takes no new job until its last has ended"
# Before the worker changed it for itself: jobs are to have this.
_CORE_LIMIT: Final = resource.getrlimit(resource.RLIMIT_CORE)
# A request that the link breaks under so often may be what breaks it.
_TRIES_MAX: Final = 3
# What may not be carried out twice.
_NOT_REPEATED: Final = (SendSignal, Delete)
_Answer = TypeVar("_Answer")


class SupervisorError(Exception):
    """There is no supervisor to be had; the text says why and what to do."""


class SupervisorMismatch(SupervisorError):
    """The supervisor is of another version, or another worker's: to try again is pointless."""


class NoAnswer(Unavailable):
    """The supervisor is there and does not answer; the request may or may not be carried out."""


class _LinkLost(Exception):
    """The connection broke with the request under way: it may or may not have been carried out."""


class _Protocol(asyncio.Protocol):
    """One connection. Requests of one turn of the event loop leave in one write."""

    def __init__(self, on_sequence: Callable[[int], None], on_lost: Callable[[_Protocol], None]) -> None:
        self._on_sequence = on_sequence
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._decoder = frames.Decoder()
        self._answers: dict[int, asyncio.Future[Message]] = {}
        self._number = 0
        self._unsent: list[bytes] = []
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, received: bytes) -> None:
        try:
            arrived = self._decoder.feed(received)
        except frames.FrameError:
            self.close()
            return
        if failpoints.is_armed:
            failpoints.reach("answer-received")
        for frame in arrived:
            waits = self._answers.pop(number_of(frame), None)
            try:
                message = decode(frame)
            except (InvalidArgument, OtherProtocol) as error:
                message = Refused(
                    "malformed", f"what the supervisor says is malformed: {error}: is it of this version?"
                )
            if isinstance(message, Doorbell):
                self._on_sequence(message.sequence)
            elif waits is not None and not waits.done():
                waits.set_result(message)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(_LinkLost())
        self._answers.clear()
        self._on_lost(self)

    @property
    def is_lost(self) -> bool:
        return self._transport is None

    def ask(self, request: Request) -> asyncio.Future[Message]:
        """Raises FrameError."""
        answer: asyncio.Future[Message] = self._loop.create_future()
        if self._transport is None:
            answer.set_exception(_LinkLost())
            return answer
        self._number += 1
        frame = encode(self._number, request)
        self._answers[self._number] = answer
        if not self._unsent:
            self._loop.call_soon(self._flush)
        self._unsent.append(frame)
        return answer

    def _flush(self) -> None:
        unsent, self._unsent = self._unsent, []
        if self._transport is not None:
            self._transport.write(b"".join(unsent))
            if failpoints.is_armed:
                failpoints.reach("request-sent")

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


def _expected(answer: Message, kind: type[_Answer]) -> _Answer:
    """Raises the JobError that it is, or SupervisorMismatch."""
    if isinstance(answer, kind):
        return answer
    if not isinstance(answer, Refused):
        raise SupervisorMismatch(f"the supervisor answers with {type(answer).__name__}: is it of this version?")
    refusal = ERRORS.get(answer.error)
    if refusal is None:
        raise SupervisorMismatch(answer.text)
    error = refusal.__new__(refusal)
    JobError.__init__(error, answer.text)
    raise error


class SupervisorLink:
    """`run` keeps it connected; `ask` waits for that, and asks again what it may ask twice."""

    def __init__(
        self,
        state_dir: Path,
        settings: Settings,
        version: str,
        *,
        supervisor_options: Sequence[str] = (),
        on_sequence: Callable[[int], None],
        on_event: Callable[..., None],
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_sequence` gets each doorbell, `on_event` an event's name and its fields, for the log. `meanwhile` is
        called while a supervisor starts."""
        self._state_dir = state_dir
        self._hello = Hello(PROTOCOL_VERSION, version, "", settings, exclusive=True)
        self._supervisor_options = supervisor_options
        self._on_sequence = on_sequence
        self._on_event = on_event
        self._meanwhile = meanwhile
        self._protocol: _Protocol | None = None
        self._connected = asyncio.Event()
        self._lost = asyncio.Event()
        self._is_leaving = False
        self._is_silent = False
        self._failure = ""
        """Why there is no supervisor, as far as is known."""
        self._child: subprocess.Popen[bytes] | None = None
        self.info = Welcome(PROTOCOL_VERSION, 0, 0, "", "", 0, is_shutting_down=False)
        """What the supervisor said of itself when it was connected last."""

    async def connect(self) -> None:
        """Connects, starting a supervisor if there is none. Raises SupervisorError."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + PATIENCE_S
        while True:
            failure = await self._try_connect()
            if not failure:
                return
            self._failure = failure
            if loop.time() > deadline:
                raise SupervisorError(failure)
            # Another one holds the directory's lock and is not listening yet, or is just leaving.
            await asyncio.sleep(_RETRY_S)

    async def _try_connect(self) -> str:
        """Returns why it did not work, if trying again may help."""
        connected = await self._open_socket()
        if connected is None:
            failure = await self._start_supervisor()
            if failure and failure != self._failure:
                self._on_event("supervisor.not_found", reason=failure)
            connected = await self._open_socket()
            if connected is None:
                return failure or f"the supervisor in {self._state_dir} does not listen"
        loop = asyncio.get_running_loop()
        self._lost.clear()
        _, protocol = await loop.create_unix_connection(
            lambda: _Protocol(self._on_sequence, self._on_link_lost), sock=connected
        )
        try:
            async with asyncio.timeout(PATIENCE_S):
                hello = self._hello._replace(key=read_key(str(self._state_dir)))
                self.info = _expected(await protocol.ask(hello), Welcome)
        except JobError as error:
            protocol.close()
            return error.message
        except _LinkLost:
            protocol.close()
            return f"the supervisor in {self._state_dir} has closed the connection: see supervisor.log there"
        except TimeoutError:
            protocol.close()
            raise SupervisorError(_silence(peer_credentials(connected)[0])) from None
        except SupervisorMismatch:
            protocol.close()
            raise
        except frames.FrameError as error:
            protocol.close()
            raise SupervisorMismatch(f"jobs.env and jobs.pass_env: too much for the supervisor: {error}") from None
        if protocol.is_lost:
            return f"the supervisor in {self._state_dir} has gone again"
        self._protocol = protocol
        self._connected.set()
        self._failure, self._is_silent = "", False
        self._on_event("supervisor.connected", pid=self.info.pid, sequence=self.info.sequence)
        if self.info.is_shutting_down:
            self._on_event("supervisor.shutting_down", pid=self.info.pid, reason=_SHUTTING_DOWN)
        self._on_sequence(self.info.sequence)
        return ""

    async def run(self) -> None:
        """Connects again whenever the link is lost; returns when the supervisor left because it was asked to.

        Raises SupervisorMismatch.
        """
        retry_s = _RETRY_S
        while True:
            await self._lost.wait()
            if self._is_leaving:
                self._on_event("supervisor.left", pid=self.info.pid)
                return
            self._on_event("supervisor.lost", pid=self.info.pid)
            while not self._connected.is_set():
                try:
                    await self.connect()
                    retry_s = _RETRY_S
                except SupervisorMismatch:
                    raise
                except SupervisorError as error:
                    self._failure = str(error)
                    self._on_event("supervisor.unavailable", reason=str(error), retry_in_s=retry_s)
                    await asyncio.sleep(retry_s)
                    retry_s = min(_RETRY_MAX_S, retry_s * 2)

    async def shut_down(self, *, stop_jobs: bool) -> Leaving:
        """Asks the supervisor to leave once no job is left; `run` then returns instead of starting another."""
        answer = await self.ask(Shutdown(stop_jobs), Leaving)
        self._is_leaving = True
        return answer

    async def ask(self, request: Request, kind: type[_Answer], *, patience_s: float = PATIENCE_S) -> _Answer:
        """Asks the supervisor and returns its answer, which is to be of that kind.

        A request that can be carried out twice without harm is repeated when the link breaks, but not for ever. Raises
        the JobError of the answer, or Unavailable.
        """
        is_idempotent = not isinstance(request, _NOT_REPEATED)
        for _ in range(_TRIES_MAX if is_idempotent else 1):
            protocol = await self._wait_connected(patience_s)
            try:
                async with asyncio.timeout(patience_s):
                    return _expected(await protocol.ask(request), kind)
            except TimeoutError:
                outcome = "" if is_idempotent else "; the request may or may not be carried out"
                raise NoAnswer(self._on_silence() + outcome) from None
            except frames.FrameError as error:
                raise InvalidArgument(f"the request is too large for the supervisor: {error}") from None
            except _LinkLost:
                if isinstance(request, Start):
                    request = request._replace(is_new=False)
                self._on_link_lost(protocol)
        raise Unavailable("the supervisor was lost; the request may or may not have been carried out")

    async def _wait_connected(self, patience_s: float) -> _Protocol:
        try:
            async with asyncio.timeout(patience_s):
                await self._connected.wait()
        except TimeoutError:
            raise Unavailable(f"the worker has no supervisor just now: {self._failure or 'try again'}") from None
        assert self._protocol is not None
        return self._protocol

    def _on_silence(self) -> str:
        """What to say of it; the log is told once."""
        reason = _silence(self.info.pid)
        if not self._is_silent:
            self._on_event("supervisor.silent", pid=self.info.pid, reason=reason)
        self._is_silent = True
        return reason

    def _on_link_lost(self, protocol: _Protocol) -> None:
        if protocol is not self._protocol:
            return  # another one has taken its place, or it never came to be
        self._protocol = None
        self._connected.clear()
        self._lost.set()

    def close(self) -> None:
        """Lets go of the supervisor, which lives on."""
        if self._protocol is not None:
            self._protocol.close()
        if self._child is not None and self._child.poll() is None:
            self._child.returncode = 0  # it is meant to outlive us: no warning that it still runs

    async def _open_socket(self) -> socket.socket | None:
        """A connection to the socket in the state directory; None: nobody listens there. Raises SupervisorError."""
        try:
            folder = os.open(self._state_dir, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise SupervisorError(f"state.dir: {self._state_dir}: {error.strerror}") from error
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            # By way of /proc: the path of a socket is limited to 107 bytes (unix(7)).
            path = f"/proc/self/fd/{folder}/{paths.SOCKET_NAME}"
            await asyncio.get_running_loop().sock_connect(connected, path)
        except (FileNotFoundError, ConnectionRefusedError):
            connected.close()
            return None
        except BaseException:
            connected.close()
            raise
        finally:
            os.close(folder)
        return connected

    async def _start_supervisor(self) -> str:
        """Starts one and waits until it is ready. Returns why it is not, if another one may be there."""
        if self._child is not None:
            self._child.poll()  # the one before: nobody else would reap it
        reader, writer = os.pipe()
        try:
            self._child = _spawn_supervisor(self._state_dir, writer, self._supervisor_options)
        except OSError as error:
            os.close(reader)
            raise SupervisorError(f"the supervisor cannot be started: {error}") from error
        finally:
            os.close(writer)
        try:
            self._meanwhile()
            line = await _read_line(reader)
        finally:
            os.close(reader)
        if failpoints.is_armed:
            failpoints.reach("supervisor-started")
        if line.startswith("ready"):
            self._on_event("supervisor.started", pid=self._child.pid)
            return ""
        reason = line.removeprefix("failed: ") or "it ended before it was ready: see supervisor.log there"
        status = await self._exit_status()
        if status == EXIT_LOCKED or status < 0:  # killed: the next one may fare better
            return reason
        raise SupervisorError(f"the supervisor cannot run in {self._state_dir}: {reason}")

    async def _exit_status(self) -> int:
        assert self._child is not None
        return await asyncio.to_thread(self._child.wait, 5)


def _spawn_supervisor(state_dir: Path, ready_fd: int, options: Sequence[str]) -> subprocess.Popen[bytes]:
    # Without site: the standard library and this package are all it needs, and it stays small. Its environment is
    # its own, not the worker's, so that nothing of that can get into a job.
    command = [sys.executable, "-S", "-s", "-P", "-m", "worker_svc.supervisor"]
    environment = {"PYTHONPATH": str(Path(__file__).parent.parent), "LANG": "C.UTF-8"}
    own = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, _CORE_LIMIT)
    try:
        with open(open_log(str(state_dir)), "ab", buffering=0) as log:
            return subprocess.Popen(
                [*command, "--state-dir", str(state_dir), "--ready-fd", str(ready_fd), *options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=environment,
                pass_fds=(ready_fd,),
                start_new_session=True,
            )
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, own)


def leave_no_core() -> None:
    """No core dump of this process: secrets of jobs pass through it."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, _CORE_LIMIT[1]))


def _silence(pid: int) -> str:
    """What is said of a supervisor that does not answer."""
    why = "it is busy, or its disk is"
    try:
        if Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] in (b"T", b"t"):
            why = f"a signal made it stand still, jobs run on: `kill -CONT {pid}` lets it go on"
    except OSError:  # it has ended: the link will tell
        why = "it has ended"
    return f"the supervisor (pid {pid}) does not answer: {why}"


async def _read_line(fd: int) -> str:
    """What is written to the pipe until it is closed. Raises SupervisorError after half a minute."""
    loop = asyncio.get_running_loop()
    received = bytearray()
    readable = asyncio.Event()
    loop.add_reader(fd, readable.set)
    try:
        async with asyncio.timeout(_START_TIMEOUT_S):
            while True:
                await readable.wait()
                readable.clear()
                chunk = os.read(fd, 4096)
                if not chunk:
                    return received.decode(errors="replace").strip()
                received += chunk
    except TimeoutError:
        raise SupervisorError("the supervisor was started, but is not ready after half a minute") from None
    finally:
        loop.remove_reader(fd)
