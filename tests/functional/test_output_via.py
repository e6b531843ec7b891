"""How output gets into its files: by a pipe, or by the job itself. What opens it anew, truncates it, holds it, and what
a supervisor finds of it that comes after another."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support import programs
from tests.support.filesystems import mounted
from tests.support.kernel import landlock_abi
from tests.support.spawning import skip_unless_built
from tests.support.waiting import eventually_sync
from tests.support.workers import PATIENCE_S, SupervisorProcess, Worker
from worker_svc.job import JobState, Outcome, OutputPolicy, OutputVia
from worker_svc.pb.jobscheduler import OutputVia as Via
from worker_svc.record.paths import output_path, stderr_path
from worker_svc.supervisor.spawn import NATIVE

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("holes")]
MIB: Final = 1 << 20
PIPE: Final[dict[str, Any]] = {"output_via": int(OutputVia.PIPE)}
FILE: Final[dict[str, Any]] = {"output_via": int(OutputVia.FILE)}
# Lines, numbered, in small writes, until the file argv[1] is there; then "end".
COUNTS: Final = """
import os, sys, time
n = 0
while not os.path.exists(sys.argv[1]):
    os.write(1, b"%d\\n" % n)
    n += 1
    if n % 100 == 0: time.sleep(0.001)
os.write(1, b"end\\n")
"""


@pytest.fixture
def supervisor_options(spawner: str) -> tuple[str, ...]:
    return ("--spawner", spawner)


def shell(script: str) -> list[str]:
    return ["bash", "-c", script]


def size_of(path: str) -> int:
    return Path(path).stat().st_size


def counted(output: bytes) -> bool:
    """Whether it is all that COUNTS wrote, in order."""
    *numbers, end = output.split()
    return end == b"end" and numbers == [b"%d" % n for n in range(len(numbers))]


# By a pipe


@pytest.mark.parametrize(
    "script,expected",
    [
        ("echo one; echo two >/dev/stderr; echo three", b"one\ntwo\nthree\n"),
        ("echo start; echo x | tee /dev/stderr; echo end", b"start\nx\nx\nend\n"),
        ("echo a; for n in 1 2 3; do echo $n >/dev/stdout; done; echo b", b"a\n1\n2\n3\nb\n"),
        ("echo a; dd if=/dev/zero of=/dev/stdout bs=3 count=1 status=none", b"a\n\0\0\0"),
    ],
)
def test_what_opens_it_anew_loses_nothing(supervisor: SupervisorProcess, script: str, expected: bytes) -> None:
    record = supervisor.finish("j", shell(script), **PIPE)
    assert supervisor.output("j") == expected
    assert (record.outcome, record.output_size_bytes, record.output_loss) == (Outcome.SUCCEEDED, len(expected), "")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
@pytest.mark.parametrize("via", [PIPE, FILE])
def test_another_user_can_open_it_anew(supervisor: SupervisorProcess, via: dict[str, Any]) -> None:
    argv = shell("echo one; echo two >>/dev/stderr; echo three >>/dev/stdout")
    supervisor.finish("j", argv, identity={"user": "nobody"}, **via)
    assert supervisor.output("j") == b"one\ntwo\nthree\n"
    assert Path(output_path(str(supervisor.path), "j")).stat().st_uid == 0, "the finished job has it still"


def test_standard_error_apart(supervisor: SupervisorProcess, state: Path) -> None:
    script = "echo out; echo err >&2; echo err again >/dev/stderr; echo out again >/dev/stdout"
    record = supervisor.finish("j", shell(script), separate_stderr=True, **PIPE)
    assert Path(output_path(str(state), "j")).read_bytes() == b"out\nout again\n"
    assert Path(stderr_path(str(state), "j")).read_bytes() == b"err\nerr again\n"
    assert (record.output_size_bytes, record.stderr_size_bytes) == (14, 14)


def test_many_short_ones_are_whole(supervisor: SupervisorProcess) -> None:
    """The end is exact, however fast it comes after the last write; and nothing is left open."""
    fds = Path(f"/proc/{supervisor.pid}/fd")
    supervisor.finish("first", programs.TRUE, **PIPE)
    before = len(list(fds.iterdir()))
    for number in range(50):
        supervisor.run(f"j{number}", shell(f"printf %{number * 500}s"), **PIPE)
    for number in range(50):
        record = supervisor.wait_finished(f"j{number}")
        assert record.output_size_bytes == number * 500 == len(supervisor.output(f"j{number}"))
    eventually_sync(lambda: len(list(fds.iterdir())) <= before, PATIENCE_S, "files are left open")


def test_who_holds_the_pipe_does_not_hold_up_the_end(supervisor: SupervisorProcess, tmp_path: Path) -> None:
    """Nor is it held up: what it writes later is thrown away."""
    go = tmp_path / "go"
    supervisor.run("j", ["sh", "-c", 'echo first; until [ -e "$0" ]; do sleep 0.01; done', str(go)], **PIPE)
    eventually_sync(lambda: supervisor.record("j").state is JobState.RUNNING and supervisor.output("j"), PATIENCE_S)
    held = os.open(f"/proc/{supervisor.record('j').pid}/fd/1", os.O_WRONLY)
    os.write(held, b"a stranger's\n")
    go.touch()
    record = supervisor.wait_finished("j")
    writing = threading.Thread(target=lambda: os.write(held, b"x" * MIB), daemon=True)
    writing.start()
    writing.join(PATIENCE_S)
    assert not writing.is_alive(), "what holds the pipe is blocked"
    os.close(held)
    assert record.output_size_bytes == len(b"first\na stranger's\n") == len(supervisor.output("j"))


@pytest.mark.parametrize(
    "way",
    ["{}", "exec 2>/dev/null; {}", "exec > >(cat); {}; exec >&-; wait $!"],
    ids=["itself", "without stderr", "by another process"],
)
def test_a_supervisor_that_is_killed(supervisor: SupervisorProcess, tmp_path: Path, way: str) -> None:
    """What the job writes meanwhile waits in the pipe, or the job waits: none of it is lost."""
    go = tmp_path / "go"
    supervisor.run("j", shell(way.format(shlex.join(programs.python(COUNTS, str(go))))), **PIPE)
    eventually_sync(lambda: len(supervisor.output("j")) > 10_000, PATIENCE_S, "it does not write")
    for _ in range(2):
        supervisor.kill()
        supervisor.start()
        size = len(supervisor.output("j"))
        eventually_sync(lambda size=size: len(supervisor.output("j")) > size, PATIENCE_S, "it is not taken up")  # type: ignore[misc]
    go.touch()
    record = supervisor.wait_finished("j")
    assert record.output_loss == ""
    assert counted(supervisor.output("j"))
    assert record.output_size_bytes == len(supervisor.output("j"))


def test_both_pipes_are_taken_up(supervisor: SupervisorProcess, state: Path, tmp_path: Path) -> None:
    go = tmp_path / "go"
    script = f'until [ -e "{go}" ]; do sleep 0.01; done; echo out; echo err >&2'
    supervisor.run("j", shell(script), separate_stderr=True, **PIPE)
    supervisor.kill()
    supervisor.start()
    go.touch()
    supervisor.wait_finished("j")
    assert Path(output_path(str(state), "j")).read_bytes() == b"out\n"
    assert Path(stderr_path(str(state), "j")).read_bytes() == b"err\n"


def test_a_pipe_that_is_gone_is_told(supervisor: SupervisorProcess, tmp_path: Path) -> None:
    go = tmp_path / "go"
    supervisor.run("j", shell(f'echo x; exec >/dev/null 2>&1; until [ -e "{go}" ]; do sleep 0.01; done'), **PIPE)
    eventually_sync(lambda: supervisor.output("j"), PATIENCE_S)
    supervisor.kill()
    supervisor.start()
    go.touch()
    assert "pipe was gone" in supervisor.wait_finished("j").output_loss
    assert supervisor.output("j") == b"x\n"


def test_what_is_left_of_a_lost_job_holds_is_kept(supervisor: SupervisorProcess, tmp_path: Path) -> None:
    """Its first process ends while no supervisor is there, another has its pipe still."""
    go, done = tmp_path / "go", tmp_path / "done"
    script = f'until [ -e "{go}" ]; do sleep 0.01; done; echo last words; sleep 999 & touch "{done}"'
    supervisor.run("j", shell(script), **PIPE)
    supervisor.kill()
    go.touch()
    eventually_sync(done.exists, PATIENCE_S)
    supervisor.start()
    record = supervisor.wait_finished("j")
    assert (supervisor.output("j"), record.output_size_bytes) == (b"last words\n", 11)


def test_truncated_by_an_operator(supervisor: SupervisorProcess, state: Path, tmp_path: Path) -> None:
    """All before is a hole, all after is there, and the record says what was lost."""
    go = tmp_path / "go"
    path = output_path(str(state), "j")
    supervisor.run("j", shell(f'echo before; until [ -e "{go}" ]; do sleep 0.01; done; echo after'), **PIPE)
    eventually_sync(lambda: size_of(path) == 7, PATIENCE_S)
    os.truncate(path, 0)
    go.touch()
    record = supervisor.wait_finished("j")
    assert record.output_loss == "7 bytes were truncated"
    assert (record.output_size_bytes, supervisor.output("j")) == (4102, bytes(4096) + b"after\n")
    with open(path, "rb") as file:
        assert os.lseek(file.fileno(), 0, os.SEEK_DATA) == 4096
    assert [event.reason for event in supervisor.events() if event.reason] == ["output: 7 bytes were truncated"]


def test_removed_by_an_operator(supervisor: SupervisorProcess, state: Path, tmp_path: Path) -> None:
    """How much it was is known all the same."""
    go = tmp_path / "go"
    supervisor.run("j", shell(f'echo before; until [ -e "{go}" ]; do sleep 0.01; done; echo after'), **PIPE)
    eventually_sync(lambda: supervisor.output("j"), PATIENCE_S)
    Path(output_path(str(state), "j")).unlink()
    go.touch()
    assert supervisor.wait_finished("j").output_size_bytes == len(b"before\nafter\n")


def test_a_full_disk_makes_the_job_wait(state: Path, tmp_path: Path) -> None:
    """It goes on when there is space again, and nothing is lost."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "tmpfs", small], check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        with SupervisorProcess(small / "state") as supervisor:
            line = b"0123456789abcde\n"
            argv = programs.python(f"import os\nfor _ in range(6 << 10): os.write(1, {line!r} * 64)")
            supervisor.run("j", argv, **PIPE)
            eventually_sync(lambda: [e for e in supervisor.events() if e.reason], PATIENCE_S, "the disk does not fill")
            subprocess.run(["mount", "-o", "remount,size=32m", small], check=True)
            record = supervisor.wait_finished("j")
            assert (record.outcome, record.output_loss) == (Outcome.SUCCEEDED, "")
            assert supervisor.output("j") == line * (6 << 16)
            assert [event.reason for event in supervisor.events() if event.reason] == [
                "output: waits for space on the disk (No space left on device)"
            ]
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_a_disk_that_output_has_filled_has_room_for_records(
    tmp_path: Path, supervisor_options: tuple[str, ...]
) -> None:
    """What is put by for them is not taken by jobs that wait for space."""
    with mounted(tmp_path / "disk", "tmpfs", "size=24m,mode=700") as disk:
        supervisor = SupervisorProcess(disk / "state")
        supervisor.options = supervisor_options
        with supervisor:
            supervisor.run("other", programs.SLEEP)
            for number in range(2):
                supervisor.run(f"fills-{number}", shell("exec cat /dev/zero"), **PIPE)
            eventually_sync(lambda: len([event for event in supervisor.events() if event.reason]) == 2, PATIENCE_S)
            for job_id in ("other", "fills-0", "fills-1"):
                supervisor.client.ask("stop", job_id=job_id)
                assert supervisor.wait_finished(job_id).outcome is Outcome.STOPPED


