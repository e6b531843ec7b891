"""Where the output of a job lies, as clients are told it and as it is streamed."""

from __future__ import annotations

from pathlib import Path

from worker_svc.job import InvalidArgument, JobRecord, JobState, PreconditionFailed
from worker_svc.pb import jobscheduler as pb
from worker_svc.record.paths import output_path, stderr_path
from worker_svc.wire import messages


class JobFiles:
    def __init__(self, state_dir: str) -> None:
        self._state_dir = state_dir

    def of(self, record: JobRecord) -> messages.OutputFiles:
        output = output_path(self._state_dir, record.job_id)
        stderr = stderr_path(self._state_dir, record.job_id) if record.spec.separate_stderr else ""
        if record.state is JobState.FINISHED:
            return messages.OutputFiles(output, stderr, record.output_size_bytes or 0, record.stderr_size_bytes or 0)
        return messages.OutputFiles(output, stderr, _size_of(output), _size_of(stderr) if stderr else 0)

    def stream_path(self, record: JobRecord, stream: pb.OutputStream) -> Path:
        if stream not in list(pb.OutputStream):
            raise InvalidArgument("stream", f"there is no stream {int(stream)}")
        if record.spec.separate_stderr and stream == pb.OutputStream.MERGED:
            raise PreconditionFailed("stream: the job's standard error is separate: ask for STDOUT or STDERR")
        if not record.spec.separate_stderr and stream in (pb.OutputStream.STDOUT, pb.OutputStream.STDERR):
            raise PreconditionFailed("stream: the job's standard error is merged into its output: ask for MERGED")
        path_of = stderr_path if stream == pb.OutputStream.STDERR else output_path
        return Path(path_of(self._state_dir, record.job_id))


def _size_of(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except FileNotFoundError:  # not started yet, or removed by an operator
        return 0
