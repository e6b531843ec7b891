"""Secret variables of a job: delivered to it, on no disk and in no text. On the way they are bytes beside the request,
as environ(7) has them, so that nothing that shows a request shows them."""

from __future__ import annotations

from collections.abc import Mapping


class SecretEnv(dict[str, str]):
    """Names and values; the values show in no repr."""

    def __repr__(self) -> str:
        return f"SecretEnv({sorted(self)})"

    def pack(self) -> bytes:
        return b"".join(f"{name}={value}\0".encode() for name, value in sorted(self.items()))

    @classmethod
    def unpack(cls, block: bytes) -> SecretEnv:
        pairs = block.decode().split("\0")[:-1]
        return cls((name, value) for name, _, value in (pair.partition("=") for pair in pairs))


NO_SECRETS: Mapping[str, str] = SecretEnv()
