"""The options of `start` and `run` that say what the job may use, as whom it runs and what it gets to see."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from worker_svc.job.limit_texts import parse_cpus, parse_rlimit, parse_size, parse_umask
from worker_svc.job.limits import BYTES, CPUS, DECIMAL, LIMITS, OCTAL, RLIMITS, WHOLE

if TYPE_CHECKING:
    from worker_svc.pb.jobscheduler import Identity, Limits, Sandbox

T = TypeVar("T")


class Add(Protocol):
    def __call__(self, flag: str, *, group: str = "", **options: Any) -> None: ...


def add_limit_options(add: Add) -> None:
    for limit in LIMITS:
        options: dict[str, Any] = {"type": _PARSERS[limit.kind], "dest": limit.name}
        if limit.kind == RLIMITS:
            options |= {"action": "append", "default": []}
        add(limit.flag, group="what the job may use", metavar=limit.metavar, help=limit.help, **options)
    who = "as whom it runs"
    add("--user", group=who, metavar="USER", default="", help="name or number; needs a worker that runs as root")
    add("--group", group=who, metavar="GROUP", default="", help="name or number (default: the user's own)")
    add("--groups", group=who, metavar="A,B", type=_names, help="supplementary groups (default: the user's); '': none")
    add("--new-privs", group=who, action="store_true", help="let programs gain privileges, as sudo does")
    sandbox = "what it gets to see"
    add("--read-only", group=sandbox, metavar="PATH", action="append", default=[], help="may be read and executed")
    add("--read-write", group=sandbox, metavar="PATH", action="append", default=[], help="may be changed, too; with "
        "any of both, nothing else can be reached (both are repeatable)")  # fmt: skip
    add("--private-tmp", group=sandbox, action="store_true", help="an empty /tmp of its own")
    add("--no-network", group=sandbox, action="store_true", help="no network but a loopback interface of its own")


def limits_of(arguments: argparse.Namespace) -> Limits | None:
    """None: nothing was asked for."""
    from worker_svc.pb.jobscheduler import Limits, Rlimit

    given = {limit.name: getattr(arguments, limit.name) for limit in LIMITS}
    given = {name: value for name, value in given.items() if value not in (None, [])}
    if "rlimits" in given:
        given["rlimits"] = [Rlimit(name=name, soft=soft, hard=hard) for name, (soft, hard) in given["rlimits"]]
    return Limits(**given) if given else None


def identity_of(arguments: argparse.Namespace) -> Identity | None:
    from worker_svc.pb.jobscheduler import Groups, Identity

    if not (arguments.user or arguments.group or arguments.groups is not None or arguments.new_privs):
        return None
    return Identity(
        user=arguments.user,
        group=arguments.group,
        groups=None if arguments.groups is None else Groups(names=arguments.groups),
        no_new_privs=False if arguments.new_privs else None,
    )


def sandbox_of(arguments: argparse.Namespace) -> Sandbox | None:
    from worker_svc.pb.jobscheduler import Sandbox

    if not (arguments.read_only or arguments.read_write or arguments.private_tmp or arguments.no_network):
        return None
    return Sandbox(
        read_only_paths=arguments.read_only,
        read_write_paths=arguments.read_write,
        private_tmp=arguments.private_tmp or None,
        no_network=arguments.no_network or None,
    )


def _of(parse: Callable[[str], T]) -> Callable[[str], T]:
    """For argparse, which shows the text of its own error only."""

    def parsed(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from None


def _cores(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number of cores such as 1.5, not {text!r}") from None
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of cores from 0 up, not {text!r}")
    return number


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")] if text.strip() else []


_PARSERS: Final[dict[str, Callable[[str], Any]]] = {
    BYTES: _of(parse_size),
    DECIMAL: _cores,
    WHOLE: _whole,
    OCTAL: _of(parse_umask),
    CPUS: _of(lambda text: list(parse_cpus(text))),
    RLIMITS: _of(parse_rlimit),
}
