"""Becomes the job: `python -I -S launcher.py ORDER_FD ERROR_FD`, started by fallback.py; imports nothing of ours.

Carries out in one single-threaded process what _child.h does after the clone, then executes the program. On ERROR_FD,
which closes on success, it says `E` before it executes, and on failure `{STEP ERRNO CANDIDATE`.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found] # not `signal`, whose enums take milliseconds
import ctypes
import errno
import marshal
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

AT_CGROUP, AT_EXEC = -3, -6
CLONE_NEWUSER = 0x10000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_SLAVE = 1, 2, 4, 8, 16384, 1 << 19
PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 38, 47, 4
PRLIMIT_ARGUMENTS = (ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
SECCOMP = {"x86_64": 317, "aarch64": 277}.get(os.uname().machine, -1)
OPENAT2, LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 437, 444, 445, 446
LANDLOCK_READ, LANDLOCK_FILE = 1 << 0 | 1 << 2 | 1 << 3, 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15 | 1 << 16

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
libc.prlimit.argtypes = PRLIMIT_ARGUMENTS
ruleset = -1
handled = 0


def check(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result


def number(value: int) -> ctypes.c_ulong:
    return ctypes.c_ulong(value)


def write_file(a: int, b: int, c: int, data: bytes) -> None:
    path, text = data[: len(data) - b].rstrip(b"\0"), data[len(data) - b :]
    put(path, text)


def put(path: str | bytes, text: bytes, dir_fd: int | None = None) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        os.write(fd, text)
    finally:
        os.close(fd)


def rlimit(a: int, soft: int, hard: int, data: bytes) -> None:
    check(libc.prlimit(0, a, (ctypes.c_uint64 * 2)(soft, hard), None))


def affinity(a: int, b: int, c: int, data: bytes) -> None:
    wanted = {bit for bit in range(len(data) * 8) if data[bit // 8] >> bit % 8 & 1}
    os.sched_setaffinity(0, wanted)
    if os.sched_getaffinity(0) != wanted:  # the kernel narrows it without a word
        raise OSError(errno.EINVAL, "")


def unshare(a: int, b: int, c: int, data: bytes) -> None:
    if libc.unshare(a) == 0:
        return
    if ctypes.get_errno() != errno.EPERM or not data:
        check(-1)
    check(libc.unshare(a | CLONE_NEWUSER))
    put("/proc/self/setgroups", b"deny")
    put("/proc/self/uid_map", data[:b])
    put("/proc/self/gid_map", data[b:])


def cover(path: bytes, flags: int, mode: bytes) -> int:
    check(libc.mount(None, b"/", None, number(MS_REC | MS_SLAVE), None))
    return check(libc.mount(b"tmpfs", path, b"tmpfs", number(MS_NOSUID | MS_NODEV | flags), mode))


def hide(a: int, b: int, c: int, data: bytes) -> None:
    try:
        check(libc.unshare(a) if a else 0)
        cover(data, MS_NOEXEC | MS_RDONLY, b"mode=700")
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EACCES, errno.ENOENT):
            raise


def loopback(a: int, b: int, c: int, data: bytes) -> None:
    fd = check(libc.socket(2, 2 | os.O_CLOEXEC, 0))  # AF_INET, SOCK_DGRAM
    request = b"lo".ljust(16, b"\0") + (1 | 64).to_bytes(2, sys.byteorder) + bytes(22)  # IFF_UP, IFF_RUNNING
    try:
        check(libc.ioctl(fd, number(0x8914), request))  # SIOCSIFFLAGS
    finally:
        os.close(fd)


def refuse_calls(a: int, b: int, c: int, data: bytes) -> None:
    steps = ctypes.create_string_buffer(data)
    program = (len(data) // 8).to_bytes(8, sys.byteorder) + ctypes.addressof(steps).to_bytes(8, sys.byteorder)
    if data and libc.syscall(SECCOMP, 1, 4, program) < 0 and ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS):
        check(-1)


def landlock(a: int, b: int, c: int, data: bytes) -> None:
    global ruleset, handled
    abi = libc.syscall(LANDLOCK_CREATE, None, number(0), 1)
    if not b and abi < 6:
        return
    if check(abi) < a:
        raise OSError(errno.EOPNOTSUPP, "")
    handled = 0 if not b else 0x1FFFF if abi >= 9 else 0xFFFF if abi >= 5 else 0x7FFF
    fields = (handled, 0, 3) if abi >= 6 else (handled,)
    attributes = b"".join(field.to_bytes(8, sys.byteorder) for field in fields)
    ruleset = check(libc.syscall(LANDLOCK_CREATE, attributes, number(len(attributes)), 0))


def landlock_rule(writable: int, no_links: int, c: int, data: bytes) -> None:
    if no_links:
        how = b"".join(field.to_bytes(8, sys.byteorder) for field in (os.O_PATH | os.O_CLOEXEC, 0, 4))
        fd = check(libc.syscall(OPENAT2, -100, data, how, number(len(how))))  # AT_FDCWD, RESOLVE_NO_SYMLINKS
    else:
        fd = os.open(data, os.O_PATH | os.O_CLOEXEC)
    rights = handled if writable else LANDLOCK_READ
    try:
        if landlock_add(fd, rights) < 0:
            if ctypes.get_errno() != errno.EINVAL:
                check(-1)
            check(landlock_add(fd, rights & LANDLOCK_FILE))
    finally:
        os.close(fd)


def landlock_add(fd: int, rights: int) -> int:
    rule = rights.to_bytes(8, sys.byteorder) + fd.to_bytes(4, sys.byteorder)
    return int(libc.syscall(LANDLOCK_ADD, ruleset, 1, rule, 0))


def change_directory(device: int, inode: int, c: int, path: bytes) -> None:
    os.chdir(path)
    if inode:
        found = os.stat(".")
        if (found.st_dev, found.st_ino) != (device, inode % 2**64) or os.getcwdb() != path:
            raise OSError(errno.ESTALE, "")


def gids_of(data: bytes) -> list[int]:
    return [int.from_bytes(data[at : at + 4], sys.byteorder) for at in range(0, len(data), 4)]


STEPS: dict[int, Callable[[int, int, int, bytes], object]] = {
    1: write_file,
    2: rlimit,
    3: lambda a, b, c, data: os.setpriority(os.PRIO_PROCESS, 0, a),
    4: affinity,
    5: lambda a, b, c, data: os.umask(a),
    6: unshare,
    7: lambda a, b, c, data: cover(b"/tmp", 0, b"mode=1777"),
    8: loopback,
    9: lambda a, b, c, data: os.setgroups(gids_of(data)),
    10: lambda a, b, c, data: os.setresgid(a, a, a),
    11: lambda a, b, c, data: os.setresuid(a, a, a),
    12: lambda a, b, c, data: check(libc.prctl(PR_CAP_AMBIENT, *map(number, (PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)))),
    13: change_directory,
    14: lambda a, b, c, data: check(libc.prctl(PR_SET_NO_NEW_PRIVS, *map(number, (1, 0, 0, 0)))),
    15: landlock,
    16: landlock_rule,
    17: lambda a, b, c, data: ruleset >= 0 and check(libc.syscall(LANDLOCK_RESTRICT, ruleset, 0)),
    18: hide,
    19: refuse_calls,
}


def strings(texts: list[bytes]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * (len(texts) + 1))(*texts, None)


def execute(
    exec_fd: int, candidates: list[bytes], argv: ctypes.Array[ctypes.c_char_p], env: ctypes.Array[ctypes.c_char_p]
) -> tuple[int, int]:
    refused, tried, error = 0, 0, errno.ENOENT
    if exec_fd >= 0:
        libc.fexecve(exec_fd, argv, env)
        error = ctypes.get_errno()
        if error not in (errno.ENOENT, errno.ENOSYS):  # a script goes by its name, see _child.h
            return error, 0
    for index, path in enumerate(candidates):
        libc.execve(path, argv, env)
        error = ctypes.get_errno()
        if error == errno.EACCES and not refused:
            refused, tried = error, index
        elif error not in (errno.EACCES, errno.ENOENT, errno.ENOTDIR):
            return error, index
    return refused or error, tried


def main() -> None:
    order_fd, error_fd = int(sys.argv[1]), int(sys.argv[2])
    os.set_inheritable(error_fd, False)
    with open(order_fd, "rb") as file:
        order = marshal.load(file)  # noqa: S302 - from our parent, by an fd that only we have
    if order["exec_fd"] >= 0:
        os.set_inheritable(order["exec_fd"], False)
    # Made before any limit on memory holds.
    candidates, argv, env = order["candidates"], strings(order["argv"]), strings(order["env"])
    at = AT_CGROUP
    try:
        if order["cgroup_fd"] >= 0:
            put("cgroup.procs", b"0", order["cgroup_fd"])
            os.close(order["cgroup_fd"])
        for index, (op, a, b, c, data) in enumerate(order["steps"]):
            at = index
            STEPS[op](a, b, c, data)
    except OSError as error:
        fail(error_fd, at, error.errno, 0)
    except MemoryError:
        fail(error_fd, at, errno.ENOMEM, 0)
    for signum in range(1, 65):
        if signum not in (9, 19, 32, 33):  # SIGKILL and SIGSTOP cannot be set; the other two are libc's own
            _signal.signal(signum, _signal.SIG_DFL)
    _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
    os.write(error_fd, b"E")
    fail(error_fd, AT_EXEC, *execute(order["exec_fd"], candidates, argv, env))


def fail(error_fd: int, at: int, error: int | None, tried: int) -> NoReturn:
    os.write(error_fd, b"{%d %d %d" % (at, error or errno.EIO, tried))
    os._exit(127)


main()
