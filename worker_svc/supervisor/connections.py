"""The unix socket: workers that are connected, what they ask, what they are yet to be sent."""

from __future__ import annotations

import _operator
import os
import select
import socket
from contextlib import suppress
from typing import Final

from worker_svc.ipc import frames
from worker_svc.ipc.meeting import KEY_BYTES, read_key
from worker_svc.ipc.messages import Doorbell, Message, encode
from worker_svc.linux.kinship import Kinship, peer_credentials
from worker_svc.record import paths
from worker_svc.supervisor.journal import note

_RECEIVE_BYTES: Final = 256 * 1024
# A worker that does not read its answers is not read from either, beyond this much.
_UNSENT_MAX_BYTES: Final = 1024 * 1024
_BACKLOG: Final = 64


def listen(state_dir: str) -> socket.socket:
    """The listening socket in the state directory, in place of a stale one (the caller holds the lock)."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    folder = os.open(state_dir, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # By way of /proc, for a path of any length: a socket's own is limited to 107 bytes (unix(7)).
        path = f"/proc/self/fd/{folder}/{paths.SOCKET_NAME}"
        if os.path.lexists(path):
            os.unlink(path)
        mask = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(mask)
    finally:
        os.close(folder)
    listener.listen(_BACKLOG)
    return listener


def refusal(connected: socket.socket, kinship: Kinship) -> str:
    """Why the peer is not let in, empty: it is. The directory's mode is not the only guard: it has to be root or who we
    are (SO_PEERCRED, unix(7)), and no job, which may be either. Raises OSError if that cannot be told now."""
    if peer_credentials(connected)[1] not in (0, os.geteuid()):
        return "the peer is another user"
    return "the peer is a job, or was started by one" if kinship.is_job(connected) else ""


class Key:
    """The secret that a worker has to show, in a file of the state directory."""

    def __init__(self, state_dir: str) -> None:
        self._state_dir = state_dir
        self._path = f"{state_dir}/{paths.KEY_NAME}"
        kept = read_key(state_dir)  # by a supervisor that was killed: what is there needs no space
        self._key = kept if len(kept) == 2 * KEY_BYTES and kept.isascii() else os.urandom(KEY_BYTES).hex()
        self._is_kept = False
        self.keep()

    def keep(self) -> None:
        """Writes the file if it is not as it should be: it was removed, say."""
        self._is_kept = read_key(self._state_dir) == self._key
        if self._is_kept:
            return
        made = f"{self._path}.new"
        try:
            fd = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                os.write(fd, self._key.encode())
            finally:
                os.close(fd)
            os.replace(made, self._path)
        except OSError as error:
            note("key.not_kept", reason=str(error))
        self._is_kept = read_key(self._state_dir) == self._key

    def remove(self) -> None:
        for path in (self._path, f"{self._path}.new"):
            with suppress(FileNotFoundError):
                os.unlink(path)

    def is_right(self, shown: object) -> bool:
        """In the same time whatever was shown. On a full disk, where nobody can know it, whoever is no job is let in:
        running jobs can still be stopped."""
        if not self._is_kept:
            self.keep()
        is_same = isinstance(shown, str) and shown.isascii() and _operator._compare_digest(shown, self._key)
        return is_same or not self._is_kept


class Connection:
    """One worker. Its events in epoll follow what is to be done: no reading while too much is unsent."""

    def __init__(self, connected: socket.socket, epoll: select.epoll) -> None:
        connected.setblocking(False)
        self._socket = connected
        self._epoll = epoll
        self._decoder = frames.Decoder()
        self._unsent = bytearray()
        self._events = select.EPOLLIN
        self._bell = 0
        self.greeted = False
        self.closed = False
        self.fd = connected.fileno()
        self.pid = peer_credentials(connected)[0]
        epoll.register(self.fd, self._events)

    def receive(self) -> list[frames.Frame]:
        """The frames that have come. Closes itself when the peer is gone or talks nonsense."""
        try:
            received = self._socket.recv(_RECEIVE_BYTES)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError:
            received = b""
        if not received:
            self.close()
            return []
        try:
            return self._decoder.feed(received)
        except MemoryError:  # part of a frame may be lost: the worker connects again, and asks again
            self.close()
            raise
        except frames.FrameError as error:
            note("connection.refused", reason=str(error))
            self.close()
            return []

    def is_hung_up(self) -> bool:
        """Also before `receive` finds out."""
        if self.closed:
            return True
        poll = select.poll()
        poll.register(self.fd, select.POLLRDHUP)
        return bool(poll.poll(0))

    def send(self, number: int, message: Message) -> None:
        """Queues it as the answer to the request of that number; `flush` sends it."""
        if self.closed:
            return
        try:
            self._unsent += encode(number, message)
        except frames.FrameError as error:  # it quotes what the worker sent
            note("connection.refused", reason=str(error))
            self.close()

    def ring(self, sequence: int) -> None:
        """Queues a doorbell; those not yet sent are one."""
        self._bell = sequence

    def flush(self) -> None:
        if self.closed:
            return
        if self._bell and self.greeted and len(self._unsent) < _UNSENT_MAX_BYTES:
            self.send(0, Doorbell(self._bell))
            self._bell = 0
        try:
            while self._unsent:
                sent = self._socket.send(self._unsent)
                del self._unsent[:sent]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:  # gone: whatever it missed is in the store
            self.close()
            return
        wanted = select.EPOLLIN if len(self._unsent) < _UNSENT_MAX_BYTES else 0
        if self._unsent:
            wanted |= select.EPOLLOUT
        if wanted != self._events:
            self._events = wanted
            self._epoll.modify(self.fd, wanted)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._epoll.unregister(self.fd)
            self._socket.close()
            self._unsent.clear()
