"""As whom a job runs, and what of the machine it gets to see."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from worker_svc.job.errors import InvalidArgument
from worker_svc.job.texts import name_of

PATHS_MAX: Final = 256
GROUPS_MAX: Final = 1024
_NAME_MAX_BYTES: Final = 256
# PATH_MAX of limits.h without its NUL: the kernel takes no longer path.
PATH_MAX_BYTES: Final = 4095


class Identity(NamedTuple):
    """As whom a job runs; names or ids, empty for the supervisor's own."""

    user: str = ""
    group: str = ""
    """Empty: the user's primary group."""
    groups: tuple[str, ...] | None = None
    """Supplementary groups. None: those that the user has in the group database (initgroups(3)); empty: none."""
    no_new_privs: bool = True
    """Whether no program that the job runs can gain privileges: setuid and setgid bits and file capabilities are
    ignored (PR_SET_NO_NEW_PRIVS)."""

    def validate(self, prefix: str = "identity") -> None:
        """Raises InvalidArgument for the first field that is malformed, whatever the machine."""
        _check_name(f"{prefix}.user", self.user, may_be_empty=True)
        _check_name(f"{prefix}.group", self.group, may_be_empty=True)
        if self.groups is None:
            return
        if len(self.groups) > GROUPS_MAX:
            raise InvalidArgument(f"{prefix}.groups", f"must be at most {GROUPS_MAX}, not {len(self.groups)}")
        for name in self.groups:
            _check_name(f"{prefix}.groups", name)

    def to_json(self) -> dict[str, Any]:
        """A JSON object of the fields that are not at their defaults."""
        return {name: value for name, value in self._asdict().items() if value != self._field_defaults[name]}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Identity:
        """The inverse of `to_json`; fields of a newer version are an error, TypeError."""
        return cls(**_with_tuples(fields, "groups"))


class Sandbox(NamedTuple):
    """What of the machine a job gets to see. With any path given, nothing but the paths given can be reached (and
    /dev/null, zero, full, random, urandom); `read_only_paths=("/",)` keeps all readable and runnable."""

    read_only_paths: tuple[str, ...] = ()
    """May be read, listed and executed, with all beneath."""
    read_write_paths: tuple[str, ...] = ()
    """May be changed too."""
    private_tmp: bool = False
    """An empty /tmp of its own, gone with the job's last process."""
    no_network: bool = False
    """A network namespace of its own that has only a loopback interface."""

    def validate(self, prefix: str = "sandbox") -> None:
        """Raises InvalidArgument for the first field that is malformed, whatever the machine."""
        for name, paths in (("read_only_paths", self.read_only_paths), ("read_write_paths", self.read_write_paths)):
            field = f"{prefix}.{name}"
            if len(paths) > PATHS_MAX:
                raise InvalidArgument(field, f"must be at most {PATHS_MAX}, not {len(paths)}")
            for index, path in enumerate(paths):
                if not path.startswith("/"):
                    raise InvalidArgument(field, f"must be absolute paths, which entry {index} is not")
                if "\0" in path:
                    raise InvalidArgument(field, "must not contain a NUL character")
                if len(path.encode("utf-8", "surrogateescape")) > PATH_MAX_BYTES:
                    raise InvalidArgument(field, f"must be at most {PATH_MAX_BYTES} bytes each")

    def to_json(self) -> dict[str, Any]:
        """A JSON object of the fields that are not at their defaults."""
        return {name: value for name, value in self._asdict().items() if value != self._field_defaults[name]}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Sandbox:
        """The inverse of `to_json`; fields of a newer version are an error, TypeError."""
        return cls(**_with_tuples(fields, "read_only_paths", "read_write_paths"))


def _with_tuples(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    """What JSON has made lists of; a copy."""
    return {name: tuple(value) if name in names and value is not None else value for name, value in fields.items()}


def _check_name(field: str, name: str, *, may_be_empty: bool = False) -> None:
    if not name and not may_be_empty:
        raise InvalidArgument(field, "must not be empty")
    if not name.isprintable() or ":" in name:
        raise InvalidArgument(field, f"is no name and no id: {name_of(name)!r}")
    if len(name.encode()) > _NAME_MAX_BYTES:
        raise InvalidArgument(field, f"must be at most {_NAME_MAX_BYTES} bytes")
