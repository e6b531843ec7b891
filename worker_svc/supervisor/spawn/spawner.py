"""Starts processes in a few threads, since exec from a dead file system hangs: more of them when all do."""

from __future__ import annotations

import importlib
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Final, Protocol, cast

from worker_svc.job import fault_text
from worker_svc.linux.threads import start_thread
from worker_svc.supervisor.journal import note
from worker_svc.supervisor.spawn.plan import Attempt, JobFds, LaunchPlan, Spawned, SpawnFailed
from worker_svc.supervisor.spawn.steps import Program, program_of

NATIVE: Final = "native"
PYTHON: Final = "python"
SPAWNER_THREADS: Final = 2
SPAWNER_THREADS_MAX: Final = 64
# A start takes half a millisecond. If none has been begun for this long while some wait, all threads hang.
_STUCK_AFTER_S: Final = 0.02
_NO_THREAD_S: Final = 1.0


class _Implementation(Protocol):
    def start(self, plan: LaunchPlan, program: Program, files: JobFds, attempt: Attempt) -> Spawned: ...


_loaded: Final[dict[str, _Implementation]] = {}


def load(name: str) -> _Implementation:
    """Raises ImportError if it is not there."""
    if name not in _loaded:
        module = {NATIVE: "native", PYTHON: "fallback"}[name]
        _loaded[name] = cast(_Implementation, importlib.import_module(f"worker_svc.supervisor.spawn.{module}"))
    return _loaded[name]


def _available() -> str:
    try:
        load(NATIVE)
    except ImportError:
        return PYTHON
    return NATIVE


IMPLEMENTATION: Final = _available()
"""What is in use unless a caller says otherwise: NATIVE or PYTHON."""


def spawn(plan: LaunchPlan, implementation: str = IMPLEMENTATION, attempt: Attempt | None = None) -> Spawned:
    """Starts the process: in a session of its own, its output appended to its files. Raises SpawnFailed."""
    start = load(implementation).start
    program = program_of(plan)
    try:
        files = JobFds(plan, program.owner)
    except OSError as error:
        raise SpawnFailed(f"the supervisor could not prepare the job: {error}") from error
    try:
        return start(plan, program, files, attempt or Attempt())._replace(outputs=files.hand_over())
    except (OSError, SpawnFailed) as error:
        files.unlink()
        if isinstance(error, SpawnFailed):
            raise
        raise SpawnFailed(f"the supervisor could not start the job: {error}") from error
    finally:
        files.close()


class Spawner:
    """Runs `spawn` in threads; `done` is called in such a thread with the token and what came of it."""

    def __init__(
        self,
        done: Callable[[Any, Spawned | SpawnFailed], None],
        implementation: str = IMPLEMENTATION,
        threads_max: int = SPAWNER_THREADS_MAX,
    ) -> None:
        self._done = done
        self.implementation = implementation
        self._threads_max = threads_max
        self._plans: queue.SimpleQueue[tuple[Any, LaunchPlan]] = queue.SimpleQueue()
        self._attempts: dict[int, Attempt] = {}
        self._lock = threading.Lock()
        self._threads = 0
        self._open = 0
        """Plans that were submitted and are not done."""
        self._begun = 0
        self._backlog = threading.Event()
        for _ in range(SPAWNER_THREADS):
            self._add_thread()
        start_thread(self._watch, "spawner-watch")

    @property
    def threads(self) -> int:
        return self._threads

    def submit(self, token: object, plan: LaunchPlan) -> None:
        with self._lock:
            self._open += 1
            waits = self._open > self._threads
        self._plans.put((token, plan))
        if waits:
            self._backlog.set()

    def kill(self, token: object) -> bool:
        """Kills the process of a start that is under way, hanging maybe: it fails then.

        False: it has none (the plan waits for a thread, is being prepared, or is done).
        """
        attempt = self._attempts.get(id(token))
        return attempt is not None and attempt.kill()

    def _add_thread(self) -> None:
        with self._lock:
            self._threads += 1
        try:
            start_thread(self._work, f"spawner-{self._threads}")
        except RuntimeError:
            with self._lock:
                self._threads -= 1
            raise

    def _work(self) -> None:
        """Never ends: a thread's children, the leaders it started, would become the main thread's, whose list of
        children is read at each exit of a job to find orphans."""
        while True:
            token, plan = self._plans.get()
            self._begun += 1  # by several threads: that it changes is all that counts
            self._run(token, plan)
            del token, plan
            with self._lock:
                self._open -= 1

    def _run(self, token: object, plan: LaunchPlan) -> None:
        result: Spawned | SpawnFailed
        try:
            attempt = self._attempts[id(token)] = Attempt()
            result = spawn(plan, self.implementation, attempt)
        except SpawnFailed as failure:
            result = failure
        except Exception as error:  # a fault of ours must end one job, not the thread that starts all others
            result = SpawnFailed(f"the supervisor could not start it: {fault_text(error)}")
        self._attempts.pop(id(token), None)
        self._done(token, result)

    def _watch(self) -> None:
        """Adds threads whenever some plan waits and all of them hang; sleeps when no plan waits."""
        while True:
            self._backlog.wait()
            self._backlog.clear()
            while not self._plans.empty() and self._threads < self._threads_max:
                begun = self._begun
                time.sleep(_STUCK_AFTER_S)
                if begun == self._begun and not self._plans.empty():
                    self._add_threads()

    def _add_threads(self) -> None:
        try:
            for _ in range(min(SPAWNER_THREADS, self._threads_max - self._threads)):
                self._add_thread()
        except (RuntimeError, MemoryError) as error:  # the plans wait for those there are, and this looks again
            note("supervisor.exhausted", reason=str(error) or "out of memory")
            time.sleep(_NO_THREAD_S)
