"""The whole worker beside its yardsticks, in interleaved rounds: --rounds N, --quick, --running N.

C starts /bin/true by posix_spawn, eight at once; grpc.aio is what one would write by hand (`_grpc_aio_worker`). Ours
runs as it is shipped: durable record, audit, log. State and output are on tmpfs, so that it is the code that is
measured and not the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from worker_svc.pb import jobscheduler as pb
from worker_svc.wire.codec import encode

HERE: Final = Path(__file__).parent
TOP: Final = HERE.parent
START: Final = "/jobscheduler.Worker/StartJob"
QUERY: Final = "/jobscheduler.Worker/QueryJob"
WAIT: Final = "/jobscheduler.Worker/WaitJob"
RUN: Final = "/jobscheduler.Worker/RunJobs"
IN_FLIGHT: Final = 64
JOBS_IN_FLIGHT: Final = 256


class Program:
    """A child that answers one line with one line."""

    def __init__(self, command: list[str], **options: Any) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, cwd=TOP, **options
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        line: str = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args!r} ended")
        return line

    def ask(self, text: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        return self.line()

    def close(self) -> None:
        self.process.communicate()


class Client(Program):
    def __init__(self, address: str) -> None:
        super().__init__([sys.executable, "-m", "benchmarks._load", address])

    def run(self, path: str, messages: list[bytes], count: int, in_flight: int) -> dict[str, Any]:
        asked = {"path": path, "messages": [m.hex() for m in messages], "count": count, "in_flight": in_flight}
        found: dict[str, Any] = json.loads(self.ask(json.dumps(asked)))
        if found["errors"]:
            raise RuntimeError(f"{path}: {found['errors']} of {count} calls failed")
        return found


class Worker:
    """Ours, as it is shipped, on a free port."""

    def __init__(self, folder: Path, slots: int) -> None:
        self.state = folder / "state"
        self.log = folder / "worker.log"
        command = [
            sys.executable, "-m", "worker_svc", "serve", "--state-dir", str(self.state), "--scheduler-addr", "",
            "--grpc-server-addr", "127.0.0.1:0", "--jobs-slots", str(slots), "--jobs-cwd", "/", "--log-file",
            str(self.log), "--log-format", "json", "--transport-requests-per-s", "0",
        ]  # fmt: skip
        began = time.perf_counter()
        self.process = subprocess.Popen(command, cwd=TOP, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (serving := self._event("worker.serving")):
            if self.process.poll() is not None:
                raise RuntimeError(self.log.read_text() if self.log.exists() else "the worker did not start")
            time.sleep(0.005)
        self.serving_after_s = time.perf_counter() - began
        self.address: str = serving["address"]
        self.client = Client(self.address)
        status = self._event("supervisor.started") or self._event("supervisor.connected") or {}
        self.supervisor_pid = int(status.get("pid") or self._find_supervisor())

    def _event(self, name: str) -> dict[str, Any] | None:
        if not self.log.exists():
            return None
        lines = (json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{"))
        return next((line for line in lines if line.get("event") == name), None)

    def _find_supervisor(self) -> int:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if f"worker_svc.supervisor\0--state-dir\0{self.state}" in path.read_text():
                    return int(path.parent.name)
            except OSError:
                continue
        raise RuntimeError("there is no supervisor")

    def cpu_s(self) -> tuple[float, float]:
        return cpu_of(self.process.pid), cpu_of(self.supervisor_pid)

    def close(self) -> None:
        self.client.close()
        subprocess.run(
            [sys.executable, "-m", "worker_svc", "shutdown", "--stop-jobs", "--addr", self.address],
            cwd=TOP, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        self.process.terminate()
        self.process.wait(60)


def cpu_of(pid: int) -> float:
    """User and system time of one process, threads included, children not."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start_message(command: str = "/bin/true", **fields: Any) -> bytes:
    return encode(pb.StartJobReq(command=command, **fields))


