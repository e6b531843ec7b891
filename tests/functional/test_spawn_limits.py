"""Limits and identity of a spawned process."""

from __future__ import annotations

import grp
import os
import pwd
import resource
import shutil
from pathlib import Path

import pytest

from tests.support.programs import python
from tests.support.spawn_limits import NOBODY, landlock, outcome_without_privileges
from tests.support.spawning import STATUS, Launchpad, needs_root, status_of_job
from worker_svc.job import Identity
from worker_svc.job.limits import RLIMIT_NAMES
from worker_svc.supervisor.spawn import SpawnFailed
from worker_svc.supervisor.spawn.steps import RLIMITS

# --- limits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RLIMIT_NAMES)
def test_each_rlimit(pad: Launchpad, name: str) -> None:
    label = {
        "as": "Max address space", "core": "Max core file size", "cpu": "Max cpu time", "data": "Max data size",
        "fsize": "Max file size", "locks": "Max file locks", "memlock": "Max locked memory",
        "msgqueue": "Max msgqueue size", "nice": "Max nice priority", "nofile": "Max open files",
        "nproc": "Max processes", "rss": "Max resident set", "rtprio": "Max realtime priority",
        "rttime": "Max realtime timeout", "sigpending": "Max pending signals", "stack": "Max stack size",
    }[name]  # fmt: skip
    soft = 512 * 1024 * 1024 if name in ("as", "data", "stack") else 1000
    hard = soft + 1
    hard_now = resource.prlimit(0, RLIMITS[name])[1]
    if hard_now != -1:  # to raise it would take a privilege that not even every root has
        soft, hard = min(soft, hard_now), min(hard, hard_now)
    ended = pad.run("cat", "/proc/self/limits", limits={"rlimits": {name: (soft, hard)}})
    line = next(line for line in ended.output.splitlines() if line.startswith(label))
    assert line[len(label) :].split()[:2] == [str(soft), str(hard)]


def test_an_unlimited_and_a_soft_limit(pad: Launchpad) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    ended = pad.run("sh", "-c", "ulimit -Sn; ulimit -Hn", limits={"rlimits": {"nofile": (20, None), "cpu": (-1, -1)}})
    assert ended.output.split() == ["20", str(hard) if hard != -1 else "unlimited"]


@pytest.mark.parametrize("size", [64 * 1024, 16 * 1024 * 1024])
def test_a_small_address_space_is_the_jobs_and_not_the_spawners(pad: Launchpad, size: int) -> None:
    """The pure-Python spawner's launcher itself needs more."""
    limits = {"rlimits": {"as": (size, size), "data": (size, size)}}
    if size < 1024 * 1024:  # not enough for any program: either execve says so, or the kernel kills what it has begun
        try:
            said = str(pad.run("true", limits=limits).exit_code)
        except SpawnFailed as failure:
            said = str(failure)
        assert said.startswith(("-", "limits.rlimits: there is not enough memory", "command: the process was ended"))
    else:
        assert pad.run("sh", "-c", "ulimit -v", limits=limits).output == f"{size // 1024}\n"


def test_limits_are_enforced_by_the_kernel(pad: Launchpad, tmp_path: Path) -> None:
    limits = {"rlimits": {"fsize": (4096, 4096), "core": (0, 0)}}
    assert pad.run("head", "-c", "10000", "/dev/zero", limits=limits).exit_code == -25  # SIGXFSZ
    burn = python("import time\nwhile time.process_time() < 5: pass")
    assert pad.run(*burn, limits={"rlimits": {"cpu": (1, 1), "core": (0, 0)}}).exit_code == -9


def test_nice_umask_affinity_and_oom_score(pad: Launchpad) -> None:
    cpu = max(os.sched_getaffinity(0))
    limits = {"nice": 7, "umask": 0o027, "cpu_affinity": (cpu,), "oom_score_adj": 321}
    script = "nice; umask; cat /proc/self/oom_score_adj; grep Cpus_allowed_list: /proc/self/status | cut -f2"
    assert pad.run("sh", "-c", script, limits=limits).output.split() == ["7", "0027", "321", str(cpu)]
    assert Path("/proc/self/oom_score_adj").read_text() == "0\n"  # ours, whose memory a vfork child shares
    assert (os.nice(0), os.sched_getaffinity(0) >= {cpu}) == (0, True)


