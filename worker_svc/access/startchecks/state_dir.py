"""Whether a directory may be a state directory. It would be closed to all others, and filled."""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Final

from worker_svc.config import Address, Config
from worker_svc.record import statedir

# As the FHS has them; in containers they can be empty.
_EVERYBODYS: Final = ("/tmp", "/var/tmp", "/dev/shm", "/run")  # noqa: S108


def problems_of(config: Config, config_file: Path | None) -> Iterator[str]:
    """Nothing is changed by looking."""
    state_dir = config.state.dir
    try:
        found = state_dir.stat()
        if not stat.S_ISDIR(found.st_mode):
            yield f"{state_dir}: is no directory: name another"
            return
        if found.st_uid != os.geteuid():
            yield (
                f"{state_dir}: belongs to user {found.st_uid}, who could change what jobs run: "
                f"chown -R {os.geteuid()} {shlex.quote(str(state_dir))}, or set another"
            )
        wrong = statedir.what_is_wrong(str(state_dir))
        if not wrong and not statedir.has_store(str(state_dir)):
            wrong = _what_is_foreign(state_dir, _own_files(config, config_file))
        if any(Path(shared).exists() and state_dir.samefile(shared) for shared in _EVERYBODYS):
            wrong = f"{state_dir}: is there for everybody, and would be closed to them: name one below it, or another"
        if wrong:
            yield wrong
        elif not os.access(state_dir, os.R_OK | os.W_OK | os.X_OK):
            yield f"{state_dir}: {_why_not_writable(state_dir)}"
    except (FileNotFoundError, NotADirectoryError):
        yield from _why_not_made(state_dir)
    except OSError as error:
        yield f"{state_dir}: {error.strerror}"


def _why_not_made(state_dir: Path) -> Iterator[str]:
    if state_dir.is_symlink():
        yield f"{state_dir}: is a link to {state_dir.readlink()}, which is not there"
        return
    above = next(folder for folder in state_dir.parents if os.path.lexists(folder))
    if not above.is_dir():
        yield f"{state_dir}: cannot be made: {above} is no directory"
    elif not os.access(above, os.W_OK | os.X_OK):
        yield f"{state_dir}: cannot be made: {above}: {_why_not_writable(above)}"


def _why_not_writable(folder: Path) -> str:
    return "is on a read-only file system" if os.statvfs(folder).f_flag & os.ST_RDONLY else "permission denied"


def _what_is_foreign(state_dir: Path, own: list[Path]) -> str:
    """What speaks against a directory that has no store."""
    ours = {path.relative_to(state_dir).parts[:1] for path in own if path.is_relative_to(state_dir)}
    names = [name for name in statedir.foreign_names(str(state_dir)) if (name,) not in ours]
    if names:
        what = f"is no state directory, and not empty ({statedir.shown(names)})"
        return f"{state_dir}: {what}: name one that is empty, or not there yet"
    return ""


def _own_files(config: Config, config_file: Path | None) -> list[Path]:
    """What the configuration names may lie in there, and the log is made before we look."""
    sections = (config.grpc_server, config.scheduler, config.log)
    named = [getattr(section, item.name) for section in sections for item in fields(section)]
    sockets = [Path(value.unix_path) for value in named if isinstance(value, Address) and value.is_unix]
    return [path.absolute() for path in (*named, *sockets, config_file) if isinstance(path, Path)]
