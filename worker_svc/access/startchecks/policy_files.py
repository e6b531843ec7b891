"""The files that the policy allows to be run: who else can change them."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from worker_svc.access.startchecks.trust import Danger, Who, who_else_can_replace, who_else_can_write
from worker_svc.config import PolicyConfig

# The rest of a large tree is not looked at: a start must not wait for it.
_LOOKED_AT_MAX: Final = 2000
_TOLD_MAX: Final = 3
_WILDCARD: Final = re.compile(r"[*?]")


def dangers_to_policy(policy: PolicyConfig) -> Iterator[tuple[str, Danger]]:
    """With the key each is about."""
    for item in fields(policy):
        rules = getattr(policy, item.name)
        for root in rules.script_roots:
            for danger in _dangers(Path(root), ("**",)):
                yield f"policy.{item.name}.script_roots", danger
        for folder in rules.allow_cwd:  # what is below may be anybody's
            for danger in who_else_can_replace(Path(folder), leaf=False):
                yield f"policy.{item.name}.allow_cwd", danger
        for pattern in rules.allow_commands:
            parts = Path(pattern).parts
            fixed = next((number for number, part in enumerate(parts) if _WILDCARD.search(part)), len(parts))
            for danger in _dangers(Path(*parts[:fixed]), parts[fixed:]):
                yield f"policy.{item.name}.allow_commands", danger


def _dangers(place: Path, wild: tuple[str, ...]) -> Iterator[Danger]:
    """On the way to the place, and the worst of what is below it."""
    yield from who_else_can_replace(place, entries=bool(wild))
    if wild and place != Path("/"):  # of that there is a warning, whatever is below
        found = [danger for path in _below(place, wild) for danger in _of(path)]
        found.sort(key=lambda danger: danger.who is not Who.EVERYBODY)
        yield from found[:_TOLD_MAX]


def _below(place: Path, wild: tuple[str, ...]) -> Iterator[Path]:
    """The files that match, and the directories in which one that does could be put."""
    depth_max = None if any("**" in part for part in wild) else len(wild)
    pattern = str(place.joinpath(*wild)).replace("[", "[[]")
    left = _LOOKED_AT_MAX
    for folder, folders, files in os.walk(place):
        depth = len(Path(folder).parts) - len(place.parts) + 1
        yield from (path for name in files if fnmatchcase(str(path := Path(folder, name)), pattern))
        if depth == depth_max:
            folders.clear()
        yield from (Path(folder, name) for name in folders)
        left -= len(folders) + len(files)
        if left < 0:
            return


def _of(path: Path) -> Iterator[Danger]:
    try:
        found = path.lstat()
    except OSError:
        return
    # What a link leads to is allowed only if that is in an allowed place too.
    if not stat.S_ISLNK(found.st_mode):
        yield from who_else_can_write(path, found, any_group=True, entries=True)