def test_no_limit_is_asked_for_none_is_changed(pad: Launchpad) -> None:
    ours = Path("/proc/self/limits").read_text()
    assert pad.run("cat", "/proc/self/limits").output == ours


@pytest.mark.parametrize("cpus", [(8000,), (0, 8000)])
def test_cpus_that_are_not_there(pad: Launchpad, cpus: tuple[int, ...]) -> None:
    """The kernel drops them silently as long as one is left."""
    with pytest.raises(
        SpawnFailed, match=r"^limits.cpu_affinity: not all of these CPUs can be used here; the supervisor"
    ):
        pad.run("true", limits={"cpu_affinity": cpus})


def test_a_hard_limit_cannot_be_raised_without_privilege(pad: Launchpad) -> None:
    said = outcome_without_privileges(
        pad, "limits={'rlimits': {'nofile': (512, 1024)}}", "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 512))"
    )
    assert said == (
        "limits.rlimits.nofile: cannot be raised above the hard limit here, 512: that needs CAP_SYS_RESOURCE"
    )
    soft = outcome_without_privileges(
        pad, "limits={'rlimits': {'nofile': (513, None)}}", "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 512))"
    )
    assert soft == "limits.rlimits.nofile: the soft limit cannot exceed the hard limit here, 512"


@pytest.mark.parametrize(
    "fields,said",
    [
        ("limits={'nice': -5}", "limits.nice: -5 is below the supervisor's own: that needs CAP_SYS_NICE"),
        ("limits={'oom_score_adj': -5}", "limits.oom_score_adj: cannot be lowered without CAP_SYS_RESOURCE"),
        ("identity=Identity('65534', '65534', ())", "identity.user: running as another user needs root"),
        ("identity=Identity('', '65534', ())", "identity.groups: running as another user or group needs root"),
        pytest.param(
            "identity=Identity(no_new_privs=False), sandbox=Sandbox(('/',))",
            "sandbox.read_only_paths: Landlock needs identity.no_new_privs, or CAP_SYS_ADMIN",
            marks=landlock,
        ),
    ],
)
def test_what_needs_privilege_is_named(pad: Launchpad, fields: str, said: str) -> None:
    assert outcome_without_privileges(pad, fields).startswith(said)


# --- identity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "identity,said",
    [
        (Identity("no-such-user"), "identity.user: there is no user 'no-such-user' on this machine"),
        (Identity("nobody", "no-such-group"), "identity.group: there is no group 'no-such-group'"),
        (Identity("nobody", groups=("no-such-group",)), "identity.groups: there is no group 'no-such-group'"),
        (Identity("4242421"), "identity.group: name it: user 4242421 has no entry that tells its primary group"),
        (Identity("4294967295", "0"), "identity.user: there is no user '4294967295'"),  # -1: "as it is", root
    ],
)
def test_who_does_not_exist(pad: Launchpad, identity: Identity, said: str) -> None:
    with pytest.raises(SpawnFailed, match=said):
        pad.run("true", identity=identity)


def test_to_be_who_we_are_needs_no_privilege(pad: Launchpad) -> None:
    said = outcome_without_privileges(
        pad, "identity=Identity(str(os.getuid()), str(os.getgid()), tuple(map(str, os.getgroups())))"
    )
    assert said.split()[-1] == str(os.getuid())


def user_with_groups() -> tuple[str, int, list[int]]:
    """A user, its primary group and all its groups; one with supplementary ones if there is any."""
    found = []
    for entry in pwd.getpwall():
        groups = sorted(set(os.getgrouplist(entry.pw_name, entry.pw_gid)))
        if entry.pw_uid:
            found.append((len(groups), entry.pw_name, entry.pw_gid, groups))
    _, name, gid, groups = max(found)
    return name, gid, groups


