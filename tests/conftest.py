"""The fixtures that tests have in common.

A module that wants another worker or supervisor than the plain one says only in what it differs: it has its own
`worker_keys`, `shared_keys`, `supervisor_options` or `supervisor_settings`.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import programs
from tests.support.contained import LEVELS, contained, skip_unless
from tests.support.filesystems import mounted
from tests.support.spawning import Launchpad, skip_unless_built
from worker_svc.supervisor.containment import CGROUP, SUBREAPER, Containment
from worker_svc.supervisor.spawn import NATIVE, PYTHON

# The others where they are needed: some tests run where there is nothing but pytest (scripts/vm-cgroup-test), and who
# runs one test does not wait for what others import.
if TYPE_CHECKING:
    from tests.support.fake_scheduler import FakeScheduler
    from tests.support.fake_worker import FakeWorker
    from tests.support.grpc_host import GrpcHost
    from tests.support.peers import Peer, Peers
    from tests.support.raw_h2 import RawClient
    from tests.support.workers import SupervisorProcess, Worker
    from worker_svc.client import WorkerClient
    from worker_svc.record.writer import JobStore
from worker_svc.record.reader import StoreReader

pytest_plugins = ["tests.support.hooks", "tests.support.output_fixtures"]

# The machine


@pytest.fixture(params=(CGROUP, SUBREAPER))
def level(request: pytest.FixtureRequest) -> str:
    """The way of containment that a supervisor is told to use."""
    level: str = request.param
    skip_unless(level)
    return level


@pytest.fixture(params=LEVELS)
def each_level(request: pytest.FixtureRequest) -> str:
    """And those that old kernels have."""
    level: str = request.param
    skip_unless(level)
    return level


@pytest.fixture(params=(NATIVE, PYTHON))
def spawner(request: pytest.FixtureRequest) -> str:
    spawner: str = request.param
    skip_unless_built(spawner)
    return spawner


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    with mounted(tmp_path / "disk", "tmpfs", "size=2m,mode=700") as folder:
        yield folder


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """Somebody else's process, which nobody may signal."""
    process = subprocess.Popen(programs.SLEEP)
    yield process
    assert process.poll() is None, "it was signalled"
    process.kill()
    process.wait()


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory and an environment without settings."""
    monkeypatch.chdir(tmp_path)
    for name in ("CONFIG", "ADDR", "CA", "CRT", "KEY", "SERVER_NAME"):
        monkeypatch.delenv(f"WORKER_SVC_{name}", raising=False)
    return tmp_path


@pytest.fixture
def open_dir() -> Iterator[Path]:
    """A directory that every user can reach, as those of pytest are not."""
    path = Path(tempfile.mkdtemp(prefix="worker-svc-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def write_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Writes conf/worker.toml, from a current directory beside it; its relative path."""
    for name in ("cwd", "conf"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "cwd")

    def write(text: str) -> Path:
        (tmp_path / "conf" / "worker.toml").write_text(text)
        return Path("../conf/worker.toml")

    return write


@pytest.fixture
def script_root(tmp_path: Path) -> Path:
    """With one script; its real path."""
    from tests.support.policies import script

    root = tmp_path.resolve() / "jobs"
    root.mkdir()
    script(root / "ok.sh", "inside")
    return root


@pytest.fixture
def plain_logging() -> Iterator[None]:
    """set_up_log takes over the root logger, as it should in a process of its own."""
    root, hook = logging.getLogger(), sys.unraisablehook
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)
    sys.unraisablehook = hook


@pytest.fixture
def log_folder(tmp_path: Path) -> Path:
    """With a place for the cursor of each of two workers."""
    from tests.support.telemetry import ME, OTHER

    for worker_id in (ME, OTHER):
        (tmp_path / worker_id).mkdir()
    return tmp_path


# The parts of a supervisor


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    from worker_svc.record.writer import JobStore

    store = JobStore(str(tmp_path))
    yield store
    store.close()


@pytest.fixture
def reader(tmp_path: Path, store: JobStore) -> Iterator[StoreReader]:
    from worker_svc.record.reader import StoreReader

    reader = StoreReader(str(tmp_path))
    yield reader
    reader.close()


@pytest.fixture
def pad(spawner: str, tmp_path: Path) -> Launchpad:
    return Launchpad(spawner, tmp_path)


@pytest.fixture
def containment(each_level: str) -> Iterator[Containment]:
    with contained(each_level) as containment:
        yield containment


