"""What the commands write: whole or not without a word, and nothing that a terminal would act on."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from typing import IO, TYPE_CHECKING

from worker_svc.linux import stdio
from worker_svc.printable import printable

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class CannotWrite(OSError):
    """Standard output, or error where a job's is written to it, takes no more: its disk is full, or it is closed. (That
    nobody reads it is a BrokenPipeError.)"""


def say(text: str) -> None:
    """A line on standard output."""
    print(printable(text))


def warn(text: str) -> None:
    """A line on standard error."""
    print(printable(text), file=sys.stderr, flush=True)


def complain(command: str, text: str, hint: str = "") -> None:
    """`hint`: more lines, all of them ours."""
    print(f"worker-svc: {command}: {printable(text)}", *filter(None, [hint]), sep="\n", file=sys.stderr, flush=True)


class _Whole(io.RawIOBase):
    """A descriptor that takes all of what it is given: a short write is no whole one, and one that would have to wait
    waits, also if somebody who shares the descriptor made it non-blocking."""

    def __init__(self, fd: int, *, was_closed: bool) -> None:
        """`was_closed`: what is there is only in its place, and nobody gets what is written to it."""
        self._fd = fd
        self._takes_nothing = was_closed
        self.lost: OSError | None = None
        """Why not all that was written to standard error is there: there is nowhere left to say so."""

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def writable(self) -> bool:
        return True

    def write(self, data: ReadableBuffer) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest:
            try:
                if self._takes_nothing:
                    raise OSError(errno.EBADF, "it is closed")
                rest = rest[os.write(self._fd, rest) :]
            except BlockingIOError:
                select.select([], [self._fd], [])
            except BrokenPipeError:
                raise
            except OSError as error:
                cannot = CannotWrite(error.errno, error.strerror)
                if self._fd == 2:
                    self.lost = cannot
                    break
                raise cannot from error
        return size

    def give_up(self) -> None:
        """What is written from now on is thrown away."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._fd)
        os.close(null)
        self._takes_nothing = False


def own_streams() -> None:
    """Takes over the process's standard streams, whatever state they are in."""
    closed = stdio.ensure_descriptors()
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False))
    for fd, name in ((1, "stdout"), (2, "stderr")):
        was = getattr(sys, name)
        encoding = "utf-8" if was is None else was.encoding
        # A terminal that is not UTF-8 is no reason to die half-way.
        buffered = io.BufferedWriter(_Whole(fd, was_closed=fd in closed))
        stream = io.TextIOWrapper(buffered, encoding, "backslashreplace", line_buffering=fd == 2 or buffered.isatty())
        setattr(sys, name, stream)


def what_was_lost(stream: IO[bytes]) -> OSError | None:
    """Why what was written to standard error is not there."""
    raw = getattr(stream, "raw", None)
    return raw.lost if isinstance(raw, _Whole) else None


def give_up_output() -> None:
    """The interpreter flushes standard output once more at exit, and would complain then."""
    raw = getattr(sys.stdout.buffer, "raw", None)
    if isinstance(raw, _Whole):
        raw.give_up()