@needs_root
def test_another_user_with_its_groups(pad: Launchpad) -> None:
    name, gid, groups = user_with_groups()
    uid = pwd.getpwnam(name).pw_uid
    status = status_of_job(pad.run(*STATUS, identity=Identity(name)))
    assert status["Uid"].split() == [str(uid)] * 4
    assert status["Gid"].split() == [str(gid)] * 4
    assert sorted(map(int, status["Groups"].split())) == groups
    for kind in ("CapPrm", "CapEff", "CapAmb", "CapInh"):
        assert int(status[kind], 16) == 0
    assert os.getresuid() == (0, 0, 0)  # none of our threads has changed


@needs_root
def test_groups_as_given(pad: Launchpad) -> None:
    other = grp.getgrnam("adm").gr_gid
    for identity, gid, groups in (
        (Identity("nobody", "adm", ("4242", "adm")), other, [other, 4242]),
        (Identity("12345", "12346", ()), 12346, []),
        (Identity("12345", "12346"), 12346, [12346]),
    ):
        status = status_of_job(pad.run(*STATUS, identity=identity))
        assert status["Gid"].split() == [str(gid)] * 4
        assert sorted(map(int, status["Groups"].split())) == sorted(groups)
    status = status_of_job(pad.run(*STATUS, identity=Identity(group="adm")))
    assert (status["Uid"].split()[0], status["Gid"].split()[0]) == ("0", str(other))


@needs_root
def test_what_another_user_gets(pad: Launchpad) -> None:
    """Its home by the user database where asked; stdin it may read; output files that are its own."""
    plan = pad.plan(
        "sh", "-c", "cat; cat /dev/stdin </dev/null; echo $HOME $USER $LOGNAME; echo err >&2",
        identity=Identity("daemon"), stdin=b"text\n", user_env=("HOME", "LOGNAME"),
    )  # fmt: skip
    entry = pwd.getpwnam("daemon")
    assert pad.run_plan(plan).output == f"text\n{entry.pw_dir} daemon\nerr\n"
    assert Path(plan.stdout_path).stat().st_uid == pwd.getpwnam("daemon").pw_uid
    with pytest.raises(SpawnFailed, match=r"identity.user: 12345 has no entry that tells HOME: set it in env"):
        pad.run("true", identity=Identity("12345", "12345"), user_env=("HOME",))


@needs_root
def test_working_directory_and_program_are_reached_as_that_user(pad: Launchpad, open_dir: Path) -> None:
    closed = open_dir / "closed"
    closed.mkdir(0o700)
    shutil.copy("/bin/true", closed / "tool")
    with pytest.raises(SpawnFailed, match=rf"^cwd: {closed}: permission denied \(as user nobody\)"):
        pad.run("true", cwd=str(closed), identity=Identity("nobody"))
    with pytest.raises(SpawnFailed, match=r"^command: .*/tool: [Pp]ermission denied \(as user nobody\)"):
        pad.run(str(closed / "tool"), identity=Identity("nobody"))
    # what the user may not run is passed over, as execvp(3) does
    shutil.copy("/bin/echo", open_dir / "tool")
    path = f"{closed}:{open_dir}"
    assert pad.run("tool", "here", identity=Identity("nobody"), env={"PATH": path}).output == "here\n"


@needs_root
@pytest.mark.parametrize("no_new_privs", [True, False])
def test_a_setuid_program_gains_nothing_unless_allowed(pad: Launchpad, open_dir: Path, no_new_privs: bool) -> None:
    program = open_dir / "id"
    shutil.copy("/usr/bin/id", program)
    program.chmod(0o4755)
    identity = NOBODY._replace(no_new_privs=no_new_privs)
    assert pad.run(str(program), "-u", identity=identity).output == ("65534\n" if no_new_privs else "0\n")


def test_no_new_privs(pad: Launchpad) -> None:
    for wanted in (True, False, True):
        status = status_of_job(pad.run(*STATUS, identity=Identity(no_new_privs=wanted)))
        assert status["NoNewPrivs"] == str(int(wanted))
    assert "NoNewPrivs:\t0" in Path("/proc/self/status").read_text()
