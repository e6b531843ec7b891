"""What must be right with files and addresses before the worker may serve; each text has the command that mends it."""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Final, NamedTuple

from worker_svc.access.startchecks.own_jobs import what_jobs_can_do
from worker_svc.access.startchecks.policy_files import dangers_to_policy
from worker_svc.access.startchecks.state_dir import problems_of
from worker_svc.access.startchecks.trust import Danger, Who, is_others, who_else_can_replace
from worker_svc.config import Config

_GROUP_OR_OTHERS: Final = 0o077


class Finding(NamedTuple):
    is_error: bool
    text: str


def check(config: Config, config_file: Path | None, *, is_named: bool) -> list[Finding]:
    """`config_file`: the one in use; `is_named`: not just found in the current directory."""
    found = chain(
        _check_address(config),
        check_tls_files(config),
        _check_unix_path(config),
        _check_state_dir(config, config_file),
        _check_log(config.log.file),
        _check_policy(config),
        _check_own_jobs(config),
        _check_config_file(config_file, config, is_named) if config_file is not None else (),
    )
    return list(dict.fromkeys(found))


def _finding(danger: Danger, key: str, what: str, *, user_is_error: bool = True) -> Finding:
    """A group is one that the administrator has made: that it may is a warning."""
    is_error = danger.who is Who.EVERYBODY or (danger.who is Who.USER and user_is_error)
    return Finding(is_error, f"{key}: {danger.text(what)}" if key else danger.text(what))


def mend_state_dir(state_dir: Path) -> str:
    """Closes a state directory of ours that is open to others. Returns what was done; empty: nothing had to be."""
    found = state_dir.stat()
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid != os.geteuid() or not mode & _GROUP_OR_OTHERS:
        return ""
    state_dir.chmod(0o700)
    return f"{state_dir} was open to other users (mode {mode:04o}): now it is not (0700)"


def _check_address(config: Config) -> Iterator[Finding]:
    server = config.grpc_server
    for names, text in server.conflicts():
        if names[0] == "addr":
            yield Finding(True, f"grpc_server.addr: {text}")
    if server.addr.is_loopback:
        return
    if server.insecure and not (server.use_tls and server.client_ca_file):
        whom = "everybody who can reach it" if config.access.anonymous != "none" else "nobody"
        tls = "without client certificates" if server.use_tls else "without TLS"
        yield Finding(
            False,
            f"grpc_server.insecure: serves on {server.addr} {tls}: {whom} has the role access.anonymous "
            f"({config.access.anonymous}) and can {'run commands' if config.access.anonymous != 'none' else 'call'}"
            f"{'' if server.use_tls else ', and whoever is in between can read and change all that is sent'}",
        )
    access = config.access
    patterns = (*access.admins, *access.operators, *access.submitters, *access.viewers)
    if server.client_ca_file and all(pattern.startswith("uid:") for pattern in patterns):
        yield Finding(
            False,
            "access: no certificate has a role, so that nobody can do anything: name some, as in "
            'access.admins = ["dns:admin"]',
        )


def check_tls_files(config: Config) -> Iterator[Finding]:
    server, scheduler = config.grpc_server, config.scheduler
    if server.use_tls:
        yield from _check_key("grpc_server.key_file", server.key_file)
        yield from _check_tls_file("grpc_server.crt_file", server.crt_file, "the worker's certificate")
        yield from _check_tls_file("grpc_server.client_ca_file", server.client_ca_file, "who is let in, as whom")
        yield from _check_tls_file("grpc_server.crl_file", server.crl_file, "who is let in")
    if scheduler.use_tls:
        yield from _check_key("scheduler.key_file", scheduler.key_file)
        yield from _check_tls_file("scheduler.crt_file", scheduler.crt_file, "the worker's certificate")
        yield from _check_tls_file("scheduler.ca_file", scheduler.ca_file, "who is taken for the scheduler")


def _check_tls_file(key: str, path: Path | None, what: str) -> Iterator[Finding]:
    # That it is missing is told where it is read.
    return (_finding(danger, key, what) for danger in (who_else_can_replace(path) if path is not None else ()))


