"""Imports point down only and go in no circle (docs/architecture.md), in every module; the supervisor stays small."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "worker_svc"

# The rooms of the house, the lowest first. Those of one line do not import each other.
FLOORS = (
    ("", "address", "job", "linux", "printable", "token_bucket", "pb"),
    ("record", "masking"),
    ("ipc",),
    ("wire",),
    ("config", "output", "registration"),
    ("feed", "job_files", "reading", "telemetry"),
    ("access", "link"),
    ("batches", "listing"),
    ("service",),
    ("server", "client"),
    ("public",),
    ("starting",),
    ("app",),
    ("cli",),
    ("__main__",),
    # A program of its own, which nothing else imports.
    ("supervisor",),
)
FLOOR_OF = {room: number for number, floor in enumerate(FLOORS) for room in floor}
# config needs tomli, pb needs betterproto.
SUPERVISOR_MAY_IMPORT = {"", "job", "linux", "ipc", "record", "supervisor"}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    name_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if "pb" not in path.relative_to(PACKAGE).parts[:-1]
}


def imports_of(path: Path) -> Iterator[str]:
    """Each module that a file imports when it runs, at the top or later."""
    tree = ast.parse(path.read_text(), str(path))
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            assert node.module
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module


IMPORTS = {name: set(imports_of(path)) - {name} for name, path in MODULES.items()}


def room_of(module: str) -> str:
    return [*module.split("."), ""][1]


def test_every_room_has_a_floor() -> None:
    assert {room_of(name) for name in MODULES} <= set(FLOOR_OF)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down_only(name: str) -> None:
    room = room_of(name)
    for module in IMPORTS[name]:
        if module.split(".")[0] != "worker_svc" or room_of(module) == room:
            continue
        assert FLOOR_OF[room_of(module)] < FLOOR_OF[room], f"{name} imports {module}: not below it"


def test_no_circle() -> None:
    try:
        TopologicalSorter({name: found & set(MODULES) for name, found in IMPORTS.items()}).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


@pytest.mark.parametrize("name", [name for name in MODULES if room_of(name) in SUPERVISOR_MAY_IMPORT])
def test_the_supervisor_imports_the_standard_library_and_its_own_only(name: str) -> None:
    if name == "worker_svc":
        return  # it loads the public names, and only when one of them is asked for
    for module in IMPORTS[name]:
        if module.split(".")[0] == "worker_svc":
            assert room_of(module) in SUPERVISOR_MAY_IMPORT, module
        else:
            assert module.split(".")[0] in sys.stdlib_module_names, module


def test_what_the_supervisor_loads_is_light() -> None:
    code = "import sys, worker_svc.supervisor.__main__; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    ).stdout.split()
    heavy = {"asyncio", "grpclib", "betterproto", "structlog", "tomli", "dataclasses", "argparse", "logging", "ssl"}
    assert not heavy & set(loaded)
    foreign = {name.split(".")[0] for name in loaded} - set(sys.stdlib_module_names) - {"worker_svc", "__main__"}
    assert not foreign
