"""What must hold after a round, whatever was killed when."""

from __future__ import annotations

import itertools
import json
import os
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Final, NamedTuple

from tests.support.crash.jobs import CrashJob, Ending, Mark, read_marks
from tests.support.workers import Worker
from worker_svc.job import JobRecord, JobState, Outcome, Transition
from worker_svc.record.paths import STORE_NAME, output_path
from worker_svc.supervisor.outputs import PIPE_GONE
from worker_svc.telemetry import fields_of

# All that a state directory may hold once worker and supervisor have left.
LEFT: Final = {STORE_NAME, "worker.cursor", "supervisor.log", "output", "disk-reserve", "crash-points.reached"}


class Verdict(NamedTuple):
    wrong: list[str]
    """Outcomes that are not the true one, and LOST where it could be known."""
    twice: list[str]
    missing: list[str]
    other: list[str]
    lost: int

    @property
    def problems(self) -> list[str]:
        return [*self.wrong, *self.twice, *self.missing, *self.other]


class Recovery(NamedTuple):
    """When a supervisor took over what an earlier one had left."""

    began_ns: int
    done_ns: int


def judge(
    jobs: list[CrashJob], worker: Worker, told: dict[str, Ending], stop_asked_ns: dict[str, int], marks_path: Path
) -> Verdict:
    """Both have left. Each list is empty if all is well."""
    verdict = Verdict([], [], [], [], 0)
    with worker.reader() as reader:
        events = reader.events(0, 1_000_000)
        found = {job_id: reader.get(job_id) for job_id in {event.job_id for event in events}}
    records = {job_id: record for job_id, record in found.items() if record is not None}
    by_job: dict[str, list[Transition]] = defaultdict(list)
    for event in events:
        by_job[event.job_id].append(event)
    marks = defaultdict(list)
    for mark in read_marks(marks_path):
        marks[mark.job_id].append(mark)
    recoveries = read_recoveries(worker.path / "supervisor.log")
    lost = 0
    for job in jobs:
        record = records.get(job.job_id)
        if record is None:
            verdict.missing.append(f"{job.job_id} is not on record")
            continue
        verdict.wrong.extend(_chain_problems(record, by_job[job.job_id]))
        ending = ending_of(record)
        if told.get(job.job_id) != ending:
            verdict.wrong.append(f"{job.job_id}: told {told.get(job.job_id)}, on record {ending}")
        if sum(mark.kind == "S" for mark in marks[job.job_id]) > 1:
            verdict.twice.append(f"{job.job_id} ran twice: {marks[job.job_id]}")
        if ending.outcome is Outcome.LOST:
            lost += 1
            problem = _why_not_lost(
                job, by_job[job.job_id], marks[job.job_id], recoveries, stop_asked_ns.get(job.job_id)
            )
            if problem:
                verdict.wrong.append(
                    f"{job.job_id} ({job.kind}) is LOST, {problem}: {record.reason}; {by_job[job.job_id]}"
                )
        elif ending not in job.endings and not _had_no_time_to_start(ending, by_job[job.job_id]):
            verdict.wrong.append(
                f"{job.job_id} ({job.kind}) ended as {ending}, not {set(job.endings)}: {record.reason}"
            )
        elif job.ends_by_itself and job.kind != "fail" and [mark.kind for mark in marks[job.job_id]] != ["S", "E"]:
            verdict.wrong.append(f"{job.job_id} is {ending}, but its marks are {marks[job.job_id]}")
        if ending.outcome is Outcome.SUCCEEDED and job.output is not None:
            verdict.wrong.extend(_output_problems(job, record, worker))
    verdict.other.extend(f"{job_id} was never asked for" for job_id in records.keys() - {job.job_id for job in jobs})
    verdict.other.extend(_number_problems([event.sequence for event in events], "events"))
    verdict.other.extend(_log_problems(worker, events))
    verdict.other.extend(_store_problems(worker.path))
    verdict.other.extend(left_behind(worker.path))
    return verdict._replace(lost=lost)