@pytest.mark.skipif(landlock_abi() < 3, reason="this kernel has no Landlock with ABI 3 (Linux 6.2)")
def test_a_sandboxed_job_can_open_it_anew(supervisor: SupervisorProcess) -> None:
    """What is no path is not beneath Landlock's."""
    argv = shell("echo one; echo two >/dev/stderr")
    supervisor.finish("j", argv, sandbox={"read_only_paths": ["/"]}, **PIPE)
    assert supervisor.output("j") == b"one\ntwo\n"


# The job has the file


def test_a_truncated_file_is_told_as_a_gap(tmp_path: Path, state: Path) -> None:
    """To who follows and to who comes later; recorded; and in the log, once. All that follows is whole."""
    first, second = tmp_path / "first", tmp_path / "second"
    script = f"""
    echo 1111111111; until [ -e {first} ]; do sleep 0.01; done
    echo two > /dev/stderr; until [ -e {second} ]; do sleep 0.01; done
    echo three; echo four"""

    async def check(worker: Worker) -> None:
        async with worker.client() as client:
            job_id = (await client.start("bash", args=["-c", script], output_via=Via.FILE)).job_id
            path = output_path(str(worker.path), job_id)
            stream = client.output(job_id, follow=True)
            assert (await anext(stream)).data == b"1111111111\n"
            first.touch()
            await asyncio.to_thread(eventually_sync, lambda: size_of(path) >= 4096, PATIENCE_S)
            second.touch()
            job = await client.wait(job_id, PATIENCE_S)
            assert job.output_loss == "11 bytes were truncated"
            chunks = [chunk async for chunk in stream]
            assert [(chunk.offset, chunk.gap_bytes) for chunk in chunks if chunk.gap_bytes] == [(11, 4085)]
            assert b"".join(chunk.data for chunk in chunks) == b"two\nthree\nfour\n"
            late = [chunk async for chunk in client.output(job_id)]
            assert (late[0].offset, late[0].gap_bytes) == (0, 4096)
            assert b"".join(chunk.data for chunk in late) == b"two\nthree\nfour\n"
            told = [line for line in worker.log_events("job.transition") if "truncated" in line.get("reason", "")]
            assert len(told) == 1

    with Worker(tmp_path) as worker:
        asyncio.run(check(worker))


