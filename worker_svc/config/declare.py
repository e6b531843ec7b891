"""How sections declare their keys."""

from collections.abc import Iterator
from dataclasses import field
from typing import TypeVar, cast

from worker_svc.config.kinds import Kind

T = TypeVar("T")

# A wait of nothing would turn a retry into a busy loop.
A_MOMENT_S = 0.001

Conflict = tuple[tuple[str, ...], str]
"""The keys of a section that do not go together, the one to blame first, and why."""


def declare(default: object, kind: Kind[T], doc: str, *, at_load: bool = False) -> T:
    """Declare a key; `default` as in the file. `at_load`: the real default is only known at load."""
    metadata = {"default": default, "kind": kind, "doc": doc}
    if at_load:
        return cast(T, field(metadata=metadata))
    return field(default=kind.from_toml(default), metadata=metadata)


class Section:
    """What all sections share."""

    __slots__ = ()

    def conflicts(self) -> Iterator[Conflict]:
        """Keys that are good alone and bad together."""
        return iter(())
