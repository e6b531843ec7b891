"""How much of something there may be in a time: requests, lines, bytes, seconds of the loop."""

from __future__ import annotations


class TokenBucket:
    """Fills at a rate, up to a burst; what is taken must be there."""

    __slots__ = ("_at_s", "_burst", "_rate", "_tokens")

    def __init__(self, rate: float, burst: float, now_s: float) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = burst
        self._at_s = now_s

    def take(self, now_s: float, amount: float = 1.0) -> bool:
        self._fill(now_s)
        if self._tokens < amount:
            return False
        self._tokens -= amount
        return True

    def has(self, now_s: float) -> bool:
        """Whether anything is left."""
        self._fill(now_s)
        return self._tokens > 0

    def owe(self, amount: float) -> None:
        """Takes what may not be there, down to as much below nothing as there may be above."""
        self._tokens = max(-self._burst, self._tokens - amount)

    def give(self, amount: float, most: float) -> None:
        """On top of what time brings, and beyond the burst."""
        self._tokens = max(self._tokens, min(most, self._tokens + amount))

    def is_full(self, now_s: float) -> bool:
        self._fill(now_s)
        return self._tokens >= self._burst

    def _fill(self, now_s: float) -> None:
        if self._tokens < self._burst:
            self._tokens = min(self._burst, self._tokens + (now_s - self._at_s) * self._rate)
        self._at_s = now_s
