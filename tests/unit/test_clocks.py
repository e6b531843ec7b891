"""A clock for ages, which nobody can set."""

from __future__ import annotations

from pathlib import Path

import pytest

from worker_svc.linux import clocks
from worker_svc.linux.clocks import NS_PER_S, SteadyClock
from worker_svc.record.reader import StoreReader
from worker_svc.record.writer import JobStore

HOUR_NS = 3600 * NS_PER_S
YEAR_NS = 365 * 24 * HOUR_NS


class Machine:
    """What the clocks of one say."""

    def __init__(self) -> None:
        self.boot_id = "first"
        self.wall_ns = 50 * YEAR_NS
        self.up_ns = 100 * HOUR_NS

    def reboot(self, boot_id: str, off_ns: int) -> None:
        self.boot_id, self.up_ns = boot_id, 0
        self.wall_ns += off_ns

    def run(self, ns: int) -> None:
        self.wall_ns += ns
        self.up_ns += ns


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(clocks, "boot_id", lambda: machine.boot_id)
    monkeypatch.setattr(clocks, "wall_ns", lambda: machine.wall_ns)
    monkeypatch.setattr(clocks, "_up_ns", lambda: machine.up_ns)
    return machine


def test_it_begins_as_the_wall_clock_and_goes_on_by_itself(machine: Machine) -> None:
    clock = SteadyClock(None)
    began_ns = machine.wall_ns
    assert clock.now_ns() == began_ns
    machine.run(HOUR_NS)
    machine.wall_ns += 10 * YEAR_NS
    assert clock.now_ns() == began_ns + HOUR_NS
    machine.wall_ns -= 20 * YEAR_NS
    assert clock.now_ns() == began_ns + HOUR_NS


def test_the_next_process_goes_on_with_it(machine: Machine) -> None:
    clock = SteadyClock(None)
    began_ns, kept = machine.wall_ns, clock.to_keep()
    machine.run(30 * 24 * HOUR_NS)
    machine.wall_ns += YEAR_NS
    assert SteadyClock(kept).now_ns() == began_ns + 30 * 24 * HOUR_NS


@pytest.mark.parametrize(
    "off_ns, counted_ns", [(8 * HOUR_NS, 8 * HOUR_NS), (YEAR_NS, 24 * HOUR_NS), (-YEAR_NS, 0), (0, 0)]
)
def test_while_the_machine_is_off_a_day_passes_at_most(machine: Machine, off_ns: int, counted_ns: int) -> None:
    clock = SteadyClock(None)
    at_ns, kept = machine.wall_ns, clock.to_keep()
    machine.reboot("second", off_ns)
    later = SteadyClock(kept)
    assert later.now_ns() == at_ns + counted_ns
    kept = later.to_keep()
    machine.run(HOUR_NS)
    machine.reboot("third", HOUR_NS)
    assert SteadyClock(kept).now_ns() == at_ns + counted_ns + 2 * HOUR_NS


def test_it_need_not_be_kept_often(machine: Machine) -> None:
    clock = SteadyClock(None)
    assert clock.to_keep()
    assert not clock.to_keep()
    machine.run(HOUR_NS)
    kept = clock.to_keep()
    assert kept
    assert not SteadyClock(kept).to_keep()
    machine.reboot("second", 0)
    assert SteadyClock(kept).to_keep()


def test_both_processes_read_the_same(machine: Machine, tmp_path: Path) -> None:
    store = JobStore(str(tmp_path))
    store.keep_clock()
    reader = StoreReader(str(tmp_path))
    machine.run(HOUR_NS)
    machine.wall_ns += YEAR_NS
    assert reader.steady_ns() == store.clock.now_ns()
    reader.close()
    store.close()