class Figures:
    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def add(self, name: str, value: float) -> None:
        self.values.setdefault(name, []).append(value)

    def median(self, name: str) -> float:
        return statistics.median(self.values[name])

    def ratio(self, name: str, yard: str) -> tuple[float, float, float]:
        """Quartiles of the ratio within each round."""
        ratios = [mine / other for mine, other in zip(self.values[name], self.values[yard], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        return low, middle, high


def measure_round(ours: Worker, aio: Client, c_loop: Program, count: int, figures: Figures) -> None:
    figures.add("C loop", count / float(c_loop.ask(str(count)).split()[0]))
    start = [start_message()]
    figures.add("grpc.aio StartJob", count / aio.run(START, start, count, IN_FLIGHT)["seconds"])
    before = ours.cpu_s()
    figures.add("StartJob", count / ours.client.run(START, start, count, IN_FLIGHT)["seconds"])
    settle(ours)
    worker_s, supervisor_s = (after - earlier for after, earlier in zip(ours.cpu_s(), before, strict=True))
    figures.add("worker CPU", worker_s / count * 1e6)
    figures.add("supervisor CPU", supervisor_s / count * 1e6)
    measure_run_jobs(ours, count, figures)
    alone = ours.client.run(START, start, max(count // 8, 20), 1)
    figures.add("alone p50", alone["p50_ms"])
    figures.add("alone p99", alone["p99_ms"])
    alone = aio.run(START, start, max(count // 8, 20), 1)
    figures.add("grpc.aio alone p50", alone["p50_ms"])
    settle(ours)
    queries = [encode(pb.QueryJobReq(job_id="known"))]
    figures.add("grpc.aio QueryJob", 2 * count / aio.run(QUERY, queries, 2 * count, IN_FLIGHT)["seconds"])
    figures.add("QueryJob", 2 * count / ours.client.run(QUERY, queries, 2 * count, IN_FLIGHT)["seconds"])


def measure_run_jobs(ours: Worker, count: int, figures: Figures) -> None:
    """Jobs run to their end, their results known to the client."""
    run, frame = time.monotonic_ns(), 40
    jobs = [pb.StartJobReq(command="/bin/true", job_id=f"run-{run}-{number}") for number in range(count)]
    messages = [encode(pb.RunJobsReq(in_flight=JOBS_IN_FLIGHT, view=pb.JobView(pb.JobView.NO_SPEC)))]
    messages += [encode(pb.RunJobsReq(starts=jobs[at : at + frame])) for at in range(0, count, frame)]
    before = ours.cpu_s()
    figures.add("RunJobs", count / ours.client.run(RUN, messages, count, 0)["seconds"])
    worker_s, supervisor_s = (after - earlier for after, earlier in zip(ours.cpu_s(), before, strict=True))
    figures.add("RunJobs worker CPU", worker_s / count * 1e6)
    figures.add("RunJobs supervisor CPU", supervisor_s / count * 1e6)


def settle(ours: Worker) -> None:
    """Until what was started has ended: the next figure is not to pay for it."""
    job = encode(pb.StartJobReq(command="/bin/true", job_id=f"settle-{time.monotonic_ns()}"))
    ours.client.run(START, [job], 1, 1)
    ours.client.run(WAIT, [encode(pb.WaitJobReq(job_id=pb.StartJobReq().parse(job).job_id))], 1, 1)
    time.sleep(0.05)


def table(figures: Figures) -> str:
    rows = [
        ("C loop, starts/s", "C loop", "C loop"),
        ("StartJob/s, 64 in flight", "StartJob", "C loop"),
        ("  grpc.aio", "grpc.aio StartJob", "C loop"),
        ("RunJobs, run to the end/s", "RunJobs", "C loop"),
        ("  CPU a job, worker, µs", "RunJobs worker CPU", ""),
        ("  CPU a job, supervisor, µs", "RunJobs supervisor CPU", ""),
        ("QueryJob/s, 64 in flight", "QueryJob", "grpc.aio QueryJob"),
        ("  grpc.aio", "grpc.aio QueryJob", "grpc.aio QueryJob"),
        ("StartJob alone, p50 ms", "alone p50", "grpc.aio alone p50"),
        ("StartJob alone, p99 ms", "alone p99", "grpc.aio alone p50"),
        ("  grpc.aio, p50 ms", "grpc.aio alone p50", "grpc.aio alone p50"),
        ("CPU a job, worker, µs", "worker CPU", ""),
        ("CPU a job, supervisor, µs", "supervisor CPU", ""),
    ]
    lines = [f"{'':30}{'median':>10}   ratio (quartiles)"]
    for label, name, yard in rows:
        line = f"{label:30}{figures.median(name):>10.2f}"
        if yard and yard != name:
            low, middle, high = figures.ratio(name, yard)
            line += f"   {middle:.2f} of {yard} ({low:.2f}–{high:.2f})"
        lines.append(line)
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--running", type=int, default=0, help="so many jobs run meanwhile")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.count = 2, 200
    folder = Path(tempfile.mkdtemp(prefix="worker-svc-bench-", dir="/dev/shm"))
    (folder / "c").mkdir()
    (folder / "aio").mkdir()
    subprocess.run([shutil.which("cc") or "cc", "-O2", "-o", folder / "c-loop", HERE / "spawn.c"], check=True)
    figures = Figures()
    c_loop = Program([str(folder / "c-loop"), str(folder / "c"), "8"])
    aio_worker = Program([sys.executable, "-m", "benchmarks._grpc_aio_worker", str(folder / "aio")])
    aio = Client(f"127.0.0.1:{int(aio_worker.line())}")
    ours = Worker(folder, slots=options.running + 1000)
    try:
        ours.client.run(START, [start_message(job_id="known")], 1, 1)
        if options.running:
            ours.client.run(START, [start_message("/bin/sleep", args=["600"])], options.running, IN_FLIGHT)
        for number in range(options.rounds + 1):
            measure_round(ours, aio, c_loop, options.count if number else 50, figures if number else Figures())
    finally:
        ours.close()
        aio.close()
        aio_worker.close()
        c_loop.close()
        shutil.rmtree(folder, ignore_errors=True)
    print(
        f"{options.rounds} interleaved rounds; serving after {ours.serving_after_s:.2f} s; {options.running} running\n"
    )
    print(table(figures))
    if options.json:
        options.json.write_text(json.dumps(figures.values, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
