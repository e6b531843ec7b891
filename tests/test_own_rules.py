"""What keeps the tests a place one can live in: small files, and each fixture once."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
FILES = sorted(HERE.rglob("*.py"))
LINES_MAX = 400
# With these a module says in what its worker or supervisor differs.
MEANT_TO_DIFFER = {"each_level", "shared_keys", "supervisor_options", "supervisor_settings", "worker_keys"}


def test_files_are_small() -> None:
    """Those that are not: split them by subject."""
    lengths = {str(path.relative_to(HERE)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length >= LINES_MAX} == {}


def test_each_fixture_is_defined_once() -> None:
    places = defaultdict(list)
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.FunctionDef(name=name, decorator_list=by) | ast.AsyncFunctionDef(name=name, decorator_list=by):
                    if any("pytest.fixture" in ast.unparse(one) for one in by):
                        places[name].append(str(path.relative_to(HERE)))
    assert {name: found for name, found in places.items() if len(found) > 1 and name not in MEANT_TO_DIFFER} == {}
