"""What importing pulls in: the supervisor must stay small, and the client must run anywhere."""

from __future__ import annotations

import ast
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest

import worker_svc
from tests.support.fake_worker import FakeWorker, finished, serving_in_thread
from worker_svc import Outcome, WorkerClient

# A type checker is told the names, not that there is a list of them.
PUBLIC: list[str] = attrgetter("__all__")(worker_svc)


def _loaded_after(statement: str) -> set[str]:
    code = f"import sys; before = set(sys.modules); {statement}; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_package_itself_imports_nothing() -> None:
    assert _loaded_after("import worker_svc") == {"worker_svc"}


def test_the_vocabulary_is_light() -> None:
    loaded = _loaded_after("import worker_svc, worker_svc.job, worker_svc.ipc.frames")
    heavy = {
        "grpclib",
        "betterproto",
        "asyncio",
        "importlib.metadata",
        "dataclasses",
        "structlog",
        "tomli",
        "ssl",
    }
    assert not loaded & heavy


def test_help_needs_no_grpc_and_no_event_loop() -> None:
    code = "from worker_svc.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass"
    loaded = _loaded_after(f"exec({code!r})")
    assert "worker_svc.cli" in loaded
    assert not loaded & {"grpclib", "betterproto", "asyncio", "tomli", "structlog"}


COMMANDS = ("check-config", "gen-certs", "demo", "run", "start", "stop", "query", "list", "logs", "prune", "shutdown")
HEAVY = {"asyncio", "grpclib.client", "betterproto", "structlog", "worker_svc.pb.jobscheduler"}


@pytest.mark.parametrize("command", COMMANDS)
def test_arguments_are_parsed_before_anything_heavy_is_loaded(command: str) -> None:
    code = f"from worker_svc.cli import main\ntry: main([{command!r}, '--help'])\nexcept SystemExit: pass"
    loaded = _loaded_after(f"exec({code!r})")
    assert "argparse" in loaded
    assert not loaded & HEAVY
    # The configuration's table of keys takes a while too.
    assert "worker_svc.config" not in loaded


def test_short_questions_need_no_event_loop() -> None:
    worker = FakeWorker()
    worker.jobs["a"] = finished("a", Outcome.SUCCEEDED)
    for command in (["query", "a"], ["list"], ["stop", "--grace", "1", "a"], ["pause", "a"]):
        with serving_in_thread(worker) as address:
            code = f"from worker_svc.cli import main; assert main({[*command, '--addr', address]!r}) == 0"
            assert not _loaded_after(f"exec({code!r})") & HEAVY


def test_the_client_imports_nothing_that_only_unix_has() -> None:
    code = """
import sys
for name in ("fcntl", "resource", "pwd", "grp", "termios", "pty", "tty", "syslog"):
    sys.modules[name] = None
from worker_svc import JobNotFound, StartJobReq, WorkerClient
print(WorkerClient("127.0.0.1:1").address)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("127.0.0.1:1", "")


def test_every_public_name_is_there() -> None:
    for name in PUBLIC:
        assert getattr(worker_svc, name) is not None
    assert set(PUBLIC) <= set(dir(worker_svc))
    namespace: dict[str, object] = {}
    exec("from worker_svc import *", namespace)
    assert set(PUBLIC) <= set(namespace)


def test_a_type_checker_and_the_interpreter_see_the_same_names() -> None:
    from worker_svc import public

    table = ast.parse(Path(public.__file__).read_text())
    imports = [line for line in table.body if not isinstance(line, ast.Expr)]
    assert all(isinstance(line, ast.ImportFrom) for line in imports)
    # `X as X` is what makes a name public for a strict type checker.
    names = [(alias.name, alias.asname) for line in imports for alias in line.names]  # type: ignore[attr-defined]
    assert all(name == asname for name, asname in names)
    assert sorted(PUBLIC) == sorted([*(name for name, _ in names), "__version__"])


def test_every_message_of_the_contract_is_public() -> None:
    from worker_svc.pb import jobscheduler

    messages = {
        name
        for name in vars(jobscheduler)
        if getattr(vars(jobscheduler)[name], "__module__", "") == jobscheduler.__name__
    }
    assert messages <= set(PUBLIC)


def test_what_clients_call_is_documented() -> None:
    methods = [member for name, member in vars(WorkerClient).items() if not name.startswith("_")]
    assert all(member.__doc__ for member in methods)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nobody'"):
        _ = worker_svc.Nobody  # type: ignore[attr-defined]
