"""The C extension itself: what it refuses, that it builds everywhere, and under the sanitizers.

What had to be seen to for AddressSanitizer with a vfork-style clone: it does not know of the raw clone, so its idea of
the stack is the parent's (no function of the child's is marked noreturn, which would make it look there); the child's
frames stay poisoned when it leaves by execve, so the parent unpoisons them; leaks are not looked for, since Python has
its own. A report ends the process (-fno-sanitize-recover), and with it the test.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.support.programs import children_of
from tests.support.spawning import build_native, skip_unless_built
from worker_svc.supervisor.spawn import NATIVE, start_ticks_of

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "worker_svc/supervisor/spawn/_native.c"


@pytest.fixture
def native() -> Any:
    skip_unless_built(NATIVE)
    from worker_svc.supervisor.spawn import _native

    return _native


GOOD: tuple[Any, ...] = ((b"/bin/true",), (b"true",), (), (), (0, 1, 2), -1, bytearray(8))


@pytest.mark.parametrize(
    "at,value,kind",
    [
        (0, (b"/bin/\0true",), ValueError),
        (0, ("/bin/true",), TypeError),
        (1, [b"true"], TypeError),
        (2, (1,), TypeError),
        (3, ((1,),), TypeError),
        (3, (5,), TypeError),
        (3, ((1, 0, 9, 0, b"x"),), ValueError),  # more text than there is
        (3, ((1, 0, -1, 0, b"x"),), ValueError),
        (3, ((5, 2**64, 0, 0, b""),), OverflowError),
        (4, (0, 1), TypeError),
        (6, bytearray(7), ValueError),
        (6, b"abcdefgh", BufferError),
    ],
)
def test_what_is_malformed_is_refused_before_anything_is_started(
    native: Any, at: int, value: object, kind: type[Exception]
) -> None:
    arguments = [*GOOD]
    arguments[at] = value
    before = children_of(os.getpid())  # what other tests of this run have started, and keep
    with pytest.raises((kind, TypeError)):
        native.spawn(*arguments)
    assert children_of(os.getpid()) == before


def test_an_unknown_step_and_a_bad_fd_fail_by_their_place(native: Any) -> None:
    arguments = [*GOOD]
    arguments[3] = ((5, 0o22, 0, 0, b""), (99, 0, 0, 0, b""))
    *_, failed, number, _ = native.spawn(*arguments)
    assert (failed, os.strerror(number)) == (1, "Function not implemented")
    arguments[3:5] = (), (0, 1, 12345)
    pid, pidfd, _, failed, number, _ = native.spawn(*arguments)
    os.close(pidfd)
    assert (pid, failed, os.strerror(number)) == (0, -5, "Bad file descriptor")
    assert arguments[6][:4] != b"\xff" * 4  # that was the pidfd


def test_a_failed_clone_leaves_no_number_that_could_be_taken_for_an_fd(native: Any) -> None:
    """The kernel has written the pidfd by the time it finds that the cgroup is none."""
    arguments = [*GOOD]
    with open(os.devnull) as file:
        arguments[5] = file.fileno()
        pid, pidfd, _, failed, _, _ = native.spawn(*arguments)
    assert (pid, pidfd, failed) == (0, -1, -2)
    assert arguments[6][:4] == b"\xff" * 4


def test_the_start_time_taken_from_the_clock_is_the_kernels(native: Any) -> None:
    """By it a process is known again after a restart. Some of so many are born around the end of a tick of 10 ms."""
    for _ in range(300):
        pid, pidfd, start_ticks, *_ = native.spawn(*GOOD)
        told = start_ticks_of(pid)  # of a zombie, too
        os.waitpid(pid, 0)
        os.close(pidfd)
        assert start_ticks == told


def test_threads_that_end_take_their_childrens_stacks_along(native: Any) -> None:
    def start() -> None:
        pid, pidfd, *_ = native.spawn(*(*GOOD[:6], bytearray(8)))
        os.waitpid(pid, 0)
        os.close(pidfd)

    def mappings_after(threads: int) -> int:
        for _ in range(threads):
            thread = threading.Thread(target=start)
            thread.start()
            thread.join()
        return len(Path("/proc/self/maps").read_text().splitlines())

    first = mappings_after(10)
    assert mappings_after(200) < first + 50  # each has two, of its stack and the guard below that


def test_its_numbers_are_those_of_the_python_side() -> None:
    """The enums of _child.h, steps.py and launcher.py."""
    import re

    from worker_svc.supervisor.spawn.steps import Op, Place

    header = (SOURCE.parent / "_child.h").read_text()
    ops = re.search(r"enum \{ OP_WRITE = 1,(.*?)\}", header, re.DOTALL)
    assert ops
    names = ["WRITE", *(name.strip().removeprefix("OP_") for name in ops[1].split(","))]
    assert names == [op.name for op in Op]
    assert [int(op) for op in Op] == list(range(1, len(names) + 1))
    places = dict(re.findall(r"AT_(\w+) = (-\d)", header))
    assert {name: int(number) for name, number in places.items() if name != "NONE"} == dict(Place.__members__)
    launcher = (SOURCE.parent / "launcher.py").read_text()
    steps = launcher.partition("STEPS: ")[2].partition("\n}")[0]
    assert [int(number) for number in re.findall(r"^    (\d+): ", steps, re.MULTILINE)] == [int(op) for op in Op]


def test_the_child_calls_no_library_function(tmp_path: Path) -> None:
    """Not even memset, which compilers put in by themselves: the first call would run the dynamic linker."""
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("there is no objdump")
    built = build_native(tmp_path, "-O2", "-fno-inline-functions-called-once", "-fno-inline-small-functions")
    if isinstance(built, str):
        pytest.skip(built)
    listing = subprocess.run([objdump, "-d", "--no-show-raw-insn", built], capture_output=True, text=True, check=True)
    functions = listing.stdout.split("\n\n")
    children = [text for text in functions if "<child_" in text.partition("\n")[0]]
    assert len(children) > 5
    for text in children:
        for line in text.splitlines()[1:]:
            if line.split("\t")[-1].partition(" ")[0] in ("call", "callq", "bl"):
                assert "<child_" in line, line


def test_it_builds_for_aarch64(tmp_path: Path) -> None:
    compiler = shutil.which("aarch64-linux-gnu-gcc")
    if compiler is None:
        pytest.skip("there is no cross compiler (apt-get install gcc-aarch64-linux-gnu)")
    done = subprocess.run(
        [compiler, "-c", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-DPy_LIMITED_API=0x030B0000",
         f"-I{__import__('sysconfig').get_path('include')}", "-o", tmp_path / "out.o", SOURCE],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stderr == ""


UNDER_SANITIZERS = """
import importlib.util, sys
name = "worker_svc.supervisor.spawn._native"
spec = importlib.util.spec_from_file_location(name, sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules[name] = module
import pytest
from worker_svc.supervisor.spawn import IMPLEMENTATION, native
assert IMPLEMENTATION == "native" and native._native is module
sys.exit(pytest.main([
    "-q", "-p", "no:cacheprovider", "--basetemp", sys.argv[2], "-W", "ignore",
    "-k", "native and not starts_leak and not sanitizers and not builds and not library", *sys.argv[3:],
]))
"""


@pytest.mark.long
@pytest.mark.timeout(600)
def test_under_the_sanitizers(tmp_path: Path) -> None:
    built = build_native(
        tmp_path, "-g", "-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"
    )
    if isinstance(built, str):
        pytest.skip(built)
    library = subprocess.run(["cc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout
    if "/" not in library:
        pytest.skip("there is no libasan")
    tests = [
        f"tests/functional/{name}.py"
        for name in ("test_spawn", "test_spawn_limits", "test_spawn_sandbox", "test_spawn_native")
    ]
    done = subprocess.run(
        [sys.executable, "-c", UNDER_SANITIZERS, built, tmp_path / "tests", *tests],
        env={
            **os.environ,
            "LD_PRELOAD": library.strip(),
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:halt_on_error=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "PYTHONMALLOC": "malloc",  # or the allocations of Python would be out of its sight
        },
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-5000:]
    assert "Sanitizer" not in said, said
    assert " passed" in said


def test_it_is_abi3(native: Any) -> None:
    assert importlib.util.find_spec(native.__name__)
    assert ".abi3." in native.__file__
