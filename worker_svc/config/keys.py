"""All keys of all sections, with the names they have as flags and variables."""

from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from worker_svc.config.kinds import Kind
from worker_svc.config.sections import Config
from worker_svc.config.values import toml_value


@dataclass(frozen=True, slots=True, eq=False)
class Key:
    """One key, for parsers of the command line and for documentation."""

    section: str
    name: str
    kind: Kind[Any]
    default: object
    """As it would stand in the file."""
    doc: str

    @property
    def path(self) -> str:
        """`jobs.slots`: the key of `overrides`, and what messages call it."""
        return f"{self.section}.{self.name}"

    @property
    def flag(self) -> str:
        return flag_name(self.section, self.name)

    @property
    def variable(self) -> str:
        return variable_name(self.section, self.name)

    @property
    def type_name(self) -> str:
        """ "integer", "boolean", "path", "address", …"""
        return self.kind.type_name

    @property
    def expects(self) -> str:
        """What a good value is: "a whole number from 0 to 100000"."""
        return self.kind.expects

    @property
    def default_toml(self) -> str:
        return toml_value(self.default)


@cache
def keys() -> tuple[Key, ...]:
    """All keys, in the order of the sections and their fields."""
    return tuple(
        Key(section, item.name, item.metadata["kind"], item.metadata["default"], item.metadata["doc"])
        for section, made_by in section_types().items()
        for item in fields(made_by)
    )


@cache
def section_types() -> dict[str, type[Any]]:
    """The class of each section by its name."""
    found: dict[str, type[Any]] = {}
    for item in fields(Config):
        assert isinstance(item.type, type)
        found[item.name] = item.type
    return found


def flag_name(section: str, key: str) -> str:
    """`--jobs-slots` for `jobs`, `slots`."""
    return f"--{section}-{key}".replace("_", "-")


def variable_name(section: str, key: str) -> str:
    """`WORKER_SVC_JOBS_SLOTS` for `jobs`, `slots`."""
    return f"WORKER_SVC_{section}_{key}".upper()
