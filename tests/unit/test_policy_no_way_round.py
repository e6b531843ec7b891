"""There is no way round the policy, and what is run is what was checked."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.policies import is_allowed, judge, outside, script
from tests.support.spawning import Launchpad
from worker_svc.access.policy.command_policy import Judged
from worker_svc.job import Identity, JobSpec
from worker_svc.supervisor.spawn import SpawnFailed

# No way round


Escape = Callable[[Path, Path], JobSpec]


def _link(jobs: Path, evil: Path) -> JobSpec:
    (jobs / "link.sh").symlink_to(evil)
    return JobSpec("sh", str(jobs / "link.sh"))


def _link_of_a_folder(jobs: Path, evil: Path) -> JobSpec:
    (jobs / "folder").symlink_to(evil.parent)
    return JobSpec("sh", str(jobs / "folder" / "evil.sh"))


def _chain_of_links(jobs: Path, evil: Path) -> JobSpec:
    (jobs / "1").symlink_to("2")
    (jobs / "2").symlink_to("../jobs/3")
    (jobs / "3").symlink_to(evil)
    return JobSpec("sh", str(jobs / "1"))


def _through_proc_root(jobs: Path, evil: Path) -> JobSpec:
    return JobSpec("sh", f"/proc/self/root{evil}")


def _through_proc_cwd(jobs: Path, evil: Path) -> JobSpec:
    return JobSpec("sh", "/proc/self/cwd/evil.sh", cwd=str(evil.parent))


def _through_proc_fd(jobs: Path, evil: Path) -> JobSpec:
    fd = os.open(evil, os.O_RDONLY)
    return JobSpec("sh", f"/proc/self/fd/{fd}")


def _memory_file(jobs: Path, evil: Path) -> JobSpec:
    fd = os.memfd_create(f"{jobs}/ok.sh")
    os.write(fd, b"echo memory")
    return JobSpec("sh", f"/proc/self/fd/{fd}")


def _fifo(jobs: Path, evil: Path) -> JobSpec:
    os.mkfifo(jobs / "fifo")
    return JobSpec("sh", str(jobs / "fifo"))


def _removed_file(jobs: Path, evil: Path) -> JobSpec:
    fd = os.open(script(jobs / "gone.sh", "gone"), os.O_RDONLY)
    (jobs / "gone.sh").unlink()
    return JobSpec("sh", f"/proc/self/fd/{fd}")


def _removed_file_with_a_double(jobs: Path, evil: Path) -> JobSpec:
    """What the kernel calls it is the name of another file."""
    script(jobs / "gone.sh (deleted)", "inside")
    return _removed_file(jobs, evil)


def _hard_link_outside(jobs: Path, evil: Path) -> JobSpec:
    (evil.parent / "hard.sh").hardlink_to(jobs / "ok.sh")
    return JobSpec("sh", str(evil.parent / "hard.sh"))


ESCAPES: dict[str, Escape] = {
    "absolute": lambda jobs, evil: JobSpec("sh", str(evil)),
    "dots": lambda jobs, evil: JobSpec("sh", f"{jobs}/../outside/evil.sh"),
    "dots in cwd": lambda jobs, evil: JobSpec("sh", "../outside/evil.sh", cwd=str(jobs)),
    "dots after a file": lambda jobs, evil: JobSpec("sh", f"{jobs}/ok.sh/../../outside/evil.sh"),
    "cwd": lambda jobs, evil: JobSpec("sh", "evil.sh", cwd=str(evil.parent)),
    "the root's name as a prefix": lambda jobs, evil: JobSpec("sh", f"{_sibling(jobs)}/evil.sh"),
    "the root itself": lambda jobs, evil: JobSpec("sh", str(jobs)),
    "an option": lambda jobs, evil: JobSpec("sh", "-c", ("echo outside",)),
    "an option as the first argument": lambda jobs, evil: JobSpec("sh", args=("-c", "echo outside")),
    "standard input": lambda jobs, evil: JobSpec("sh", stdin_size_bytes=12),
    "standard input by its name": lambda jobs, evil: JobSpec("sh", "/dev/stdin"),
    "a fifo": _fifo,
    "nul": lambda jobs, evil: JobSpec("sh", f"{jobs}/ok.sh\0{evil}"),
    "overlong": lambda jobs, evil: JobSpec("sh", f"{jobs}/" + "./" * 3000 + "ok.sh"),
    "overlong name": lambda jobs, evil: JobSpec("sh", f"{jobs}/" + "x" * 300),
    "not there": lambda jobs, evil: JobSpec("sh", f"{jobs}/nothing.sh"),
    "empty": lambda jobs, evil: JobSpec("sh", "", ("",)),
    "link": _link,
    "link of a folder": _link_of_a_folder,
    "chain of links": _chain_of_links,
    "proc root": _through_proc_root,
    "proc cwd": _through_proc_cwd,
    "proc fd": _through_proc_fd,
    "memory": _memory_file,
    "removed": _removed_file,
    "removed, with a double": _removed_file_with_a_double,
    "hard link": _hard_link_outside,
}


def _sibling(jobs: Path) -> Path:
    sibling = jobs.with_name("jobs-evil")
    sibling.mkdir()
    script(sibling / "evil.sh", "outside")
    return sibling


@pytest.mark.parametrize("name", ESCAPES)
def test_no_script_from_outside(name: str, script_root: Path, tmp_path: Path) -> None:
    spec = ESCAPES[name](script_root, outside(tmp_path))
    assert not is_allowed(spec, script_roots=[str(script_root)])


@pytest.mark.parametrize(
    "name", ["absolute", "dots", "link", "chain of links", "link of a folder", "proc root", "proc fd", "hard link"]
)
def test_no_command_from_outside(name: str, script_root: Path, tmp_path: Path) -> None:
    spec = ESCAPES[name](script_root, outside(tmp_path))
    command = JobSpec(spec.path, cwd=spec.cwd)
    assert not is_allowed(command, allow_commands=[f"{script_root}/**"])
    assert not is_allowed(command, script_roots=[str(script_root)])
    by_path = JobSpec("tool", env={"PATH": str(Path(spec.path).parent)})
    assert not is_allowed(by_path, allow_commands=[f"{script_root}/**"], allow_env=["PATH"])


def test_a_hard_link_of_a_denied_command(tmp_path: Path) -> None:
    denied = script(tmp_path / "denied", "x")
    (tmp_path / "hard").hardlink_to(denied)
    (tmp_path / "soft").symlink_to(denied)
    for name in ("denied", "hard", "soft"):
        assert not is_allowed(JobSpec(str(tmp_path / name)), deny_commands=[str(denied)]), name


def test_the_interpreter_of_the_worker_by_proc_is_what_it_is() -> None:
    real = os.path.realpath(sys.executable)
    judged = judge(JobSpec("/proc/self/exe"), allow_commands=[real])
    # It has another name than the one allowed: so it is not.
    assert not judged.decision.allowed
    assert judge(JobSpec("/proc/self/exe"), allow_commands=["/**"]).checked[0].path == real


# What is run is what was checked


def run(pad: Launchpad, spec: JobSpec, judged: Judged, between: Callable[[], object] = lambda: None) -> tuple[int, str]:
    assert judged.decision.allowed, judged.decision
    assert not judged.problem
    checked = spec._replace(checked=judged.checked)
    plan = pad.plan(*checked.checked_argv, checked=checked.checked, cwd=spec.cwd or "/", identity=spec.identity)
    between()
    ended = pad.run_plan(plan)
    return ended.exit_code, ended.output


def test_what_was_checked_is_run(pad: Launchpad, script_root: Path) -> None:
    spec = JobSpec("sh", "ok.sh", cwd=str(script_root))
    assert run(pad, spec, judge(spec, script_roots=[str(script_root)])) == (0, "inside\n")
    # A script that is the command, which cannot be executed by its descriptor.
    spec = JobSpec("./ok.sh", cwd=str(script_root))
    assert run(pad, spec, judge(spec, script_roots=[str(script_root)])) == (0, "inside\n")
    spec = JobSpec("printf", args=("%s", "x"))
    assert run(pad, spec, judge(spec, allow_commands=["/**"])) == (0, "x")


def test_a_program_gets_no_descriptor_of_the_check(pad: Launchpad) -> None:
    spec = JobSpec("sh", args=("-c", "ls /proc/$$/fd"))
    status, output = run(pad, spec, judge(spec, allow_commands=["/**"]))
    assert (status, set(output.split())) == (0, {"0", "1", "2"})


def test_the_name_that_a_program_is_called_by_stays(pad: Launchpad) -> None:
    spec = JobSpec("sh", args=("-c", "cat /proc/$$/cmdline"))
    assert run(pad, spec, judge(spec, allow_commands=["/**"]))[1].startswith("sh\0")


@pytest.mark.parametrize("what", ["command", "path"])
@pytest.mark.parametrize("how", ["replaced", "link swapped", "written to", "folder swapped", "removed"])
def test_what_changes_between_check_and_exec_is_not_run(
    pad: Launchpad, script_root: Path, tmp_path: Path, what: str, how: str
) -> None:
    evil = outside(tmp_path)
    folder = script_root / "folder"
    folder.mkdir()
    file = script(folder / "x.sh", "inside")
    link = script_root / "link.sh"
    link.symlink_to(file)
    named = link if how == "link swapped" else file
    spec = JobSpec(str(named)) if what == "command" else JobSpec("sh", str(named))
    judged = judge(spec, script_roots=[str(script_root)])

    def change() -> None:
        match how:
            case "replaced":
                shutil.copy(evil, folder / "new")
                (folder / "new").rename(file)
            case "link swapped":
                link.unlink()
                link.symlink_to(evil)
            case "written to":
                file.write_text(evil.read_text())
            case "folder swapped":
                folder.rename(script_root / "old")
                (evil.parent / "x.sh").write_bytes(evil.read_bytes())
                (evil.parent / "x.sh").chmod(0o755)
                folder.symlink_to(evil.parent)
            case "removed":
                file.unlink()

    if how == "link swapped":  # the link was not what was checked, but where it led
        assert run(pad, spec, judged, change) == (0, "inside\n")
        return
    why = "no such file" if how == "removed" else "changed or replaced"
    with pytest.raises(SpawnFailed, match=f"^{what}: {file}.*{why}"):
        run(pad, spec, judged, change)


@pytest.mark.parametrize("how", ["link", "another directory", "moved, and a link to it", "moved below", "removed"])
def test_where_it_was_to_run_and_what_is_there_by_then(pad: Launchpad, script_root: Path, how: str) -> None:
    at = script_root / "above" / "at"
    at.mkdir(parents=True)
    spec = JobSpec("pwd", args=("-P",), cwd=str(at))
    judged = judge(spec, allow_cwd=[str(script_root / "above")])

    def change() -> None:
        match how:
            case "link":
                at.rename(script_root / "old")
                at.symlink_to("/etc")
            case "another directory":
                at.rename(script_root / "old")
                at.mkdir()
            case "moved, and a link to it":
                at.rename(script_root / "old")
                at.symlink_to(script_root / "old")
            case "moved below":
                at.parent.rename(script_root / "old")
                at.parent.symlink_to(script_root / "old")
            case "removed":
                shutil.rmtree(at)

    assert run(pad, spec, judged) == (0, f"{at}\n")
    assert run(pad, spec, judged, (at / "new").touch) == (0, f"{at}\n")
    why = "no such file" if how == "removed" else "was moved or replaced after the worker's policy allowed it"
    with pytest.raises(SpawnFailed, match=rf"^cwd: {at}.* ?{why}"):
        run(pad, spec, judged, change)


def test_a_directory_that_its_user_cannot_enter_is_none(pad: Launchpad, script_root: Path) -> None:
    """That it was opened by who may is no way in."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    script_root.chmod(0o700)
    spec = JobSpec("pwd", cwd=str(script_root), identity=Identity("nobody"))
    with pytest.raises(SpawnFailed, match="permission denied"):
        run(pad, spec, judge(spec, allow_cwd=[str(script_root)], allow_users=["nobody"]))


def test_a_file_that_others_link_to_meanwhile_is_not_run(pad: Launchpad, script_root: Path, tmp_path: Path) -> None:
    spec = JobSpec("sh", str(script_root / "ok.sh"))
    judged = judge(spec, script_roots=[str(script_root)])
    with pytest.raises(SpawnFailed, match="changed or replaced"):
        run(pad, spec, judged, lambda: (tmp_path / "hard").hardlink_to(script_root / "ok.sh"))
