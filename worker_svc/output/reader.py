"""Streams of output files, for any number of readers, on one event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple, Protocol, TypeAlias, TypeVar

from worker_svc.job import InvalidArgument, OutOfRange, Unavailable
from worker_svc.linux.threads import ready_pool
from worker_svc.output.file import OutputFile, may_have_hole
from worker_svc.output.notify import Notifier, Subscription

CHUNK_BYTES: Final = 256 * 1024
# Reads that wait for the disk, at once. They all go to the disk that holds the output, so more would not
# help.
READ_THREADS: Final = 4
# Blocks kept for followers that come by the same place; 4 MiB at the default chunk size, for the whole
# worker.
SHARED_BLOCKS: Final = 16
# Chunks handed out in one turn of the event loop: with a send of up to 1 ms each, other tasks wait below 10
# ms.
CHUNKS_PER_TURN: Final = 8

_T = TypeVar("_T")
FinalSize: TypeAlias = asyncio.Future[int] | asyncio.Future[int | None]


class Chunk(NamedTuple):
    """Output from `offset` on: `data`, or if `gap_bytes` is not zero the news that so many bytes are gone."""

    offset: int
    data: bytes
    gap_bytes: int = 0


class Start(NamedTuple):
    """Where to begin: at an offset, or so many bytes or lines before the end as it is now; else at 0."""

    offset: int | None = None
    tail_bytes: int | None = None
    tail_lines: int | None = None

    def validate(self) -> None:
        """Raises InvalidArgument unless at most one is given, and not negative."""
        given = {name: value for name, value in self._asdict().items() if value is not None}
        if len(given) > 1:
            raise InvalidArgument(" and ".join(given), "give only one of offset, tail_bytes and tail_lines")
        for name, value in given.items():
            if value < 0:
                raise InvalidArgument(name, f"must not be negative, not {value}")


class _Block(NamedTuple):
    """What was found at an offset: data, none at the end of the file; or where the hole it is in ends.

    `at_end`: it reaches to the end of the file as it was in this round of notifications (`Notifier.rounds`).
    """

    data: bytes = b""
    gone_to: int = 0
    at_end: bool = False
    round: int = 0


class Room(Protocol):
    """What a consumer has room for."""

    async def take_room(self, most_bytes: int) -> int:
        """Waits for room, and returns how much there is, `most_bytes` at most. What was taken before is given back."""

    def give_room(self) -> None:
        """There is nothing to be read for now."""


class OutputReader:
    """One per worker process: owns the inotify descriptor, the reading threads and the blocks followers
    share.

    Belongs to the event loop on which its first stream runs. `on_degraded` is called at most once, with a
    text to log, when a follower has to do with a timer for want of inotify (see `Notifier`); `degraded` keeps
    that text.
    """

    def __init__(self, *, chunk_bytes: int = CHUNK_BYTES, on_degraded: Callable[[str], None] | None = None) -> None:
        self._chunk_bytes = chunk_bytes
        self._notifier = Notifier(on_degraded)
        self._threads = ready_pool(READ_THREADS, "output-read")
        self._files: dict[tuple[int, int], OutputFile] = {}
        self._shared: OrderedDict[tuple[OutputFile, int], _Block] = OrderedDict()
        self._buffer = memoryview(bytearray(chunk_bytes))
        self._turns = _Turns(CHUNKS_PER_TURN)
        self._closed = False

    @property
    def degraded(self) -> str | None:
        return self._notifier.degraded

    def close(self) -> None:
        """Ends all streams with Unavailable, at their next step, and gives back the inotify descriptor."""
        self._closed = True
        self._notifier.close()
        self._threads.shutdown(wait=False)

    async def stream(
        self, path: Path, *, start: Start, follow: bool, final_size: FinalSize, room: Room | None = None
    ) -> AsyncGenerator[Chunk, None]:
        """The output in `path`, as the package promises. `final_size` (bytes) is done once the job is
        finished; None: it is not known, since someone had removed the file.

        Nothing happens before the first chunk is asked for. Close it (`aclose`, or cancel the task that
        iterates) to give back at once what it holds. At most one chunk is held for a slow consumer; none while there is
        no `room`.

        Raises InvalidArgument (start), OutOfRange (start beyond the end as it is now), Unavailable (the file
        cannot be read, the reader is closed, or `final_size` was cancelled), and what `final_size` raises.
        """
        start.validate()
        stream = _Stream(self, path, final_size, room)
        try:
            await stream.begin(start, follow)
            while (chunk := await stream.next()) is not None:
                yield chunk
        finally:
            stream.close()

    async def _run(self, file: OutputFile, call: Callable[[], _T]) -> _T:
        """Runs `call`, which may wait for the disk, in a thread; the file stays open until that is done."""
        self._check_open()
        running = self._threads.submit(call)
        file.hold()
        running.add_done_callback(lambda _: file.release())
        try:
            return await asyncio.wrap_future(running)
        except OSError as error:
            raise _unavailable("read", file.path, error) from error

    async def _open(self, path: Path) -> OutputFile | None:
        """The file, to be given to `_leave`; None if there is none."""
        self._check_open()
        opening = self._threads.submit(OutputFile.open, path)
        try:
            file = await asyncio.wrap_future(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_release_opened)
            raise
        except OSError as error:
            raise _unavailable("open", path, error) from error
        if file is None:
            return None
        known = self._files.setdefault(file.key, file)
        known.streams += 1
        if known is not file:
            file.release()
        return known

    def _leave(self, file: OutputFile) -> None:
        file.streams -= 1
        if file.streams:
            return
        del self._files[file.key]
        for key in [key for key in self._shared if key[0] is file]:
            del self._shared[key]
        file.release()

    async def _read(self, file: OutputFile, offset: int, end: int | None) -> _Block:
        # Up to a multiple of the chunk size: so followers come to read the same blocks wherever they began.
        length = self._chunk_bytes - offset % self._chunk_bytes
        if end is not None:
            length = min(length, end - offset)
        key = (file, offset)
        if (shared := self._shared.get(key)) is not None:
            self._shared.move_to_end(key)
            return shared._replace(
                data=shared.data[:length],
                at_end=shared.at_end and len(shared.data) <= length and shared.round == self._notifier.rounds,
            )
        block = await self._read_file(file, offset, length)
        if block.data and file.streams > 1:
            self._shared[key] = block
            if len(self._shared) > SHARED_BLOCKS:
                self._shared.popitem(last=False)
        return block

    async def _read_file(self, file: OutputFile, offset: int, length: int) -> _Block:
        round_ = self._notifier.rounds
        try:
            # Before the read: a job that writes all the time would else never seem to be caught up with.
            size = file.size_bytes
            count = file.read_now(offset, self._buffer[:length])
        except OSError as error:
            raise _unavailable("read", file.path, error) from error
        if count is None:
            data = await self._run(file, lambda: file.read(offset, length))
        else:
            data = bytes(self._buffer[:count])
        if may_have_hole(data, offset):
            gone = await self._run(file, file.head_gone_bytes)
            if gone > offset:
                return _Block(gone_to=gone)
        return _Block(data, at_end=offset + len(data) >= size, round=round_)

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable("the worker is about to end: no more output is read")


class _Stream:
    """One stream: where it is, and what it holds until `close`."""

    def __init__(self, reader: OutputReader, path: Path, final_size: FinalSize, room: Room | None) -> None:
        self._room = room
        self._reader = reader
        self._path = path
        self._final_size = final_size
        self._wake = asyncio.Event()
        self._file: OutputFile | None = None
        self._subscription: Subscription | None = None
        self._offset = 0
        self._fixed_end: int | None = None
        self._at_end = False

    async def begin(self, start: Start, follow: bool) -> None:
        await self._reader._turns.take()
        live = follow and not self._final_size.done()
        self._file = await self._reader._open(self._path)
        end = self._end()
        if end is None:
            end = self._file.size_bytes if self._file else 0
        if not live:
            self._fixed_end = end
        self._offset = await self._place(start, end)
        if live:
            self._final_size.add_done_callback(self._on_final_size)
            if self._file is None:
                await self._wait_for_file()
            if self._file is not None:
                self._subscription = self._reader._notifier.watch_file(self._file.fd, self._wake)

    async def next(self) -> Chunk | None:
        """The next chunk, or None at the end."""
        most = self._reader._chunk_bytes
        while True:
            if self._at_end and self._end() is None:
                if self._room is not None:
                    self._room.give_room()
                await self._wake.wait()
            if self._room is not None and self._offset != self._end():
                most = await self._room.take_room(self._reader._chunk_bytes)
            await self._reader._turns.take()
            self._reader._check_open()
            self._wake.clear()  # before looking: what happens from here on wakes us
            end = self._end()
            if end is not None and self._offset >= end:
                return None
            until = self._offset + most if end is None else min(end, self._offset + most)
            block = await self._reader._read(self._file, self._offset, until) if self._file else _Block()
            self._at_end = block.at_end
            gone_to = block.gone_to
            if end is not None and not block.data and not gone_to:
                gone_to = end  # the file ends before its time
            now = self._end()  # the job may have ended while we waited for the disk
            if gone_to > self._offset:
                gone_to = gone_to if now is None else min(gone_to, now)
                if gone_to > self._offset:
                    return self._advance(Chunk(self._offset, b"", gone_to - self._offset))
            elif data := block.data if now is None else block.data[: max(0, now - self._offset)]:
                return self._advance(Chunk(self._offset, data))

    def close(self) -> None:
        self._final_size.remove_done_callback(self._on_final_size)
        if self._subscription is not None:
            self._subscription.close()
            self._subscription = None
        if self._file is not None:
            self._reader._leave(self._file)
            self._file = None

    def _advance(self, chunk: Chunk) -> Chunk:
        self._offset += chunk.gap_bytes or len(chunk.data)
        return chunk

    def _on_final_size(self, _: object) -> None:
        self._wake.set()

    def _end(self) -> int | None:
        """Where the stream ends, as far as that is known."""
        if self._fixed_end is not None or not self._final_size.done():
            return self._fixed_end
        if self._final_size.cancelled():
            raise Unavailable("how the job ended cannot be learnt just now")
        size = self._final_size.result()
        if size is None:  # where the file ends now, if we have it open
            size = self._fixed_end = max(self._offset, self._file.size_bytes if self._file else 0)
        return size

    async def _place(self, start: Start, end: int) -> int:
        """The offset at which to begin. Raises OutOfRange."""
        if start.tail_bytes is not None:
            return max(0, end - start.tail_bytes)
        if start.tail_lines is not None:
            return await self._place_lines(start.tail_lines, end)
        if (start.offset or 0) > end:
            raise OutOfRange(f"offset {start.offset} is beyond the end of the output ({end} bytes)")
        return start.offset or 0

    async def _place_lines(self, lines: int, end: int) -> int:
        file = self._file
        if not lines:
            return end
        if file is None:
            return 0
        search = await self._reader._run(file, lambda: file.search_last_lines(lines, end))
        while not search.done:  # piece by piece, so that a cancelled search ends
            search = await self._reader._run(file, partial(file.search_on, search))
        return search.offset

    async def _wait_for_file(self) -> None:
        """Until it exists, or never will: then the job has ended without it."""
        directory, name = os.fsencode(self._path.parent), os.fsencode(self._path.name)
        self._subscription = self._reader._notifier.watch_name(directory, name, self._wake)
        while True:
            ended = self._final_size.done()
            self._wake.clear()
            self._file = await self._reader._open(self._path)
            if self._file is not None or ended:
                break
            await self._wake.wait()
        self._subscription.close()
        self._subscription = None


class _Turns:
    """Lets so many tasks on in each turn of the event loop, first come, first served."""

    def __init__(self, per_turn: int) -> None:
        self._per_turn = per_turn
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def take(self) -> None:
        """Waits for the next turn, or a later one."""
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._grant)
        self._waiting.append(turn)
        await turn

    def _grant(self) -> None:
        granted = 0
        while self._waiting and granted < self._per_turn:
            turn = self._waiting.popleft()
            if not turn.done():  # cancelled
                turn.set_result(None)
                granted += 1
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._grant)


def _release_opened(opening: concurrent.futures.Future[OutputFile | None]) -> None:
    """The stream that wanted the file is gone."""
    if opening.cancelled() or opening.exception() is not None:
        return
    file = opening.result()
    if file is not None:
        file.release()


def _unavailable(verb: str, path: Path, error: OSError) -> Unavailable:
    return Unavailable(f"cannot {verb} the output {path}: {error.strerror or error}")
