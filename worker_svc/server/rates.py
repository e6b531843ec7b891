"""How much a client may take: requests a second, and memory for what is still arriving."""

from __future__ import annotations

from worker_svc.token_bucket import TokenBucket


class RequestRates:
    """A bucket for each identity, kept for as long as it is not full."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._buckets: dict[str, TokenBucket] = {}

    def take(self, identity: str, now_s: float) -> bool:
        if not self._rate:
            return True
        bucket = self._buckets.get(identity)
        if bucket is None:
            bucket = self._buckets[identity] = TokenBucket(self._rate, self._burst, now_s)
        return bucket.take(now_s)

    def forget_quiet(self, now_s: float) -> None:
        for identity in [name for name, bucket in self._buckets.items() if bucket.is_full(now_s)]:
            del self._buckets[identity]

    def __len__(self) -> int:
        return len(self._buckets)


class ReceiveBudget:
    """Memory for messages that have been announced and are not whole yet, of all connections together."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self.claimed_bytes = 0

    def share(self) -> ConnectionBudget:
        return ConnectionBudget(self, self._limit // 4)

    def claim(self, size: int) -> bool:
        if self.claimed_bytes + size > self._limit:
            return False
        self.claimed_bytes += size
        return True

    def release(self, size: int) -> None:
        self.claimed_bytes -= size


class ConnectionBudget:
    """What of it one connection may claim."""

    __slots__ = ("_claimed", "_limit", "_whole")

    def __init__(self, whole: ReceiveBudget, limit_bytes: int) -> None:
        self._whole = whole
        self._limit = limit_bytes
        self._claimed = 0

    def claim(self, size: int) -> bool:
        # A lone message always fits: how large one may be is another limit's business.
        if self._claimed and self._claimed + size > self._limit:
            return False
        if not self._whole.claim(size):
            return False
        self._claimed += size
        return True

    def release(self, size: int) -> None:
        self._claimed -= size
        self._whole.release(size)
