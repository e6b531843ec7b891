"""What a caller can be told is wrong."""

from __future__ import annotations

import re
from typing import ClassVar, Final

# A status travels in a header, where a byte can become three, and many clients take no more than 8 KiB of headers.
_MESSAGE_MAX_BYTES: Final = 2048
_KEPT_AT_THE_END_BYTES: Final = 512
_SURROGATE: Final = re.compile("[\ud800-\udfff]")


def unicode_text(text: str) -> str:
    """What can be stored and sent: bytes that are no UTF-8, which Python keeps as lone surrogates (PEP 383), are shown
    as `\\xe9`."""
    return text if text.isascii() else _SURROGATE.sub(_shown, text)


def _shown(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"


def error_message(text: str) -> str:
    """As much as every client takes of a text that may quote what others wrote: the beginning, and the end, where the
    remedy is."""
    encoded = unicode_text(text).encode()
    if len(encoded) <= _MESSAGE_MAX_BYTES:
        return encoded.decode()
    tail = encoded[-_KEPT_AT_THE_END_BYTES:].decode(errors="ignore")
    left_out = f" … ({len(encoded)} bytes, shortened) … "
    head = encoded[: _MESSAGE_MAX_BYTES - len(f"{left_out}{tail}".encode())].decode(errors="ignore")
    return f"{head}{left_out}{tail}"


def fault_text(error: Exception) -> str:
    """The text of an error that is not made for people. Its repr would not do: that of a UnicodeEncodeError has the
    whole text it is about."""
    return f"{type(error).__name__}: {error}"


class JobError(Exception):
    """What a caller can be told; `code` names the class on the unix socket, the text is for the user."""

    code: ClassVar[str] = ""

    def __init__(self, message: str) -> None:
        self.message = error_message(message)
        super().__init__(self.message)


class InvalidArgument(JobError):
    """A field of the request is malformed; nothing was recorded."""

    code = "invalid"

    def __init__(self, field: str, problem: str = "") -> None:
        super().__init__(f"{field}: {problem}" if problem else field)


class PermissionDenied(JobError):
    """The caller's role or the worker's policy does not allow it; the text names the rule."""

    code = "denied"


class JobNotFound(JobError):
    """There is no job of this id, or none that the caller may see."""

    code = "not_found"

    def __init__(self, message: str = "job not found") -> None:
        super().__init__(message)


class JobExists(JobError):
    """The job id belongs to a job with another spec."""

    code = "exists"


class PreconditionFailed(JobError):
    """The machine or the job is not in a state that allows it."""

    code = "precondition"


class ResourceExhausted(JobError):
    """Too much at once: jobs in the queue, calls, bytes, or room on the disk. The text says which."""

    code = "exhausted"


class OutOfRange(JobError):
    """What was asked for begins beyond what there is: an offset, or a sequence number that was never given out."""

    code = "out_of_range"


class DeadlineExceeded(JobError):
    """It did not come about in the time that the caller gave it; the job, or the call, may go on."""

    code = "deadline"


class Unavailable(JobError):
    """Not now; the same call can succeed later."""

    code = "unavailable"


ERRORS: Final[dict[str, type[JobError]]] = {
    kind.code: kind
    for kind in (
        InvalidArgument,
        PermissionDenied,
        JobNotFound,
        JobExists,
        PreconditionFailed,
        ResourceExhausted,
        OutOfRange,
        DeadlineExceeded,
        Unavailable,
    )
}