# A supervisor


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state directory to be."""
    return tmp_path / "state"


@pytest.fixture
def supervisor_options() -> tuple[str, ...]:
    return ()


@pytest.fixture
def supervisor_settings() -> dict[str, Any]:
    return {}


@pytest.fixture
def supervisor(
    state: Path, supervisor_options: tuple[str, ...], supervisor_settings: dict[str, Any]
) -> Iterator[SupervisorProcess]:
    from tests.support.workers import SupervisorProcess

    running = SupervisorProcess(state, **supervisor_settings)
    running.options = supervisor_options
    with running:
        yield running


# A worker


@pytest.fixture
def worker_keys() -> dict[str, Any]:
    """Its configuration."""
    return {}


@pytest.fixture
def worker(tmp_path: Path, worker_keys: dict[str, Any]) -> Iterator[Worker]:
    """The test's own."""
    from tests.support.workers import Worker

    with Worker(tmp_path, **worker_keys) as running:
        yield running


@pytest.fixture
async def client(worker: Worker) -> AsyncIterator[WorkerClient]:
    async with worker.client() as connected:
        yield connected


@pytest.fixture(scope="module")
def shared_keys() -> dict[str, Any]:
    """The shared worker's configuration."""
    return {"JOBS_SLOTS": "100"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, shared_keys: dict[str, Any]) -> Iterator[Worker]:
    """A worker of all tests of a module, of which none stops it or needs to be alone there."""
    from tests.support.workers import Worker

    with Worker(tmp_path_factory.mktemp("worker"), **shared_keys) as running:
        yield running


@pytest.fixture
async def shared_client(shared: Worker) -> AsyncIterator[WorkerClient]:
    async with shared.client() as connected:
        yield connected


@pytest.fixture
def fake_worker() -> FakeWorker:
    """Without a supervisor: it answers as told, and remembers what it was asked."""
    from tests.support.fake_worker import FakeWorker

    return FakeWorker()


@pytest.fixture
async def faked(fake_worker: FakeWorker) -> AsyncIterator[WorkerClient]:
    """A client of it."""
    from tests.support.fake_worker import serving
    from worker_svc.client import WorkerClient

    async with serving(fake_worker) as address, WorkerClient(address) as client:
        yield client


@pytest.fixture
def fake_address(fake_worker: FakeWorker, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of `fake_worker`, which the command line takes from its environment."""
    from tests.support.fake_worker import serving_in_thread

    with serving_in_thread(fake_worker) as address:
        monkeypatch.setenv("WORKER_SVC_ADDR", address)
        yield address


# Servers without a worker, and schedulers


@pytest.fixture(scope="module")
def host() -> Iterator[GrpcHost]:
    from tests.support.grpc_host import GrpcHost

    with GrpcHost() as started:
        yield started


@pytest.fixture
def raw(host: GrpcHost) -> Iterator[RawClient]:
    from tests.support.raw_h2 import RawClient

    with RawClient(host.address) as connected:
        yield connected


@pytest.fixture
async def scheduler() -> AsyncIterator[FakeScheduler]:
    from tests.support.fake_scheduler import FakeScheduler

    async with FakeScheduler() as scheduler:
        yield scheduler


@pytest.fixture
async def absent() -> AsyncIterator[FakeScheduler]:
    """Its port is held, and refuses."""
    from tests.support.fake_scheduler import FakeScheduler

    scheduler = FakeScheduler()
    yield scheduler
    await scheduler.close()


# A worker over mTLS, shared by the tests of a module


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of them, for all sorts of clients, good and bad."""
    from tests.support.secured import make_certs

    return make_certs(tmp_path_factory.mktemp("secured") / "certs")


@pytest.fixture(scope="module")
def peers(certs: Path) -> Peers:
    from tests.support.peers import Peers

    return Peers(certs, certs.parent)


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory, certs: Path) -> Iterator[Worker]:
    from tests.support.secured import tls_keys
    from tests.support.workers import Worker

    with Worker(tmp_path_factory.mktemp("secured"), **tls_keys(certs)) as running:
        yield running


@pytest.fixture(scope="module")
def clients(secured: Worker, peers: Peers) -> Iterator[dict[str, Peer]]:
    with ExitStack() as stack:
        names = ("admin", "operator", "red", "blue", "viewer", "stranger", "uid0", "nameless")
        yield {name: stack.enter_context(peers.connect(secured.address, name)) for name in names}
