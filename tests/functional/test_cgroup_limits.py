"""That the cgroup controllers hold what a job was limited to: where there are any.

Where this machine has none, scripts/vm-cgroup-test runs these in a small virtual machine.
"""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support.contained import Running, end, kill, run, run_until_up, skip_unless
from tests.support.programs import python
from tests.support.waiting import PATIENCE_S, eventually_sync
from worker_svc.job import Exit
from worker_svc.supervisor.containment import CGROUP, Containment, Usage

MIB: Final = 2**20
# Software emulation is slow to start an interpreter.
# Takes 4 MiB more in each step, so that it is not one huge allocation that is refused.
EAT_MEMORY: Final = "kept = []\nwhile True: kept.append(b'x' * 4 * 2**20)"


def need(containment: Containment, *fields: str) -> None:
    for field in fields:
        missing = containment.unenforceable().get(field)
        if missing:
            pytest.skip(f"{field}: {missing}")


@pytest.fixture
def each_level() -> str:
    skip_unless(CGROUP)
    return CGROUP


def finish(containment: Containment, running: Running) -> tuple[Exit, Usage]:
    """Waits for the leader; then as a supervisor does."""
    assert select.select([running.container.pidfd], [], [], PATIENCE_S)[0]
    kill(containment, running.container)
    pidfd = running.container.pidfd
    ended = containment.take_exit(running.container)
    os.close(pidfd)
    usage = containment.usage(running.container)
    end(containment, running)
    assert ended is not None
    return ended, usage


def file_of(containment: Containment, running: Running, name: str) -> str:
    return (Path(containment.base_path) / running.container.name / name).read_text().strip()


def test_an_oom_kill_is_told_apart_from_any_other_sigkill(containment: Containment) -> None:
    need(containment, "memory_max_bytes", "swap_max_bytes")
    limits = {"memory_max_bytes": 48 * MIB, "swap_max_bytes": 0}
    ended, usage = finish(containment, run(containment, python(EAT_MEMORY), limits=limits))
    assert ended.signal == signal.SIGKILL
    assert usage.oom_kills
    assert usage.peak_memory_bytes is not None
    assert 24 * MIB < usage.peak_memory_bytes <= 48 * MIB

    ended, usage = finish(containment, run(containment, ["sh", "-c", "kill -9 $$"], limits=limits))
    assert ended.signal == signal.SIGKILL
    assert usage.oom_kills == 0


def test_an_oom_kill_takes_the_whole_job_though_a_child_ate_it(containment: Containment) -> None:
    need(containment, "memory_max_bytes", "swap_max_bytes")
    limits = {"memory_max_bytes": 48 * MIB, "swap_max_bytes": 0}
    argv = ["sh", "-c", 'setsid "$@" & wait; exit 0', "sh", *python(EAT_MEMORY)]
    ended, usage = finish(containment, run(containment, argv, limits=limits))
    assert ended.signal == signal.SIGKILL
    assert usage.oom_kills


def test_a_kill_by_us_is_no_oom_kill(containment: Containment) -> None:
    need(containment, "memory_max_bytes")
    running = run(containment, ["sleep", "999"], limits={"memory_max_bytes": 48 * MIB})
    kill(containment, running.container)
    ended, usage = finish(containment, running)
    assert ended.signal == signal.SIGKILL
    assert usage.oom_kills == 0


def test_the_peak_is_that_of_the_whole_tree(containment: Containment, tmp_path: Path) -> None:
    need(containment, "memory_max_bytes")
    up = tmp_path / "up"
    # Each stays until both are there.
    eat = python(
        "import os, time\nkept = b'x' * 20 * 2**20\n"
        f"os.write(os.open('{up}', os.O_WRONLY | os.O_CREAT | os.O_APPEND), b'x')\n"
        f"while os.path.getsize('{up}') < 2: time.sleep(0.02)"
    )
    _, usage = finish(containment, run(containment, ["sh", "-c", '"$@" & "$@"; wait', "sh", *eat]))
    if usage.peak_memory_bytes is None:
        pytest.skip("memory.peak: the kernel has none (Linux 5.19)")
    assert usage.peak_memory_bytes > 40 * MIB


def test_pids_max_makes_fork_fail(containment: Containment) -> None:
    need(containment, "pids_max")
    code = (
        "import os, sys, time\n"
        "for number in range(20):\n"
        "    try:\n"
        "        if not os.fork(): time.sleep(99)\n"
        "    except BlockingIOError: sys.exit(number)\n"
    )
    ended, _ = finish(containment, run(containment, python(code), limits={"pids_max": 8}))
    assert ended.exit_code == 7


def test_cpu_max_throttles(containment: Containment) -> None:
    need(containment, "cpu_max_cores")
    running = run(containment, ["sh", "-c", "while :; do :; done"], limits={"cpu_max_cores": 0.2})
    assert file_of(containment, running, "cpu.max") == "20000 100000"
    eventually_sync(lambda: "nr_throttled 0" not in file_of(containment, running, "cpu.stat"), PATIENCE_S)
    kill(containment, running.container)
    end(containment, running)


def test_cpu_weight_shares_a_contended_cpu(containment: Containment) -> None:
    need(containment, "cpu_weight")
    spin = python("import os\nos.sched_setaffinity(0, [0])\nprint('up', flush=True)\nwhile True: pass")
    jobs = [run_until_up(containment, spin, f"w{weight}", {"cpu_weight": weight}) for weight in (100, 1000)]

    def cpu_ns() -> list[int]:
        return [containment.usage(job.container).cpu_ns or 0 for job in jobs]

    before = cpu_ns()

    def is_shared_out() -> bool:
        light, heavy = (after - start for after, start in zip(cpu_ns(), before, strict=True))
        return heavy > 3 * light + 300_000_000

    eventually_sync(is_shared_out, PATIENCE_S)
    for job in jobs:
        kill(containment, job.container)
        end(containment, job)


@pytest.mark.parametrize(
    "field, value, files, text",
    [
        ("memory_max_bytes", 64 * MIB, ["memory.max"], str(64 * MIB)),
        ("swap_max_bytes", 0, ["memory.swap.max"], "0"),
        ("cpu_max_cores", 1.5, ["cpu.max"], "150000 100000"),
        ("cpu_weight", 500, ["cpu.weight"], "500"),
        ("pids_max", 20, ["pids.max"], "20"),
        ("io_weight", 500, ["io.weight", "io.bfq.weight"], "default 500"),
        ("memory_high_bytes", 64 * MIB, ["memory.high"], str(64 * MIB)),
    ],
)
def test_the_controllers_are_told(
    containment: Containment, field: str, value: Any, files: list[str], text: str
) -> None:
    need(containment, field)
    running = run(containment, ["sleep", "999"], limits={field: value})
    folder = Path(containment.base_path) / running.container.name
    assert text in [(folder / file).read_text().strip() for file in files if (folder / file).exists()]
    kill(containment, running.container)
    end(containment, running)


def test_a_value_the_kernel_refuses_is_named_and_nothing_is_left(containment: Containment) -> None:
    need(containment, "cpu_weight")
    with pytest.raises(Exception, match=r"^cpu_weight: cannot be enforced: cpu.weight refused 99999: "):
        containment.create("job", {"cpu_weight": 99_999})
    assert not containment.strangers()
