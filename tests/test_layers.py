"""Imports point down only (docs/architecture.md), and the supervisor stays small."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "worker_svc"

# Higher may import lower. Modules of the same layer do not import each other, save where SIBLINGS says so.
LAYERS: dict[str, int] = {
    "": 0,
    "job": 0,
    "config": 0,
    "frames": 0,
    "masking": 0,
    "printable": 0,
    "stdio": 0,
    "pb": 0,
    "supervisor": 1,
    "link": 2,
    "feed": 2,
    "reading": 2,
    "output": 2,
    "security": 2,
    "access": 2,
    "policy": 2,
    "startchecks": 2,
    "certs": 2,
    "telemetry": 2,
    "registration": 2,
    "messages": 2,
    "codec": 2,
    "statuses": 2,
    "guard": 3,
    "listing": 3,
    "service": 3,
    "server": 3,
    "client": 3,
    "public": 4,
    "app": 4,
    "cli": 4,
    "__main__": 4,
}
# frames and the configuration know the limits of a job; the server serves the service; the command line starts the app.
SIBLINGS = {
    ("frames", "job"),
    ("config", "job"),
    ("masking", "job"),
    ("config", "masking"),
    ("server", "service"),
    ("service", "guard"),
    ("service", "listing"),
    ("listing", "guard"),
    ("cli", "app"),
    ("__main__", "cli"),
}
# What L1 may use of L0: config needs tomli, pb needs betterproto.
SUPERVISOR_MAY_IMPORT = {"job", "frames", "stdio", "supervisor", ""}


def imports_of(path: Path) -> Iterator[tuple[str, bool]]:
    """Each module that a file imports, and whether only for type checking."""
    tree = ast.parse(path.read_text(), str(path))
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in typing_only
        elif isinstance(node, ast.ImportFrom):
            assert not node.level or path.parent != PACKAGE, f"{path}: relative import at the top"
            if node.level:
                continue  # within one package
            module = node.module or ""
            if module == "worker_svc":
                for alias in node.names:
                    is_module = (PACKAGE / alias.name).is_dir() or (PACKAGE / f"{alias.name}.py").is_file()
                    yield f"worker_svc.{alias.name}" if is_module else "worker_svc", id(node) in typing_only
            else:
                yield module, id(node) in typing_only


def unit_of(path: Path) -> str:
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if name == "__init__" else name


SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if "pb" not in path.relative_to(PACKAGE).parts)


def test_every_module_has_a_layer() -> None:
    assert {unit_of(path) for path in SOURCES} <= set(LAYERS)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down_only(path: Path) -> None:
    unit = unit_of(path)
    for module, typing_only in imports_of(path):
        if module.split(".")[0] != "worker_svc" or typing_only:
            continue
        used = [*module.split("."), ""][1]
        if used in ("", unit) or (unit, used) in SIBLINGS:
            continue
        assert LAYERS[used] < LAYERS[unit], f"{path.relative_to(PACKAGE)} imports {module}: not below it"


@pytest.mark.parametrize("path", sorted((PACKAGE / "supervisor").glob("*.py")), ids=lambda path: path.name)
def test_the_supervisor_imports_the_standard_library_and_its_own_only(path: Path) -> None:
    for module, _ in imports_of(path):
        top, _, rest = module.partition(".")
        if top == "worker_svc":
            assert rest.split(".")[0] in SUPERVISOR_MAY_IMPORT, module
        else:
            assert top in sys.stdlib_module_names, module


def test_what_the_supervisor_loads_is_light() -> None:
    code = "import sys, worker_svc.supervisor.__main__; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    ).stdout.split()
    heavy = {"asyncio", "grpclib", "betterproto", "structlog", "tomli", "dataclasses", "argparse", "logging", "ssl"}
    assert not heavy & set(loaded)
    foreign = {name.split(".")[0] for name in loaded} - set(sys.stdlib_module_names) - {"worker_svc", "__main__"}
    assert not foreign
