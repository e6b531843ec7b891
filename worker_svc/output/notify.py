"""File-change notification: one inotify descriptor for all followers; a coarse timer where it refuses."""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
from collections.abc import Callable, Iterable
from typing import Final

from worker_svc.linux.syscalls import (
    IN_CREATE,
    IN_IGNORED,
    IN_MODIFY,
    IN_MOVED_TO,
    IN_Q_OVERFLOW,
    inotify_add_watch,
    inotify_init,
    inotify_rm_watch,
)

# A job that writes a byte at a time makes a million events a second; followers wake at most once in this
# time.
BATCH_S: Final = 0.005
# How late a follower may notice a change when inotify has no watch left for it.
FALLBACK_S: Final = 0.25

_EVENT: Final = struct.Struct("iIII")  # struct inotify_event: wd, mask, cookie, len; then len bytes of name
_READ_BYTES: Final = 64 * 1024


class Subscription:
    """A follower's place at a watch; `close` gives it back, and the watch with it if it was the last."""

    __slots__ = ("_notifier", "_wake", "_watch")

    def __init__(self, notifier: Notifier, watch: int, wake: asyncio.Event) -> None:
        self._notifier = notifier
        self._watch = watch
        self._wake = wake

    def close(self) -> None:
        self._notifier._leave(self._watch, self._wake)


class Notifier:
    """Sets a follower's `asyncio.Event` when the file it follows changes, or when the file it waits for
    appears.

    Belongs to the event loop that first subscribes. Never polls, except for followers that got no watch
    (inotify_add_watch(2): ENOSPC, the limit of watches; inotify_init(2): EMFILE, the limit of instances):
    these wake every FALLBACK_S, and `on_degraded` is told once why.
    """

    def __init__(self, on_degraded: Callable[[str], None] | None = None) -> None:
        self.degraded: str | None = None
        # Counts rounds of events passed on, and watches that were set: what is written to a watched file after someone
        # looked at it in one round wakes its followers in a later one.
        self.rounds = 0
        self._closed = False
        self._on_degraded = on_degraded
        self._fd: int | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        # By watch descriptor: who follows, and the name it waits for if what is watched is a directory.
        self._watches: dict[int, dict[asyncio.Event, bytes | None]] = {}
        self._unwatched: set[asyncio.Event] = set()
        self._pause: asyncio.TimerHandle | None = None
        self._fallback: asyncio.TimerHandle | None = None

    def watch_file(self, fd: int, wake: asyncio.Event) -> Subscription:
        """Wakes on every change of the open file `fd`, whatever has become of its path since."""
        return self._join(b"/proc/self/fd/%d" % fd, IN_MODIFY, wake, None)

    def watch_name(self, directory: bytes, name: bytes, wake: asyncio.Event) -> Subscription:
        """Wakes when `name` appears in `directory`."""
        return self._join(directory, IN_CREATE | IN_MOVED_TO, wake, name)

    def close(self) -> None:
        """Gives everything back and wakes all followers, those too that come later."""
        self._closed = True
        for timer in (self._pause, self._fallback):
            if timer is not None:
                timer.cancel()
        self._pause = self._fallback = None
        if self._fd is not None:
            if self._loop is not None and not self._loop.is_closed():
                self._loop.remove_reader(self._fd)
            os.close(self._fd)  # its watches go with it
            self._fd = None
        followers = [wake for watch in self._watches.values() for wake in watch]
        followers.extend(self._unwatched)
        self._watches.clear()
        self._unwatched.clear()
        for wake in followers:
            wake.set()

    def _join(self, path: bytes, mask: int, wake: asyncio.Event, name: bytes | None) -> Subscription:
        if self._closed:
            wake.set()
            return Subscription(self, -1, wake)
        try:
            # The kernel gives the same descriptor for the same inode: that is how followers come to share a
            # watch.
            watch = inotify_add_watch(self._open(), path, mask)
        except OSError as error:
            self._degrade(f"inotify: {error.strerror}: output is looked at every {FALLBACK_S:g} s", [wake])
            return Subscription(self, -1, wake)
        if watch not in self._watches:
            self._watches[watch] = {}
            self.rounds += 1
        self._watches[watch][wake] = name
        return Subscription(self, watch, wake)

    def _leave(self, watch: int, wake: asyncio.Event) -> None:
        self._unwatched.discard(wake)
        if not self._unwatched and self._fallback is not None:
            self._fallback.cancel()
            self._fallback = None
        followers = self._watches.get(watch)
        if followers is None:
            return
        followers.pop(wake, None)
        if not followers:
            del self._watches[watch]
            if self._fd is not None:
                # EINVAL: the kernel took it away, IN_IGNORED is still in the queue.
                with contextlib.suppress(OSError):
                    inotify_rm_watch(self._fd, watch)

    def _open(self) -> int:
        if self._fd is None:
            self._fd = inotify_init()
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._fd, self._readable)
        return self._fd

    def _readable(self) -> None:
        assert self._fd is not None
        assert self._loop is not None
        try:
            events = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return
        # The first event of a burst is passed on at once; the others wait in the kernel, which merges them.
        self._loop.remove_reader(self._fd)
        self._pause = self._loop.call_later(BATCH_S, self._resume)
        self.rounds += 1
        for wake in self._woken_by(events):
            wake.set()

    def _resume(self) -> None:
        assert self._fd is not None
        assert self._loop is not None
        self._pause = None
        self._loop.add_reader(self._fd, self._readable)

    def _woken_by(self, events: bytes) -> Iterable[asyncio.Event]:
        words = memoryview(events).cast("i")
        woken: dict[asyncio.Event, None] = {}
        # The usual case, and that of floods, without a loop over events: only changes, no names.
        if not any(words[3::4]) and set(words[1::4]) == {IN_MODIFY}:
            for watch in set(words[::4]):
                woken.update(dict.fromkeys(self._watches.get(watch, ())))
            return woken
        position = 0
        while position < len(events):
            watch, mask, _, name_bytes = _EVENT.unpack_from(events, position)
            position += _EVENT.size
            name = events[position : position + name_bytes].rstrip(b"\0")
            position += name_bytes
            woken.update(dict.fromkeys(self._woken_by_one(watch, mask, name)))
        return woken

    def _woken_by_one(self, watch: int, mask: int, name: bytes) -> list[asyncio.Event]:
        if mask & IN_Q_OVERFLOW:
            return [wake for followers in self._watches.values() for wake in followers]
        if mask & IN_IGNORED:  # the kernel took the watch away: directory removed, file system unmounted
            left = self._watches.pop(watch, {})
            if left:
                self._degrade("inotify: a watch was taken away", left)
            return list(left)
        followers = self._watches.get(watch, {})
        return [wake for wake, wanted in followers.items() if wanted is None or wanted == name]

    def _degrade(self, why: str, followers: Iterable[asyncio.Event]) -> None:
        self._unwatched.update(followers)
        if self._fallback is None:
            self._fallback = asyncio.get_running_loop().call_later(FALLBACK_S, self._look)
        if self.degraded is None:
            self.degraded = why
            if self._on_degraded is not None:
                self._on_degraded(why)

    def _look(self) -> None:
        self._fallback = asyncio.get_running_loop().call_later(FALLBACK_S, self._look)
        for wake in self._unwatched:
            wake.set()
