"""The output of jobs that run: how it gets into their files and is held to its caps, and what is lost of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final

from worker_svc.job import Event, JobSpec, JobState, OutputPolicy, OutputVia, PreconditionFailed
from worker_svc.record.store import output_path, stderr_path
from worker_svc.supervisor.journal import note
from worker_svc.supervisor.ledger import Ledger
from worker_svc.supervisor.livejob import LiveJob
from worker_svc.supervisor.mailbox import Mailbox
from worker_svc.supervisor.output_guard import OutputGuard, can_drop_head
from worker_svc.supervisor.output_pump import OutputPump, find_pipes, why_no_pipes
from worker_svc.supervisor.transitions import Transitions

PIPE_GONE: Final = "its pipe was gone when a new supervisor came: its last bytes may be missing"
_COLUMNS: Final = ("output_size_bytes", "stderr_size_bytes")


class Outputs:
    def __init__(
        self,
        state_dir: str,
        implementation: str,
        mailbox: Mailbox,
        ledger: Ledger,
        transitions: Transitions,
        on_exceeded: Callable[[LiveJob], None],
    ) -> None:
        """`on_exceeded` hears of a job that must be stopped for what it writes; again if that was not enough. Starts
        its threads: there may be none to be had later. Raises OSError, RuntimeError."""
        self._state_dir = state_dir
        self._ledger = ledger
        self._transitions = transitions
        folder = f"{state_dir}/output"
        self.can_drop_head = can_drop_head(folder)
        self._why_no_pipes = why_no_pipes(folder)
        self._guard = OutputGuard(
            lambda job: mailbox.post(partial(on_exceeded, job), job),
            lambda job, text, is_lost: mailbox.post(partial(self._remark, job, text, is_lost), job),
            self.can_drop_head,
        )
        self._pump = OutputPump(implementation, on_exceeded, self._remark)
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

    def paths(self, job: LiveJob) -> list[str]:
        paths = [output_path(self._state_dir, job.job_id)]
        return [*paths, stderr_path(self._state_dir, job.job_id)] if job.separate_stderr else paths

    def begin(self, job: LiveJob, pipes: tuple[tuple[int, int], ...]) -> None:
        """It was just started. `pipes`: reading ends, and the files they are for; empty: the job has the files."""
        cap_bytes, policy = self._cap(job)
        if job.output_via is OutputVia.FILE:
            for path in self.paths(job):
                self._guard.guard(job, path, cap_bytes, policy)
        for reader, file in pipes:
            self._add(job, reader, file, cap_bytes, policy)
        job.has_outputs = True

    def take_up(self, job: LiveJob, pids: Iterable[int]) -> None:
        """An earlier supervisor started it; `pids` are its processes. Raises OSError, and can be tried again then."""
        if job.output_via is OutputVia.FILE:
            self.begin(job, ())
            return
        paths = self.paths(job)
        if job.state is JobState.STARTING and not os.path.lexists(paths[0]):
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
        cap_bytes, policy = self._cap(job)
        for reader, file in zip(readers, files, strict=True):
            if reader >= 0:
                self._add(job, reader, file, cap_bytes, policy)
                continue
            os.close(file)
            job.pipes.append(None)
            self._remark(job, PIPE_GONE, True)
        job.has_outputs = True

    def _add(self, job: LiveJob, reader: int, file: int, cap_bytes: int, policy: OutputPolicy) -> None:
        try:
            job.pipes.append(self._pump.add(job, reader, file, cap_bytes, policy is OutputPolicy.STOP))
        except OSError as error:
            job.pipes.append(None)
            self._remark(job, f"could not be taken: {error.strerror}", True)

    def _cap(self, job: LiveJob) -> tuple[int, OutputPolicy]:
        policy = job.output_policy
        if policy is OutputPolicy.DROP_HEAD and not self.can_drop_head:
            policy = OutputPolicy.STOP
        return 0 if policy is OutputPolicy.NONE else job.output_max_bytes, policy

    def end(self, job: LiveJob) -> dict[str, Any]:
        """At the end of the job, of any: the columns that tell how large its output is, which is where streams of it
        end, and what is left of it on disk."""
        columns: dict[str, Any] = dict.fromkeys(_COLUMNS[: 1 + job.separate_stderr])
        losses: list[str] = []
        stored_bytes = 0
        for index, path in enumerate(self.paths(job)):
            size, lost = self._size_of(job, index, path)
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
        job.pipes = []
        if losses:
            self._remark(job, "; ".join(losses), True)
        return {**columns, "stored_bytes": stored_bytes, "output_loss": job.output_loss}

    def _size_of(self, job: LiveJob, index: int, path: str) -> tuple[int | None, str]:
        """And what of it is lost. None: nobody knows."""
        pipe = job.pipes[index] if job.pipes else None
        if pipe is not None:
            return self._pump.finish(pipe)
        seen_bytes = self._guard.release(path)
        try:
            size = os.stat(path).st_size
        except OSError:
            return None, ""
        return max(size, seen_bytes), f"{seen_bytes - size} bytes were truncated" if seen_bytes > size else ""

    def _remark(self, job: LiveJob, text: str, is_lost: bool) -> None:
        """On record, to who watches, and in the log; what is lost once a job."""
        if job.state is JobState.FINISHED or (is_lost and text == job.output_loss):
            return
        changes = {"output_loss": text} if is_lost else {}
        if is_lost and job.output_loss:
            self._ledger.annotate(job, changes)
        elif job.state in (JobState.RUNNING, JobState.STOPPING):
            note("job.output", job_id=job.job_id, text=text)
            self._transitions.move(job, Event.REMARK, changes=changes, reason=f"output: {text}")
        # else its end will tell
        if is_lost:
            job.output_loss = text