def _had_no_time_to_start(ending: Ending, events: list[Transition]) -> bool:
    """On a busy machine a start may take as long as the whole job may."""
    return ending == Ending(Outcome.TIMED_OUT, None, None) and events[-1].from_state is JobState.STARTING


def ending_of(record: JobRecord) -> Ending:
    return Ending(record.outcome, record.exit_code, record.signal)


def _chain_problems(record: JobRecord, events: list[Transition]) -> Iterator[str]:
    states = [JobState.NEW, *(event.to_state for event in events)]
    if [event.from_state for event in events] != states[:-1] or states.count(JobState.FINISHED) != 1:
        yield f"{record.job_id}: its transitions are no chain to one end: {events}"
    last = events[-1]
    if (last.outcome, last.exit_code, last.signal, last.sequence) != (*ending_of(record), record.last_sequence):
        yield f"{record.job_id}: the event tells {last}, the record {record}"


def _why_not_lost(
    job: CrashJob,
    events: list[Transition],
    marks: list[Mark],
    recoveries: list[Recovery],
    stop_asked_ns: int | None,
) -> str:
    """Empty: its end could not be known. It was starting when the supervisor died, or it had ended before the next one
    looked for its process, which is the moment of the transition."""
    lost = events[-1]
    if not any(recovery.began_ns <= lost.at_ns <= recovery.done_ns for recovery in recoveries):
        return "though no supervisor was taking over"
    if lost.from_state is JobState.STARTING:
        return ""
    if lost.from_state not in (JobState.RUNNING, JobState.STOPPING):
        return f"from {lost.from_state.name}"
    if job.ends_by_itself:
        ended = [mark for mark in marks if mark.kind == "E"]
        return "" if ended and ended[0].at_ns <= lost.at_ns else "while its process was there"
    started_ns = next(event.at_ns for event in events if event.to_state is JobState.RUNNING)
    asked_ns = started_ns + int(job.options["timeout_s"] * 1e9) if stop_asked_ns is None else stop_asked_ns
    return "" if asked_ns <= lost.at_ns + 20_000_000 else "before it was asked to end"


def _output_problems(job: CrashJob, record: JobRecord, worker: Worker) -> Iterator[str]:
    """What the pipe of a job held that ended while no supervisor was there is lost: that is told, and what is there is
    right."""
    found = Path(output_path(str(worker.path), job.job_id)).read_bytes()
    if record.output_loss == PIPE_GONE and (job.output or b"").startswith(found):
        return
    if found != job.output or record.output_size_bytes != len(found):
        size = len(job.output or b"")
        yield f"{job.job_id}: wrote {size} bytes, {len(found)} are there, {record.output_size_bytes} on record"


def _number_problems(numbers: list[int], what: str) -> Iterator[str]:
    if numbers != list(range(1, len(numbers) + 1)):
        odd = [(before, after) for before, after in itertools.pairwise(numbers) if after != before + 1]
        yield f"{what}: numbers are not 1 to {len(numbers)}: breaks at {odd[:10]}"


def _log_problems(worker: Worker, events: list[Transition]) -> Iterator[str]:
    """Each transition is one line, once and in order. A line that a kill cut short is no line."""
    lines = []
    for line in worker.log_path.read_bytes().splitlines():
        try:
            fields = json.loads(line)
        except ValueError:
            continue
        if fields["event"] == "job.transition":
            lines.append(fields)
        elif fields["event"] == "worker.failed" or fields.get("level") == "error":
            yield f"the worker said {fields}"
    yield from _number_problems([line["sequence"] for line in lines], "lines of the log")
    for line, event in zip(lines, events, strict=False):
        expected = fields_of(event)
        if {key: line.get(key) for key in expected} != expected:
            yield f"the log says {line}, the store {event}"


