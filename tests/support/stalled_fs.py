"""A file system that hangs: every program on it is there, and opening one never ends, as on a dead NFS server.

`python stalled_fs.py MOUNT_POINT` mounts it (root and /dev/fuse needed), says `ready`, and serves until its standard
input ends. Once somebody waits in it, there is a file MOUNT_POINT.asked. Who waits can be killed (the kernel asks us to
interrupt the request, and we do); with --deaf not even that: it waits uninterruptibly (state D) until we end.
"""

from __future__ import annotations

import ctypes
import os
import select
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

LOOKUP, FORGET, GETATTR, OPEN, INIT, INTERRUPT, BATCH_FORGET = 1, 2, 3, 14, 26, 36, 42
ENOSYS, EINTR = 38, 4
MNT_DETACH = 2


class NotMounted(Exception):
    """There can be no such file system here; the text says why."""


@contextmanager
def mounted(mount_point: str, *options: str) -> Iterator[None]:
    """With the options of the program. Raises NotMounted."""
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise NotMounted("needs root and /dev/fuse for a file system that hangs")
    server = subprocess.Popen(
        [sys.executable, __file__, mount_point, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdout
    try:
        if server.stdout.readline() != "ready\n":
            raise NotMounted("FUSE cannot be mounted here")
        yield
    finally:
        server.communicate("")


@contextmanager
def mounted_or_skip(folder: Path, *options: str) -> Iterator[Path]:
    """Where it is mounted, in a new directory there."""
    import pytest  # not where this runs as a program

    mount_point = folder / "stalled"
    mount_point.mkdir()
    with ExitStack() as stack:
        try:
            stack.enter_context(mounted(str(mount_point), *options))
        except NotMounted as reason:
            pytest.skip(str(reason))
        yield mount_point


def attributes(node: int) -> bytes:
    mode = 0o40755 if node == 1 else 0o100755
    return struct.pack("<6Q10I", node, 4096, 8, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def serve(fd: int, asked: Path, is_deaf: bool) -> None:
    hanging: set[int] = set()
    while True:
        try:
            request = os.read(fd, 1 << 20)
        except OSError:  # unmounted
            return
        _, opcode, unique, node = struct.unpack_from("<IIQQ", request)
        body, error = b"", 0
        if opcode == INIT:
            body = struct.pack("<IIIIHHIIHHI7I", 7, 31, 65536, 0, 16, 12, 65536, 1, 1, 0, 0, *[0] * 7)
        elif opcode == LOOKUP:
            body = struct.pack("<4Q2I", 2, 0, 60, 60, 0, 0) + attributes(2)
        elif opcode == GETATTR:
            body = struct.pack("<QII", 60, 0, 0) + attributes(node)
        elif opcode == OPEN:
            hanging.add(unique)
            asked.touch()
            continue
        elif opcode in (FORGET, BATCH_FORGET):
            continue
        elif opcode == INTERRUPT:
            (unique,) = struct.unpack_from("<Q", request, 40)
            if is_deaf or unique not in hanging:
                continue
            hanging.discard(unique)
            error = -EINTR
        else:
            error = -ENOSYS
        os.write(fd, struct.pack("<IiQ", 16 + len(body), error, unique) + body)


def main(mount_point: str, *flags: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    if libc.mount(b"stalled", os.fsencode(mount_point), b"fuse.stalled", ctypes.c_ulong(0), options) < 0:
        sys.exit(f"mount: {os.strerror(ctypes.get_errno())}")
    threading.Thread(target=serve, args=(fd, Path(f"{mount_point}.asked"), "--deaf" in flags), daemon=True).start()
    print("ready", flush=True)
    select.select([sys.stdin], [], [])
    libc.umount2(os.fsencode(mount_point), MNT_DETACH)
    os._exit(0)  # the last fd of the connection closes, which aborts what hangs


if __name__ == "__main__":
    main(*sys.argv[1:])