def _check_key(name: str, path: Path | None) -> Iterator[Finding]:
    found = _stat(path)
    if path is None or found is None:
        return
    mode = stat.S_IMODE(found.st_mode)
    shown = f"{name}: {path}: the private key"
    if mode & 0o027:
        whom = "readable by everybody" if mode & 0o004 else "open to other users"
        yield Finding(True, f"{shown} is {whom} (mode {mode:04o}): chmod 600 {_quote(path)}")
    elif mode & 0o050:
        yield Finding(False, f"{shown} is readable by its group (mode {mode:04o}): chmod 600 {_quote(path)}")
    if is_others(found.st_uid):
        text = f"{shown} belongs to user {found.st_uid}, who can change it: chown {os.geteuid()} {_quote(path)}"
        yield Finding(True, text)
    yield from (_finding(danger, name, "the private key") for danger in who_else_can_replace(path, leaf=False))


def _check_unix_path(config: Config) -> Iterator[Finding]:
    if not config.grpc_server.addr.is_unix:
        return
    path = Path(config.grpc_server.addr.unix_path)
    folder = _stat(path.parent)
    if folder is not None and folder.st_mode & 0o022 and not folder.st_mode & stat.S_ISVTX:
        yield Finding(
            True,
            f"grpc_server.addr: {path.parent}: others can put a socket of their own in the place of the worker's "
            f"(mode {stat.S_IMODE(folder.st_mode):04o}): chmod go-w {_quote(path.parent)}",
        )
    for danger in who_else_can_replace(path, leaf=False):
        if danger.who is Who.USER or danger.path != path.parent:
            yield _finding(danger, "grpc_server.addr", "where the worker's socket is")
    found = _lstat(path)
    if found is not None and not stat.S_ISSOCK(found.st_mode):
        yield Finding(True, f"grpc_server.addr: {path}: is there already and no socket: mv it away")
    elif found is not None and found.st_uid != os.geteuid():
        yield Finding(True, f"grpc_server.addr: {path}: belongs to user {found.st_uid}: rm {_quote(path)}")


def check_unix_socket(path: Path, mode: int) -> None:
    """Sets the mode of the socket that was made, and looks whether it is ours. Raises PermissionError."""
    path.chmod(mode)
    found = path.lstat()
    if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) != mode:
        raise PermissionError(f"{path}: is not the socket that was made there, or not with mode {mode:04o}")


def _check_state_dir(config: Config, config_file: Path | None) -> Iterator[Finding]:
    for text in problems_of(config, config_file):
        yield Finding(True, f"state.dir: {text}")
    for danger in who_else_can_replace(config.state.dir, leaf=False):
        yield _finding(danger, "state.dir", "what jobs run")


def _check_log(path: Path | None) -> Iterator[Finding]:
    if path is not None:
        for danger in who_else_can_replace(path):
            yield _finding(danger, "log.file", "what the log says", user_is_error=False)


def _check_policy(config: Config) -> Iterator[Finding]:
    """A warning where it is one user or group: it may be theirs to say what jobs run."""
    for key, danger in dangers_to_policy(config.policy):
        yield _finding(danger, key, "what the policy allows", user_is_error=False)


def _check_own_jobs(config: Config) -> Iterator[Finding]:
    text = what_jobs_can_do(config)
    if text:
        yield Finding(False, text)


def _check_config_file(path: Path, config: Config, is_named: bool) -> Iterator[Finding]:
    found = _stat(path)
    if found is None or not stat.S_ISREG(found.st_mode):
        return
    mode = stat.S_IMODE(found.st_mode)
    if mode & stat.S_IWOTH:
        yield Finding(True, f"{path}: everybody can change what jobs run (mode {mode:04o}): chmod go-w {_quote(path)}")
    elif mode & stat.S_IWGRP:
        text = f"{path}: its group can change what jobs run (mode {mode:04o}): chmod g-w {_quote(path)}"
        yield Finding(False, text)
    if is_others(found.st_uid):
        text = f"{path}: belongs to user {found.st_uid}, who can change what jobs run: chown {os.geteuid()} "
        # One that merely lay where the worker was started may be a trap.
        yield Finding(not is_named, text + _quote(path))
    for danger in who_else_can_replace(path, leaf=False):
        yield _finding(danger, "", "what jobs run", user_is_error=not is_named)
    if mode & stat.S_IROTH and config.jobs.env:
        text = f"{path}: everybody can read it, and jobs.env may hold secrets: chmod 640 {_quote(path)}"
        yield Finding(False, text)


def _quote(path: Path) -> str:
    return shlex.quote(str(path))


def _stat(path: Path | None) -> os.stat_result | None:
    try:
        return None if path is None else path.stat()
    except OSError:
        return None


def _lstat(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except OSError:
        return None