def _store_problems(state_dir: Path) -> Iterator[str]:
    with sqlite3.connect(state_dir / STORE_NAME) as db:
        (verdict,) = db.execute("PRAGMA integrity_check").fetchone()
        (inputs,) = db.execute("SELECT COUNT(*) FROM stdin").fetchone()
        (sequence,) = db.execute("SELECT value FROM meta WHERE key = 'sequence'").fetchone()
        (latest,) = db.execute("SELECT MAX(sequence) FROM events").fetchone()
    db.close()
    if verdict != "ok":
        yield f"the store is damaged: {verdict}"
    if inputs:
        yield f"the standard inputs of {inputs} jobs were left in the store"
    if sequence != latest:
        yield f"the store counts {sequence} transitions and has {latest}"
    if "Traceback" in (state_dir / "supervisor.log").read_text():
        yield "a supervisor failed: " + (state_dir / "supervisor.log").read_text().partition("Traceback")[2][:3000]


def read_recoveries(log: Path) -> list[Recovery]:
    began: dict[int, int] = {}
    found = []
    last_pid = 0
    for line in log.read_text().splitlines():
        try:
            fields = json.loads(line)
        except ValueError:
            continue
        if fields["event"] == "supervisor.starting":
            last_pid = fields["pid"]
            began[last_pid] = _ns(fields["time"])
        elif fields["event"] == "supervisor.recovered":
            found.append(Recovery(began[last_pid], _ns(fields["time"]) + 1000))
    return found


def _ns(moment: str) -> int:
    seconds, _, fraction = moment.removesuffix("Z").partition(".")
    return int(datetime.fromisoformat(f"{seconds}+00:00").timestamp()) * 10**9 + int(fraction) * 1000


# What must not be left


def left_behind(state_dir: Path) -> Iterator[str]:
    """After both have left."""
    names = {entry.name for entry in state_dir.iterdir()} - LEFT
    if names:
        yield f"in the state directory are left: {sorted(names)}"
    state_id = state_id_of(state_dir)
    for pid in marked_processes(state_id):
        yield f"process {pid} is left: {_command(pid)}"
    yield from (f"the cgroup {path} is left" for path in cgroups_of(state_id))


def state_id_of(state_dir: Path) -> str:
    with sqlite3.connect(f"file:{state_dir / STORE_NAME}?mode=ro", uri=True) as db:
        (state_id,) = db.execute("SELECT value FROM meta WHERE key = 'state_id'").fetchone()
    db.close()
    return str(state_id)


def marked_processes(state_id: str) -> list[int]:
    """Processes of jobs of this state, whatever they did: they cannot change what they were executed with."""
    found = []
    mark = f"WORKER_STATE_ID={state_id}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if mark in environment:
                found.append(int(entry.name))
    return found


def cgroups_of(state_id: str) -> list[str]:
    with open("/proc/self/mountinfo", errors="surrogateescape") as mounts:
        points = [line.split(" ")[4] for line in mounts if " - cgroup2 " in line]
    name = f"worker-svc-{state_id}"
    # os.walk, since others' groups may go meanwhile
    return [f"{folder}/{name}" for point in points for folder, groups, _ in os.walk(point) if name in groups]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:300]
    except OSError:
        return "(gone)"


def fd_problems(name: str, pid: int, most: dict[str, int]) -> Iterator[str]:
    """Open files of a process that is idle, by kind, beyond `most` of that kind."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for link in _links(pid):
        kinds[_kind_of(link)].append(link)
    for kind, links in kinds.items():
        if len(links) > most.get(kind, 0):
            yield f"the {name} has {len(links)} fds of kind {kind}, not {most.get(kind, 0)}: {links[:8]}"


def _links(pid: int) -> Iterable[str]:
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            yield str(fd.readlink())
        except FileNotFoundError:
            continue


def _kind_of(link: str) -> str:
    if link.startswith("/"):
        return "/dev/null" if link == "/dev/null" else "cgroup" if "/cgroup" in link else Path(link).name
    kind, _, rest = link.partition(":")
    return rest.strip("[]") if kind == "anon_inode" else kind
