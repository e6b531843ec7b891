"""Why a script could not be started: the reason is the true one, and there is a remedy in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.spawning import Launchpad, skip_unless_built
from worker_svc.supervisor.spawn import NATIVE, PYTHON, SpawnFailed

# Either spawner, and the long way of the pure-Python one, its launcher.
WAYS: list[tuple[str, dict[str, Any]]] = [(NATIVE, {}), (PYTHON, {}), (PYTHON, {"limits": {"umask": 0o22}})]


@pytest.fixture(params=WAYS, ids=["native", "python", "launcher"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Path], str]:
    """Runs a program and returns its output."""
    implementation, more = request.param
    skip_unless_built(implementation)
    pad = Launchpad(implementation, tmp_path)
    return lambda program: pad.run(str(program), **more).output


def write(path: Path, content: str | bytes, mode: int = 0o755) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    path.chmod(mode)
    return path


def chain(folder: Path, length: int) -> Path:
    """A script whose interpreter is a script, and so on; the last one's is cat."""
    interpreter = Path("/bin/cat")
    for number in range(length):
        interpreter = write(folder / f"s{number}", f"#!{interpreter}\n")
    return interpreter


CR = r"its interpreter '/bin/sh\r' cannot be run: its lines end in CR LF, as on Windows: convert it"
NESTED = "its interpreter '{tmp}/inner' cannot be run: "
LONG = "/" + "x" * 300


@pytest.mark.parametrize(
    "content, inner, told",
    [
        ("#!/bin/sh\r\necho hi\r\n", "", CR),
        ("#!/bin/sh\r", "", CR),
        ("#! \t/bin/sh\r\n", "", CR),
        ("#!{tmp}/inner\n", "#!/bin/sh\r\n", NESTED + CR),
        ("#!{tmp}/inner\n", "#!/no/such\n", NESTED + "its interpreter '/no/such' cannot be run: no such file"),
        ("#!{tmp}/inner\n", "text\n", NESTED + "it is not a program for this machine"),
        ("#!{tmp}/inner\n", b"\x7fELF", NESTED + "it is not a program for this machine"),
        ("#!{tmp}\n", "", "its interpreter '{tmp}' cannot be run: it is a directory"),
        (f"#!{LONG} -x\n", "", "its interpreter is cut off: of the first line, the kernel reads 255 bytes"),
        (f"#!{' ' * 300}/bin/sh\n", "", "its first line names no interpreter"),
        ("#!\n", "", "its first line names no interpreter"),
        ("#!sh\n", "", "its interpreter 'sh' cannot be run: no such file or directory; #! takes a whole path"),
        ("#!{tmp}/script\n", "", "its interpreter '{tmp}/script' is a script, and in the end its own interpreter"),
        ("#!{tmp}/inner\n", "#!{tmp}/script\n", "its interpreter '{tmp}/inner' is a script, and in the end its own"),
        ("\ufeff#!/bin/sh\n", "", "its #! is not at the very beginning"),
        ("\n#!/bin/sh\n", "", "its #! is not at the very beginning"),
    ],
)
def test_a_script(run: Callable[[Path], str], tmp_path: Path, content: str, inner: str | bytes, told: str) -> None:
    script = write(tmp_path / "script", content.replace("{tmp}", str(tmp_path)))
    if inner:
        write(tmp_path / "inner", inner if isinstance(inner, bytes) else inner.replace("{tmp}", str(tmp_path)))
    with pytest.raises(SpawnFailed) as failed:
        run(script)
    assert str(failed.value).startswith(f"command: {script}: {told.replace('{tmp}', str(tmp_path))}")


def test_what_of_an_interpreter_may_not_be_executed(run: Callable[[Path], str], tmp_path: Path) -> None:
    inner = write(tmp_path / "inner", "#!/bin/sh\n", 0o644)
    script = write(tmp_path / "script", f"#!{inner}\n")
    with pytest.raises(SpawnFailed, match=rf"its interpreter '{inner}' cannot be run: it is not executable: chmod \+x"):
        run(script)


def test_interpreters_that_are_scripts(run: Callable[[Path], str], tmp_path: Path) -> None:
    """The kernel follows five of them."""
    assert run(chain(tmp_path, 5))
    with pytest.raises(SpawnFailed, match="one that takes more than 5 scripts in a row"):
        run(chain(tmp_path, 6))


def test_a_first_line_whose_arguments_alone_are_long(run: Callable[[Path], str], tmp_path: Path) -> None:
    """The kernel cuts them off, and starts the interpreter."""
    script = write(tmp_path / "script", f"#!/bin/echo {'x' * 300}\n")
    assert run(script).startswith("xxx")


def test_a_program_whose_loader_is_not_here(run: Callable[[Path], str], tmp_path: Path) -> None:
    """As a rule such a program was made for another C library."""
    whole = Path("/bin/true").resolve().read_bytes()
    begin = whole.find(b"/lib")
    assert whole[begin:].startswith((b"/lib64/ld-linux", b"/lib/ld-linux")), "no dynamically linked true(1)"
    program = write(tmp_path / "program", whole[:begin] + b"/lxx" + whole[begin + 4 :])
    with pytest.raises(SpawnFailed, match=f"^command: {program}: the loader that it asks for is not here"):
        run(program)
