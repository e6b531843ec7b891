"""Where the base group is made: as root, with a delegated subtree, and where nothing was delegated."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support.contained import contain, skip_unless, stop_being_subreaper
from tests.support.waiting import PATIENCE_S, eventually_sync
from worker_svc.job.limits import OF_TREE
from worker_svc.supervisor.containment import CGROUP, hierarchy

ROOT: Final = str(Path(__file__).parents[2])
NOBODY: Final = 65534
# A supervisor in the group it is told to join, as the user it is told to be; it runs a job to its end.
SUPERVISOR: Final = """
import ctypes, json, os, resource, sys  # here, while the user may read them
sys.path.insert(0, sys.argv[1])
from tests.support import contained
open(sys.argv[2] + "/cgroup.procs", "w").write("0")
if int(sys.argv[3]):
    os.setgroups([]); os.setgid(int(sys.argv[3])); os.setuid(int(sys.argv[3]))
found = contained.contain(sys.argv[4], "feed", sys.argv[5])
job = contained.run(found, ["sleep", "999"])
found.kill(job.container)
job.wait_for_leader()
gone = job.oracle.is_gone(5)
contained.end(found, job)
print(json.dumps({
    "level": found.level, "reason": found.reason, "base": found.base_path, "gone": gone,
    "unenforceable": found.unenforceable(),
    "own": [line[3:-1] for line in open("/proc/self/cgroup") if line.startswith("0::")][0],
}))
found.close()
"""


@pytest.fixture
def group() -> Iterator[Path]:
    """A group of our own making, below the place where we may make some."""
    skip_unless(CGROUP)
    if os.geteuid():
        pytest.skip("only root can make groups for others")
    mount = hierarchy._mounts()[0]
    own = hierarchy._path_of(mount, hierarchy._own_group() or "/")
    assert own
    path = Path(own) / f"test-{secrets.token_hex(4)}"
    path.mkdir()
    for controller in hierarchy.CONTROLLERS:
        with suppress(OSError):
            (path.parent / "cgroup.subtree_control").write_text(f"+{controller}")
    yield path
    deadline_s = time.monotonic() + PATIENCE_S
    for folder in [*sorted((one for one in path.rglob("*") if one.is_dir()), reverse=True), path]:
        while folder.exists() and time.monotonic() < deadline_s:
            with suppress(OSError):
                folder.rmdir()
    assert not path.exists()


def supervise(group: Path, user: int = 0, level: str = "", base: str = "") -> dict[str, Any]:
    ended = subprocess.run(
        [sys.executable, "-c", SUPERVISOR, ROOT, str(group), str(user), level, base],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    assert found["gone"]
    return found


def controllers_of(group: Path) -> set[str]:
    return set((group / "cgroup.controllers").read_text().split()) & set(hierarchy.CONTROLLERS)


def delegate(group: Path, user: int) -> None:
    """As systemd does it (https://systemd.io/CGROUP_DELEGATION)."""
    os.setxattr(group, "user.delegate", b"1")
    for name in ("", "cgroup.procs", "cgroup.subtree_control", "cgroup.threads"):
        os.chown(group / name, user, user)


def test_root_in_a_group_that_holds_only_us(group: Path) -> None:
    found = supervise(group)
    assert found["level"] == "cgroup"
    assert found["base"] == f"{group}/worker-svc-feed"
    assert not any("not ours to move" in why for why in found["unenforceable"].values())
    if controllers_of(group):  # to enable them, it left the group
        assert found["own"].endswith(f"/{group.name}/{hierarchy.LEAF}")


def test_processes_of_others_are_not_moved_for_the_sake_of_controllers(group: Path) -> None:
    with subprocess.Popen(["sh", "-c", f"echo 0 > {group}/cgroup.procs; exec sleep 999"]) as other:
        eventually_sync(lambda: (group / "cgroup.procs").read_text().strip() == str(other.pid))
        found = supervise(group)
        assert (group / "cgroup.procs").read_text().strip() == str(other.pid)
        other.kill()
    assert found["level"] == "cgroup"
    assert found["own"].endswith(f"/{group.name}")
    for field in (limit.name for limit in OF_TREE):
        assert field in found["unenforceable"]


def test_a_user_with_a_delegated_group(group: Path) -> None:
    delegate(group, NOBODY)
    found = supervise(group, NOBODY)
    assert found["level"] == "cgroup", found["reason"]
    assert found["base"] == f"{group}/worker-svc-feed"
    if controllers_of(group):
        assert found["own"].endswith(f"/{group.name}/{hierarchy.LEAF}")
    # Its successor starts where it was put, and finds the same base.
    again = supervise(group / hierarchy.LEAF, NOBODY) if controllers_of(group) else supervise(group, NOBODY)
    assert again["base"] == found["base"]


def test_a_leaf_of_what_was_delegated(group: Path) -> None:
    """systemd's DelegateSubgroup=."""
    delegate(group, NOBODY)
    leaf = group / "supervisor"
    leaf.mkdir()
    for name in ("", "cgroup.procs"):
        os.chown(leaf / name, NOBODY, NOBODY)
    found = supervise(leaf, NOBODY)
    assert found["level"] == "cgroup", found["reason"]
    assert found["base"] == f"{group}/worker-svc-feed"
    assert found["own"].endswith(f"/{group.name}/supervisor")


def test_a_user_to_whom_nothing_was_delegated(group: Path) -> None:
    found = supervise(group, NOBODY)
    assert found["level"] == "subreaper"
    assert "permission denied" in found["reason"]
    assert set(found["unenforceable"]) == {limit.name for limit in OF_TREE}


def test_the_base_of_an_earlier_supervisor_is_used_again_from_elsewhere(group: Path) -> None:
    earlier = group / "worker-svc-feed"
    earlier.mkdir()
    elsewhere = group / "elsewhere"
    elsewhere.mkdir()
    assert supervise(elsewhere, base=str(earlier))["base"] == str(earlier)


def test_paths_in_the_mount_table_are_decoded() -> None:
    assert hierarchy._unescape(r"/a\040b\011c\134d") == "/a b\tc\\d"
    mount = hierarchy._Mount("/outer", "/mnt/cg")
    assert hierarchy._path_of(mount, "/outer/x") == "/mnt/cg/x"
    assert hierarchy._path_of(mount, "/outer") == "/mnt/cg"
    assert hierarchy._path_of(mount, "/outerx") is None
    assert hierarchy._proc_path(mount, "/mnt/cg/x") == "/outer/x"


def test_a_known_base_of_another_state_is_not_used(group: Path) -> None:
    """The state directory was copied: the jobs in there are the original's."""
    original = group / "worker-svc-original"
    (original / "job-a").mkdir(parents=True)
    lives = os.open(original, os.O_RDONLY)
    fcntl.flock(lives, fcntl.LOCK_SH)
    assert supervise(group, base=str(original))["base"] == f"{group}/worker-svc-feed"
    os.close(lives)
    assert (original / "job-a").exists()


def test_abandoned_bases_are_removed_and_others_kept(group: Path) -> None:
    for name in ("worker-svc-abandoned/job-ended", "worker-svc-jobs/job-a", "worker-svc-lives/job-a"):
        (group / name).mkdir(parents=True)
    lives = os.open(group / "worker-svc-lives", os.O_RDONLY)
    fcntl.flock(lives, fcntl.LOCK_SH)
    with subprocess.Popen(["sh", "-c", f"echo 0 > {group}/worker-svc-jobs/job-a/cgroup.procs; exec sleep 999"]) as job:
        eventually_sync(lambda: (group / "worker-svc-jobs/job-a/cgroup.procs").read_text())
        supervise(group)
        job.kill()
    os.close(lives)
    left = {one.name for one in group.iterdir() if one.name.startswith("worker-svc-")}
    assert left - {hierarchy.LEAF} == {"worker-svc-jobs", "worker-svc-lives"}


def test_a_base_that_an_operator_removed_is_made_again() -> None:
    skip_unless(CGROUP)
    containment = contain("cgroup")
    try:
        Path(containment.base_path).rmdir()
        assert containment.remove(containment.create("job"))
    finally:
        containment.close()
        stop_being_subreaper()