def _wait_taken_back(supervisor: SupervisorProcess, job_id: str) -> None:
    path = Path(output_path(str(supervisor.path), job_id))
    eventually_sync(lambda: "taken back" in supervisor.record(job_id).output_loss, PATIENCE_S, job_id)
    eventually_sync(lambda: path.stat().st_blocks * 512 <= 17 * MIB, PATIENCE_S, job_id)


def test_what_it_allocates_beyond_its_end_is_taken_back(state: Path, tmp_path: Path) -> None:
    """fallocate(2) with KEEP_SIZE; by mmap(2) where its head was, of which nobody is told."""
    allocate = (
        "import ctypes, os, time\n"
        "ctypes.CDLL(None).fallocate(1, 1, ctypes.c_long(0), ctypes.c_long(1 << 30))\n"
        "os.write(1, b'here')\n"
    )
    fill_head = (
        "import mmap, os\n"
        "fd = os.open('/dev/stdout', os.O_RDWR)\n"
        "os.ftruncate(fd, 256 << 20)\n"
        "map = mmap.mmap(fd, 256 << 20)\n"
        "while os.stat(fd).st_blocks * 512 > 64 << 20: pass\n"
        "for at in range(0, 250 << 20, 4096): map[at] = 1\n"
    )
    wait = f"import time\nwhile not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.01)\n"
    with SupervisorProcess(state) as supervisor:
        for job_id, code in (("beyond", allocate), ("mapped", fill_head)):
            supervisor.run(
                job_id, programs.python(code + "os.open('/dev/stderr', os.O_WRONLY)\n" + wait),
                output_max_bytes=MIB, output_policy=int(OutputPolicy.DROP_HEAD), **FILE,
            )  # fmt: skip
        for job_id in ("beyond", "mapped"):
            _wait_taken_back(supervisor, job_id)
        (tmp_path / "go").touch()
        for job_id in ("beyond", "mapped"):
            supervisor.wait_finished(job_id)
        assert supervisor.output("beyond") == b"here"


