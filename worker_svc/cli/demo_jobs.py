"""The jobs of the demo, and what is expected of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from worker_svc.cli.render import exit_word, human_duration, human_size, status_word
from worker_svc.job import Outcome
from worker_svc.pb.jobscheduler import QueryJobRes

_BASH_SCRIPT: Final = """\
for n in 1 2 3 4; do
  echo "tick $n of 4"
  sleep 0.5
done
"""

_PYTHON_SCRIPT: Final = """\
import os, sys, time
print("hello", os.environ["GREET"], flush=True)
for n in (1, 2):
    time.sleep(0.4)
    print(f"{n}/2 done", flush=True)
print("and now a failure, on purpose", file=sys.stderr)
sys.exit(3)
"""

_LONG_SCRIPT: Final = """\
for n in $(seq 1 60); do
  echo "mile $n of 60"
  sleep 0.3
done
"""


@dataclass(frozen=True)
class DemoJob:
    name: str
    title: str
    request: dict[str, Any]
    outcome: Outcome
    error_text: str
    output: bytes
    """All of it, or its beginning if the job is stopped."""
    expected: str
    stop_after_s: float = 0.0


def demo_jobs(directory: Path) -> list[DemoJob]:
    ticks, fails, long = directory / "ticks.sh", directory / "fails.py", directory / "long.sh"
    ticks.write_text(_BASH_SCRIPT)
    fails.write_text(_PYTHON_SCRIPT)
    long.write_text(_LONG_SCRIPT)
    return [
        DemoJob(
            "bash",
            "bash ticks.sh",
            {"command": "bash", "path": str(ticks)},
            Outcome.SUCCEEDED,
            "",
            b"".join(b"tick %d of 4\n" % n for n in (1, 2, 3, 4)),
            "succeeded",
        ),
        DemoJob(
            "python",
            "GREET=world python3 fails.py",
            {"command": "python3", "path": str(fails), "env": {"GREET": "world"}},
            Outcome.FAILED,
            "exit status 3",
            b"hello world\n1/2 done\n2/2 done\nand now a failure, on purpose\n",
            "failed, as it was written to, with exit status 3",
        ),
        DemoJob(
            "sort",
            "sort -n (an executable), with 10 9 2 on its standard input",
            {"command": "sort", "args": ["-n"], "stdin": b"10\n9\n2\n"},
            Outcome.SUCCEEDED,
            "",
            b"2\n9\n10\n",
            "succeeded",
        ),
        DemoJob(
            "long",
            "bash long.sh, which would take 18 s",
            {"command": "bash", "path": str(long)},
            Outcome.STOPPED,
            "signal: terminated",
            b"mile 1 of 60\nmile 2 of 60\n",
            "was stopped midway",
            stop_after_s=1.3,
        ),
    ]


class Lines:
    """Cuts a stream of bytes into lines of text."""

    def __init__(self) -> None:
        self._open = b""

    def feed(self, data: bytes) -> Iterable[str]:
        *whole, self._open = (self._open + data).split(b"\n")
        return [line.decode(errors="replace") for line in whole]

    def rest(self) -> Iterable[str]:
        return [self._open.decode(errors="replace")] if self._open else []


@dataclass
class Run:
    """A job of the demo that was started."""

    job: DemoJob
    job_id: str
    output: bytearray = field(default_factory=bytearray)
    lines: Lines = field(default_factory=Lines)
    answer: QueryJobRes | None = None

    @property
    def how_it_ended(self) -> str:
        if self.answer is None:
            return "unknown"
        return f"{status_word(self.answer.job)}, {self.answer.error_text or 'no error'}"


def check_end(run: Run) -> bool:
    """Whether QueryJob tells the end that was expected, in the original fields and in ours."""
    expected, answer = run.job, run.answer
    return (
        answer is not None
        and answer.done
        and answer.error == (expected.outcome is not Outcome.SUCCEEDED)
        and answer.error_text == expected.error_text
        and answer.job.outcome == expected.outcome
    )


def check_output(run: Run) -> bool:
    """Whether what was followed is what the job writes, to the last byte that the worker counted."""
    if run.answer is None or run.answer.job.output_size_bytes != len(run.output):
        return False
    if run.job.outcome is Outcome.STOPPED:
        return run.output.startswith(run.job.output)
    return run.output == run.job.output


def query_table(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """A row a job, the head first: the three original fields, then some of ours."""
    rows: list[tuple[str, ...]] = [("", "done", "error", "errorText", "outcome", "exit", "wall", "cpu", "output")]
    for run in runs:
        assert run.answer is not None
        job = run.answer.job
        rows.append(
            (
                run.job.name,
                "yes" if run.answer.done else "no",
                "yes" if run.answer.error else "no",
                run.answer.error_text,
                status_word(job),
                exit_word(job),
                human_duration(job.wall_time) if job.wall_time is not None else "-",
                human_duration(job.cpu_time) if job.cpu_time is not None else "-",
                human_size(job.output_size_bytes),
            )
        )
    return rows
