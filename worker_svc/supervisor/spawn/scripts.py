"""Why the kernel does not run a script: its first line as the kernel reads it, and the interpreter that it names."""

from __future__ import annotations

import errno
import os
import re
import stat
from typing import Final

from worker_svc.job import name_of

# execve(2) looks no further for an interpreter (BINPRM_BUF_SIZE in include/uapi/linux/binfmts.h).
_READ_MAX_BYTES: Final = 256
# Interpreters that are scripts in their turn (exec_binprm in fs/exec.c).
_SCRIPTS_MAX: Final = 5
_BEFORE: Final = b"\xef\xbb\xbf \t\r\n"


def head_of(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(_READ_MAX_BYTES)
    except OSError:  # unreadable: then there is nothing of it that we could name
        return b""


def interpreter_of(head: bytes) -> tuple[str, bool]:
    """As the kernel reads it (load_script in fs/binfmt_script.c), and whether it is whole. Empty: it names none."""
    line, newline, _ = head.removeprefix(b"#!").partition(b"\n")
    name, *more = re.split(rb"[ \t\0]", line.strip(b" \t"), maxsplit=1)
    return os.fsdecode(name), bool(newline or more) or len(head) < _READ_MAX_BYTES


def script_problem(path: str, cwd: str, number: int, depth: int = 0) -> str:
    """What is wrong with a script that failed with this errno; empty: it is none, or nothing shows from here."""
    head = head_of(path)
    if not head.startswith(b"#!") or depth > _SCRIPTS_MAX:
        return ""
    name, is_whole = interpreter_of(head)
    if not name:
        return "its first line names no interpreter after #!"
    if not is_whole:
        return (
            f"its interpreter is cut off: of the first line, the kernel reads {_READ_MAX_BYTES - 1} bytes; "
            "name it by a shorter path, such as that of a symbolic link"
        )
    if name.endswith("\r"):
        return (
            f"its interpreter '{name_of(name[:-1])}\\r' cannot be run: its lines end in CR LF, as on Windows: "
            "convert it, with dos2unix or sed -i 's/\\r$//'"
        )
    interpreter = os.path.join(cwd, name)
    why = file_problem(interpreter, number)
    if why.startswith("is "):
        why = f"it {why}"
    if number == errno.ELOOP and not why:
        return (
            f"its interpreter {name_of(name)!r} is a script, and in the end its own interpreter, or one that takes "
            f"more than {_SCRIPTS_MAX} scripts in a row: name a program, such as a shell"
        )
    why = why or script_problem(interpreter, cwd, number, depth + 1)
    if why and not name.startswith("/"):
        why += "; #! takes a whole path, such as /usr/bin/env with a name after it"
    return f"its interpreter {name_of(name)!r} cannot be run: {why}" if why else ""


def file_problem(path: str, number: int) -> str:
    """What is wrong with a file that was executed and failed with this errno; empty: nothing shows from here."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        return (error.strerror or str(error)).lower()
    if stat.S_ISDIR(mode):
        return "is a directory, not a program"
    if number == errno.EACCES and not os.access(path, os.X_OK):
        if mode & 0o111 and os.statvfs(path).f_flag & os.ST_NOEXEC:
            return "is on a file system mounted with noexec"
        return "is not executable: chmod +x it, or make it the path of a command such as bash"
    head = head_of(path)
    if number == errno.ENOENT and head.startswith(b"\x7fELF"):
        return "the loader that it asks for is not here: it was made for another C library, or another machine"
    if number == errno.ENOEXEC and not head.startswith(b"#!"):
        if head.lstrip(_BEFORE).startswith(b"#!"):
            return "its #! is not at the very beginning: a blank, an empty line or a byte order mark comes before it"
        return (
            "is not a program for this machine; a script must begin with #! and its interpreter, or be the path of a "
            "command such as bash"
        )
    return ""
