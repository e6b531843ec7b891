"""The output of jobs that run: how it gets into their files and is held to its caps, and what is lost of it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial
from typing import Any, Final

from worker_svc.job import Event, JobSpec, JobState, OutputPolicy, OutputVia, PreconditionFailed
from worker_svc.record.paths import output_folder, output_path, stderr_path
from worker_svc.supervisor.journal import note
from worker_svc.supervisor.ledger import Ledger
from worker_svc.supervisor.life.job import Output
from worker_svc.supervisor.life.moves import Moves
from worker_svc.supervisor.mailbox import Mailbox
from worker_svc.supervisor.output_guard import OutputGuard, can_drop_head
from worker_svc.supervisor.output_pump import OutputPump, find_pipes, why_no_pipes

PIPE_GONE: Final = "its pipe was gone when a new supervisor came: its last bytes may be missing"
_COLUMNS: Final = ("output_size_bytes", "stderr_size_bytes")


class Outputs:
    def __init__(
        self,
        state_dir: str,
        implementation: str,
        mailbox: Mailbox,
        ledger: Ledger,
        moves: Moves,
    ) -> None:
        """Starts its threads: there may be none to be had later. Raises OSError, RuntimeError."""
        self._state_dir = state_dir
        self._ledger = ledger
        self._moves = moves
        folder = output_folder(state_dir)
        self.can_drop_head = can_drop_head(folder)
        self._why_no_pipes = why_no_pipes(folder)
        self._guard = OutputGuard(
            lambda output: mailbox.post(output.job.on_output_exceeded, output.job),
            lambda output, text, is_lost: mailbox.post(partial(self._remark, output, text, is_lost), output.job),
            self.can_drop_head,
        )
        self._pump = OutputPump(implementation, lambda output: output.job.on_output_exceeded(), self._remark)
        self.news_fd, self.take_news = self._pump.news_fd, self._pump.take_news

    @property
    def degraded(self) -> str:
        """What holds output less well than it should; empty: nothing."""
        return self._guard.degraded

    def check(self, spec: JobSpec) -> None:
        """Raises PreconditionFailed for what cannot be had here."""
        if spec.output_via is OutputVia.PIPE and self._why_no_pipes:
            raise PreconditionFailed(
                f"output_via: no pipe can be emptied into files of the state directory ({self._why_no_pipes}): use FILE"
            )

    def _paths(self, output: Output) -> list[str]:
        job_id = output.job.job_id
        paths = [output_path(self._state_dir, job_id)]
        return [*paths, stderr_path(self._state_dir, job_id)] if output.terms.separate_stderr else paths

    def begin(self, output: Output, pipes: tuple[tuple[int, int], ...]) -> None:
        """It was just started. `pipes`: reading ends, and the files they are for; empty: the job has the files."""
        cap_bytes, policy = self._cap(output)
        if output.terms.output_via is OutputVia.FILE:
            for path in self._paths(output):
                self._guard.guard(output, path, cap_bytes, policy)
        for reader, file in pipes:
            self._add(output, reader, file, cap_bytes, policy)
        output.is_taken_up = True

    def take_up(self, output: Output, pids: Iterable[int]) -> None:
        """An earlier supervisor started it; `pids` are its processes. Raises OSError, and can be tried again then."""
        if output.terms.output_via is OutputVia.FILE:
            self.begin(output, ())
            return
        paths = self._paths(output)
        if output.job.state is JobState.STARTING and not os.path.lexists(paths[0]):
            return  # it never came to be
        files: list[int] = []
        try:
            for path in paths:
                files.append(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
            readers = find_pipes(pids, len(paths))
        except BaseException:
            for file in files:
                os.close(file)
            raise
        cap_bytes, policy = self._cap(output)
        for reader, file in zip(readers, files, strict=True):
            if reader >= 0:
                self._add(output, reader, file, cap_bytes, policy)
                continue
            os.close(file)
            output.pipes.append(None)
            self._remark(output, PIPE_GONE, True)
        output.is_taken_up = True

    def _add(self, output: Output, reader: int, file: int, cap_bytes: int, policy: OutputPolicy) -> None:
        try:
            output.pipes.append(self._pump.add(output, reader, file, cap_bytes, policy is OutputPolicy.STOP))
        except OSError as error:
            output.pipes.append(None)
            self._remark(output, f"could not be taken: {error.strerror}", True)

    def _cap(self, output: Output) -> tuple[int, OutputPolicy]:
        policy = output.terms.output_policy
        if policy is OutputPolicy.DROP_HEAD and not self.can_drop_head:
            policy = OutputPolicy.STOP
        return 0 if policy is OutputPolicy.NONE else output.terms.output_max_bytes, policy

    def end(self, output: Output) -> dict[str, Any]:
        """At the end of the job, of any: the columns that tell how large its output is, which is where streams of it
        end, and what is left of it on disk."""
        columns: dict[str, Any] = dict.fromkeys(_COLUMNS[: 1 + output.terms.separate_stderr])
        losses: list[str] = []
        stored_bytes = 0
        for index, path in enumerate(self._paths(output)):
            size, lost = self._size_of(output, index, path)
            columns[_COLUMNS[index]] = size
            if lost:
                losses.append(f"standard error: {lost}" if index else lost)
            try:
                found = os.stat(path)
                stored_bytes += found.st_blocks * 512
                if found.st_uid != os.geteuid():  # what the job linked or has open still is not the job's any more
                    os.chown(path, os.geteuid(), os.getegid(), follow_symlinks=False)
            except OSError:  # it never started, an operator removed it, or its disk is dead
                continue
        output.pipes = []
        if losses:
            self._remark(output, "; ".join(losses), True)
        return {**columns, "stored_bytes": stored_bytes, "output_loss": output.loss}

    def _size_of(self, output: Output, index: int, path: str) -> tuple[int | None, str]:
        """And what of it is lost. None: nobody knows."""
        pipe = output.pipes[index] if output.pipes else None
        if pipe is not None:
            return self._pump.finish(pipe)
        seen_bytes = self._guard.release(path)
        try:
            size = os.stat(path).st_size
        except OSError:
            return None, ""
        return max(size, seen_bytes), f"{seen_bytes - size} bytes were truncated" if seen_bytes > size else ""

    def _remark(self, output: Output, text: str, is_lost: bool) -> None:
        """On record, to who watches, and in the log; what is lost once a job."""
        job = output.job
        if job.state is JobState.FINISHED or (is_lost and text == output.loss):
            return
        changes = {"output_loss": text} if is_lost else {}
        if is_lost and output.loss:
            self._ledger.annotate(job, changes)
        elif job.state in (JobState.RUNNING, JobState.STOPPING):
            note("job.output", job_id=job.job_id, text=text)
            self._moves.move(job, Event.REMARK, changes=changes, reason=f"output: {text}")
        # else its end will tell
        if is_lost:
            output.loss = text
