"""Jobs whose end is known beforehand, and which leave marks: when they start and, if they end by themselves, when."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from worker_svc.job import Outcome

# A mark is one write(2) to a file opened with O_APPEND: S (start) or E (end), job id, pid, seconds since the epoch.
SCRIPT: Final = r"""
LC_ALL=C marks=$1 id=$2 kind=$3 wait=$4 arg=$5
mark() { printf '%s %s %d %s\n' "$1" "$id" $$ "$EPOCHREALTIME" >>"$marks"; }
mark S
ulimit -c 0
case $kind in
term) trap "mark E; exit $arg" TERM; while :; do sleep 999 & wait; done ;;
ignore) trap '' TERM; while :; do sleep 999; done ;;
plain) exec sleep 999 ;;
esac
[[ $wait == 0 ]] || sleep "$wait"
case $kind in
children) sleep 999 & setsid sleep 999 & (setsid sleep 999 &) ;;
output) for ((i = 0; i < arg; i++)); do printf '%s line %d\n' "$id" "$i"; done; arg=0 ;;
stdin) cat; arg=0 ;;
esac
mark E
if [[ $kind == signal ]]; then
    kill -"$arg" $$
    sleep 5
    exit 98
fi
exit "$arg"
"""
# Default action: the process ends. Not SIGQUIT, which bash ignores.
SIGNALS: Final = (1, 2, 4, 6, 8, 9, 10, 11, 12, 13, 14, 15)
NO_SUCH_PROGRAM: Final = "there-is-no-such-program"


class Ending(NamedTuple):
    outcome: Outcome
    exit_code: int | None = None
    signal: int | None = None


class CrashJob(NamedTuple):
    job_id: str
    kind: str
    argv: list[str]
    options: dict[str, Any]
    """For WorkerClient.start."""
    endings: frozenset[Ending]
    """The true ones: several where it depends on the moment at which a signal comes."""
    stop_after_s: float | None = None
    output: bytes | None = None

    @property
    def ends_by_itself(self) -> bool:
        return self.stop_after_s is None and "timeout_s" not in self.options


def make_jobs(rng: random.Random, count: int, marks: Path, longest_s: float = 5.0) -> Iterator[CrashJob]:
    """Those that end by themselves do so within `longest_s`, most of them much sooner."""
    for number in range(count):
        job_id = f"{number:04d}-{rng.getrandbits(24):06x}"
        kind = rng.choices(
            ("exit", "signal", "children", "output", "stdin", "timeout", "stop", "fail"), (40, 12, 8, 8, 5, 9, 15, 3)
        )[0]
        wait_s = longest_s * rng.choice((0.0, 0.0, rng.uniform(0, 0.1), rng.uniform(0, 0.3), rng.uniform(0.2, 1)))
        yield _make(rng, job_id, kind, number % 256, marks, wait_s)


def _make(rng: random.Random, job_id: str, kind: str, code: int, marks: Path, wait_s: float) -> CrashJob:
    def argv(kind: str, arg: int = 0) -> list[str]:
        return ["bash", "-c", SCRIPT, "job", str(marks), job_id, kind, f"{wait_s:.3f}" if wait_s else "0", str(arg)]

    match kind:
        case "exit" | "children":
            ending = Ending(Outcome.FAILED if code else Outcome.SUCCEEDED, code)
            return CrashJob(job_id, kind, argv(kind, code), {}, frozenset({ending}))
        case "signal":
            number = rng.choice(SIGNALS)
            return CrashJob(job_id, kind, argv(kind, number), {}, frozenset({Ending(Outcome.SIGNALED, None, number)}))
        case "output":
            lines = rng.choice((1, 10, 300))
            text = "".join(f"{job_id} line {i}\n" for i in range(lines)).encode()
            done = frozenset({Ending(Outcome.SUCCEEDED, 0)})
            return CrashJob(job_id, kind, argv(kind, lines), {}, done, output=text)
        case "stdin":
            text = rng.randbytes(rng.choice((1, 100, 100_000)))
            return CrashJob(
                job_id, kind, argv(kind), {"stdin": text}, frozenset({Ending(Outcome.SUCCEEDED, 0)}), output=text
            )
        case "timeout":
            options = {"timeout_s": rng.choice((0.2, 0.5, 1.5)), "stop_grace_s": 0.4}
            return _asked_to_end(rng, job_id, argv, Outcome.TIMED_OUT, options, None)
        case "stop":
            options = {"stop_grace_s": rng.choice((0.0, 0.4))}
            return _asked_to_end(rng, job_id, argv, Outcome.STOPPED, options, rng.choice((0.0, rng.uniform(0, 2))))
    return CrashJob(job_id, kind, [NO_SUCH_PROGRAM], {}, frozenset({Ending(Outcome.START_FAILED)}))


def _asked_to_end(
    rng: random.Random,
    job_id: str,
    argv: Any,
    outcome: Outcome,
    options: dict[str, Any],
    stop_after_s: float | None,
) -> CrashJob:
    kind = rng.choice(("term", "ignore", "plain"))
    # By the stop signal (before the trap is set, too) or, when the grace is over, by SIGKILL.
    endings = {Ending(outcome, None, 15), Ending(outcome, None, 9)}
    if kind == "term":
        endings.add(Ending(outcome, 5))
    if stop_after_s is not None:
        endings.add(Ending(outcome))  # before it started
    return CrashJob(job_id, kind, argv(kind, 5), options, frozenset(endings), stop_after_s)


class Mark(NamedTuple):
    kind: str
    job_id: str
    pid: int
    at_ns: int


def read_marks(path: Path) -> list[Mark]:
    marks = []
    for line in path.read_text().splitlines() if path.exists() else ():
        kind, job_id, pid, at_s = line.split()
        seconds, _, fraction = at_s.partition(".")
        marks.append(Mark(kind, job_id, int(pid), int(seconds) * 10**9 + int(fraction.ljust(9, "0"))))
    return marks
