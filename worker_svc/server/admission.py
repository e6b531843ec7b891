"""Connections at once: in all, and from one peer. Who has not said anything yet makes way for whoever comes.

To connect and be silent costs nothing and takes no certificate. So half of the places are for those who have shown one
or, where none is asked for, have begun to speak; and of the others, when there are no more, the peer with most of them
loses its oldest to one that has fewer. Who connects in earnest is done long before its turn comes.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final

log = logging.getLogger(__name__)

_TELL_S: Final = 10.0
_TIME_TO_SPEAK_S: Final = 1.0


class Place:
    """The place that one connection takes among those that there may be."""

    __slots__ = ("_admission", "_is_left", "drop", "peer", "since_s")

    def __init__(self, admission: Admission, peer: str) -> None:
        self._admission = admission
        self.peer = peer
        self.since_s = time.monotonic()
        self.drop: Callable[[], object] | None = None
        """Ends the connection, in the state in which it is; None: it still waits for its turn to be anything."""
        self._is_left = False

    def keep(self) -> None:
        """It is somebody who means it."""
        self._admission.take_from_new(self)

    def leave(self) -> None:
        if not self._is_left:
            self._is_left = True
            self._admission.leave(self)


class Admission:
    def __init__(self, limit: Callable[[], int], limit_per_peer: int) -> None:
        self._limit = limit
        self._limit_per_peer = limit_per_peer
        self._count = 0
        self._new_count = 0
        self._of_peer: dict[str, int] = {}
        self._new: dict[str, dict[Place, None]] = {}
        """The oldest first."""
        self._refused = 0
        self._dropped: Counter[str] = Counter()
        self._telling: asyncio.TimerHandle | None = None

    def enter(self, peer: str) -> Place | None:
        """None: there is none, and nobody who would have to make way."""
        if not self._has_room(peer):
            self._refused += 1
            self._tell_soon()
            return None
        place = Place(self, peer)
        self._count += 1
        self._new_count += 1
        self._of_peer[peer] = self._of_peer.get(peer, 0) + 1
        self._new.setdefault(peer, {})[place] = None
        return place

    def take_from_new(self, place: Place) -> None:
        new = self._new.get(place.peer, {})
        if place in new:
            self._new_count -= 1
            del new[place]
            if not new:
                del self._new[place.peer]

    def leave(self, place: Place) -> None:
        self.take_from_new(place)
        self._count -= 1
        self._of_peer[place.peer] -= 1
        if not self._of_peer[place.peer]:
            del self._of_peer[place.peer]

    def _has_room(self, peer: str) -> bool:
        is_full = self._of_peer.get(peer, 0) >= self._limit_per_peer
        # To set up one in place of another is dear: of the peer's own, one makes way if it had time enough to speak.
        if is_full and not self._drop_one([peer], time.monotonic() - _TIME_TO_SPEAK_S):
            return False
        limit = self._limit()
        if self._count < limit and self._new_count < (limit + 1) // 2:
            return True
        own = len(self._new.get(peer, ()))
        heavier = [name for name, places in self._new.items() if len(places) > own]
        return self._drop_one(sorted(heavier, key=lambda name: len(self._new[name]), reverse=True))

    def _drop_one(self, peers: Iterable[str], before_s: float = math.inf) -> bool:
        for peer in peers:
            for place in self._new.get(peer, ()):
                if place.drop is not None and place.since_s < before_s:
                    place.leave()
                    place.drop()
                    self._dropped[peer] += 1
                    self._tell_soon()
                    return True
        return False

    def _tell_soon(self) -> None:
        """The first at once; then how many there were, once in a while."""
        if self._telling is None:
            self._tell()
            self._telling = asyncio.get_running_loop().call_later(_TELL_S, self._tell_rest)

    def _tell_rest(self) -> None:
        self._telling = None
        if self._refused or self._dropped:
            self._tell_soon()

    def _tell(self) -> None:
        text = f"{self._refused} refused, {self._dropped.total()} closed that had not said who they are"
        if self._dropped:
            text += ", most of {} ({})".format(*self._dropped.most_common(1)[0])
        log.warning("too many connections (transport.max_connections, max_connections_per_peer): %s", text)
        self._refused = 0
        self._dropped.clear()
