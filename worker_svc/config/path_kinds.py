"""The kinds of value that name a place: files, directories, addresses. Relative ones are completed at load."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from worker_svc.address import MAX_UNIX_PATH_BYTES, Address
from worker_svc.config.errors import Invalid
from worker_svc.config.kinds import Kind, Place
from worker_svc.config.values import quote, show


def absolute_path(text: str) -> str:
    """Raises ValueError."""
    if not text.startswith("/"):
        raise ValueError(f"must be an absolute path, not {quote(text)}")
    if "\0" in text:
        raise ValueError("must not contain NUL")
    return text


class FilePath(Kind[Path | None]):
    """A path, None when empty; relative ones are resolved against the place the value was written at."""

    type_name = "path"
    expects = "a path"

    def from_toml(self, value: object) -> Path | None:
        return _path(self, value)

    def resolve(self, value: Path | None, place: Place) -> Path | None:
        return value and place.base / value


# What an empty path is parsed to. Told by identity: the path "." is equal and means something else.
_UNSET = Path()


class Directory(Kind[Path]):
    """A path; when empty, the one that `default` says."""

    type_name = "path"
    expects = "a path"

    def __init__(self, default: Callable[[Place], Path]) -> None:
        self._default = default

    def from_toml(self, value: object) -> Path:
        return _path(self, value) or _UNSET

    def resolve(self, value: Path, place: Place) -> Path:
        return _told(self._default(place) if value is _UNSET else place.base / value)


def default_state_dir(place: Place) -> Path:
    """The first that the environment gives a home to."""
    environ = place.environ
    # systemd lists several directories when the unit has several; the first is the main one.
    candidates = (
        Path(environ.get("STATE_DIRECTORY", "").split(":")[0]),
        Path(environ.get("XDG_STATE_HOME", "")) / "worker-svc",
        Path(environ.get("HOME", "")) / ".local/state/worker-svc",
    )
    for candidate in candidates:
        # The XDG specification has relative paths ignored; an unset variable leaves one too.
        if candidate.is_absolute():
            return candidate
    raise Invalid(
        "no directory to keep state in: none of $STATE_DIRECTORY, $XDG_STATE_HOME and $HOME is set to an "
        "absolute path; set state.dir"
    )


def _told(path: Path) -> Path:
    """One that clients are told of, and jobs' records: gRPC, SQLite and JSON hold no bytes but UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise Invalid(f"{quote(str(path))} is not UTF-8, so that clients cannot be told of it: name another") from None
    return path


def _path(kind: Kind[Any], value: object) -> Path | None:
    if not isinstance(value, str):
        raise kind.refuse(value)
    if "\0" in value:
        raise kind.refuse(value, "it contains NUL")
    if value.startswith("~"):
        raise kind.refuse(value, "~ is not expanded here, write the whole path")
    return Path(value) if value else None


class ListenAddress(Kind[Address]):
    type_name = "address"
    expects = "host:port, [ipv6]:port or unix:/path"

    def from_toml(self, value: object) -> Address:
        return _address(self, value)

    def resolve(self, value: Address, place: Place) -> Address:
        return _resolve_address(value, place)


class DialAddress(Kind[Address | None]):
    """An address that someone connects to: it needs a host and a port. None when empty."""

    type_name = "address"
    expects = "host:port, [ipv6]:port or unix:/path (or empty)"

    def from_toml(self, value: object) -> Address | None:
        if value == "":
            return None
        address = _address(self, value)
        if not address.is_unix and not address.host:
            raise self.refuse(value, "the host is missing")
        if not address.is_unix and not address.port:
            raise self.refuse(value, "port 0 can't be connected to")
        return address

    def resolve(self, value: Address | None, place: Place) -> Address | None:
        return value and _resolve_address(value, place)


def _address(kind: Kind[Any], value: object) -> Address:
    if not isinstance(value, str):
        raise kind.refuse(value)
    try:
        return Address.parse(value)
    except ValueError as error:
        raise kind.refuse(value, str(error)) from error


def _resolve_address(address: Address, place: Place) -> Address:
    if not address.is_unix:
        return address
    path = str(_told(place.base / address.unix_path))
    size = len(os.fsencode(path))
    if size > MAX_UNIX_PATH_BYTES:
        raise Invalid(f"the socket's path {show(path)} has {size} bytes; at most {MAX_UNIX_PATH_BYTES} are possible")
    return address._replace(unix_path=path)