def test_caps_hold_without_inotify(state: Path) -> None:
    """Its instances are few, and other programs may have them all. The supervisor looks by the clock, and says so."""
    supervisor = SupervisorProcess(state)
    none = 'echo 0 > /proc/sys/user/max_inotify_instances && exec "$@"'
    supervisor.run_as = ["unshare", "-Ur", "sh", "-c", none, "sh"]
    supervisor.options = ("--containment", "subreaper")
    try:
        supervisor.start()
    except AssertionError as error:
        pytest.skip(f"no user namespace of our own: {error}")
    try:
        assert "inotify" in supervisor.client.ask("status")["output_degraded"]
        argv = programs.python("import os\nwhile True: os.write(1, bytes(65536))")
        for job_id, via in (("file", FILE), ("pipe", PIPE)):
            supervisor.run(job_id, argv, output_max_bytes=MIB, output_policy=int(OutputPolicy.STOP), **via)
            assert supervisor.wait_finished(job_id).outcome is Outcome.OUTPUT_LIMIT
    finally:
        os.kill(supervisor.pid, signal.SIGKILL)
        supervisor.kill()


LOOKED_AT_NO_MORE: Final = """
import os, sys
from pathlib import Path
from worker_svc.supervisor.spawn import _native
_native.pump_start(os.pipe2(os.O_NONBLOCK)[1])
reader, writer = os.pipe2(os.O_NONBLOCK)
handle = _native.pump_add(1, reader, os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT), 0, 0, 4096, False)
os.dup(reader)
os.write(writer, b"all")
os.close(writer)
assert _native.pump_finish(handle) == (3, 0, 0)
fds = [fd for fd in range(3, 20) if os.path.exists(f"/proc/self/fdinfo/{fd}")]
print("".join(Path(f"/proc/self/fdinfo/{fd}").read_text() for fd in fds).count(f"tfd: {reader:8} "))
"""


def test_an_output_that_is_over_is_looked_at_no_more(tmp_path: Path) -> None:
    """Whoever has a copy of its pipe: a child of another job has one, between its clone and its exec."""
    skip_unless_built(NATIVE)
    command = [sys.executable, "-c", LOOKED_AT_NO_MORE, str(tmp_path / "output")]
    assert subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE_S).stdout == "0\n"
