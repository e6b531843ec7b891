"""Under a sandbox the house is out of reach: its directory, its sockets, its processes. Whoever the job runs as."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support.kernel import landlock_abi
from tests.support.waiting import eventually_sync
from tests.support.workers import PATIENCE_S, Refused, SupervisorProcess
from worker_svc.job import Outcome
from worker_svc.record import paths
from worker_svc.supervisor.spawn import IMPLEMENTATION, NATIVE, PYTHON

SYSTEM: Final = ("/usr", "/bin", "/lib", "/lib64", "/etc", sys.base_prefix)
PATHS: Final = [path for path in dict.fromkeys(SYSTEM) if Path(path).exists()]
SANDBOXES: Final[dict[str, dict[str, Any]]] = {
    "paths": {"read_only_paths": PATHS},
    "everything may be read": {"read_only_paths": ["/"]},
    "private_tmp": {"private_tmp": True},
    "no_network": {"no_network": True},
    "all": {"read_only_paths": PATHS, "private_tmp": True, "no_network": True},
}
# What a worker in a container has: no right to make namespaces, but one of its own.
FEW_PRIVILEGES: Final = ["setpriv", "--bounding-set=-all,+dac_override,+dac_read_search,+setfcap", "--inh-caps=-all"]
# Where no mount namespace can be had, and none is made for another reason: what Landlock does not govern, or allows.
NOT_HIDDEN: Final = {"chmod a file", "connect", "go in and connect"}
LEFT: Final = {"paths": NOT_HIDDEN, "everything may be read": {*NOT_HIDDEN, "list", "read"}}
TRY: Final = """
import os, resource, socket, sys
state, supervisor, outsider, abstract = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]

def attempt(name, do):
    try:
        do()
        print(name)
    except OSError:
        pass

def connect(address):
    s = socket.socket(socket.AF_UNIX)
    s.connect(address)

def look():
    if not os.listdir(state):
        raise OSError

attempt("list", look)
attempt("read", lambda: open(state + "/supervisor.key").read())
attempt("write", lambda: open(state + "/new", "w"))
attempt("chmod a file", lambda: os.chmod(state + "/jobs.sqlite3", 0o644))
attempt("connect", lambda: connect(state + "/supervisor.sock"))
attempt("go in and connect", lambda: (os.chdir(state), connect("supervisor.sock")))
attempt("signal the supervisor", lambda: os.kill(supervisor, 0))
attempt("signal another", lambda: os.kill(outsider, 0))
attempt("limit the supervisor", lambda: resource.prlimit(supervisor, resource.RLIMIT_CORE, (0, 0)))
attempt("limit another", lambda: resource.prlimit(outsider, resource.RLIMIT_CORE, (0, 0)))
attempt("look into the supervisor", lambda: open(f"/proc/{supervisor}/mem").read(1))
attempt("enter by the supervisor", lambda: os.listdir(f"/proc/{supervisor}/root{state}"))
attempt("connect to an abstract socket", lambda: connect("\\0" + abstract))
os.kill(os.getpid(), 0)
resource.prlimit(0, resource.RLIMIT_CORE, (0, 0))
resource.prlimit(os.getpid(), resource.RLIMIT_CORE)
child = os.fork()
if child == 0:
    os.execvp("sleep", ["sleep", "99"])
os.kill(child, 9)
os.waitpid(child, 0)
print("done")
"""


@pytest.fixture(params=["root", "few privileges"])
def unstarted(request: pytest.FixtureRequest, tmp_path: Path) -> SupervisorProcess:
    supervisor = SupervisorProcess(tmp_path / "state")
    if request.param == "few privileges":
        if os.geteuid() != 0:
            pytest.skip("takes root to have less than root has")
        supervisor.run_as = FEW_PRIVILEGES
    return supervisor


@pytest.mark.parametrize("sandbox", SANDBOXES)
@pytest.mark.parametrize("spawner", [NATIVE, PYTHON])
@pytest.mark.skipif(landlock_abi() < 6, reason="signals have no scope before Landlock's ABI 6 (Linux 6.12)")
def test_nothing_of_the_house_is_in_reach(unstarted: SupervisorProcess, spawner: str, sandbox: str) -> None:
    if spawner == NATIVE != IMPLEMENTATION:
        pytest.skip("the native spawner is not built: python setup.py build_ext --inplace")
    unstarted.options = ("--spawner", spawner)
    with unstarted, socket.socket(socket.AF_UNIX) as listener:
        abstract = f"worker-svc-test-{os.getpid()}"
        listener.bind(f"\0{abstract}")
        listener.listen()
        given = [str(unstarted.path), str(unstarted.pid), str(os.getpid()), abstract]
        # Not .venv's link to it, which a private /tmp hides where this checkout is below /tmp.
        python = str(Path(sys.executable).resolve())
        ended = unstarted.finish("tries", [python, "-S", "-E", "-c", TRY, *given], sandbox=SANDBOXES[sandbox])
        said = unstarted.output("tries").decode()
        assert ended.outcome is Outcome.SUCCEEDED, (ended.reason, said)
        done = set(said.split("\n")[:-1])
        assert done == {"done"} | (LEFT.get(sandbox, set()) if unstarted.run_as else set())
        # Whatever it could reach, it was not let in.
        if "connect" in done:
            eventually_sync(lambda: "the peer is a job" in unstarted.log(), PATIENCE_S, "it is not noted")
        assert (unstarted.path / paths.KEY_NAME).exists()


def test_paths_of_the_house_are_refused(unstarted: SupervisorProcess) -> None:
    with unstarted:
        for field in ("read_only_paths", "read_write_paths"):
            for inside in ("", "/output", "/./output/../output"):
                path = f"{unstarted.path}{inside}"
                said = rf"sandbox\.{field}: entry 1 is in the worker's state directory"
                job_id = f"j-{field}-{len(inside)}"
                with pytest.raises(Refused, match=said):
                    unstarted.run(job_id, ["true"], sandbox={field: ["/usr", path]})


@pytest.mark.skipif(landlock_abi() < 3, reason="there is no Landlock with ABI 3 (Linux 6.2)")
@pytest.mark.parametrize("spawner", [NATIVE, PYTHON])
def test_no_link_that_a_job_has_made_widens_the_next_ones_sandbox(tmp_path: Path, spawner: str) -> None:
    if spawner == NATIVE != IMPLEMENTATION:
        pytest.skip("the native spawner is not built: python setup.py build_ext --inplace")
    work = tmp_path / "work"
    (work / "tools" / "bin").mkdir(parents=True)
    (tmp_path / "link").symlink_to(work)  # the administrator's, in reach of no job
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for writable in (work, tmp_path / "link"):
        supervisor = SupervisorProcess(tmp_path / f"state-{writable.name}")
        supervisor.options = ("--spawner", spawner)
        sandbox = {"read_only_paths": [*PATHS, f"{writable}/tools/bin"], "read_write_paths": [str(writable)]}
        with supervisor:
            swap = f"cd {writable} && ls tools/bin && mv tools old && ln -s {secret.parent} tools"
            ended = supervisor.finish("swaps", ["sh", "-c", swap], sandbox=sandbox)
            assert ended.outcome is Outcome.SUCCEEDED, supervisor.output("swaps")
            (tmp_path / "bin").mkdir(exist_ok=True)
            with pytest.raises(
                Refused, match=r"sandbox\.read_only_paths: entry \d+: .*symbolic link below a path that jobs"
            ):
                supervisor.run("next", ["cat", str(secret)], sandbox=sandbox)
        (work / "tools").unlink()
        (work / "old").rename(work / "tools")
