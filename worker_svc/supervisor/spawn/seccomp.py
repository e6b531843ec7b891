"""The one system call that a sandbox needs refused, since neither Landlock nor a namespace does: prlimit(2) on another
process of the same user. A limit of no CPU time would end it as surely as SIGKILL."""

from __future__ import annotations

import errno
import os
import struct
from typing import Final, NamedTuple

# linux/filter.h and linux/bpf_common.h, of which seccomp(2) takes these.
_LOAD, _AND, _EQUAL, _RETURN = 0x20, 0x54, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
# Where struct seccomp_data has them, on little-endian machines.
_NUMBER, _ARCH, _PID, _NEW_LIMIT = 0, 4, 16, 32
# The bit that x86_64 has in the number of each call of its x32 ABI.
_X32: Final = 0x40000000


class _Machine(NamedTuple):
    """AUDIT_ARCH of linux/audit.h and the number of prlimit64, of programs of 64 and of 32 bits."""

    arch: int
    number: int
    arch_32: int
    number_32: int


_MACHINES: Final = {
    "x86_64": _Machine(0xC000003E, 302, 0x40000003, 340),
    "aarch64": _Machine(0xC00000B7, 261, 0x40000028, 369),
}


def limits_of_others_refused() -> bytes:
    """A filter for seccomp(2): prlimit64 may read limits, and set those of pid 0, who calls. Empty: there is none for
    this machine."""
    machine = _MACHINES.get(os.uname().machine)
    if machine is None:
        return b""
    steps = (
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 0, 3, machine.arch),
        (_LOAD, 0, 0, _NUMBER),
        (_AND, 0, 0, 0xFFFFFFFF & ~_X32),
        (_EQUAL, 3, 10, machine.number),
        (_EQUAL, 0, 9, machine.arch_32),
        (_LOAD, 0, 0, _NUMBER),
        (_EQUAL, 0, 7, machine.number_32),
        (_LOAD, 0, 0, _PID),
        (_EQUAL, 5, 0, 0),
        (_LOAD, 0, 0, _NEW_LIMIT),
        (_EQUAL, 0, 2, 0),
        (_LOAD, 0, 0, _NEW_LIMIT + 4),
        (_EQUAL, 1, 0, 0),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
        (_RETURN, 0, 0, _ALLOW),
    )
    return b"".join(struct.pack("=HBBI", *step) for step in steps)
