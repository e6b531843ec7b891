"""The options of `start` and `run` that say what the job may use, as whom it runs and what it gets to see."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from worker_svc.cli.command import count
from worker_svc.job.limit_texts import parse_cpus, parse_rlimit, parse_size, parse_umask

if TYPE_CHECKING:
    from worker_svc.pb.jobscheduler import Identity, Limits, Sandbox

T = TypeVar("T")


class Add(Protocol):
    def __call__(self, flag: str, *, group: str = "", **options: Any) -> None: ...


def add_limit_options(add: Add) -> None:
    limits = "what the job may use"
    add("--memory-max", group=limits, metavar="SIZE", type=_of(parse_size), help="memory: bytes, or 512M, 1.5G; 0: any")
    add("--swap-max", group=limits, metavar="SIZE", type=_of(parse_size), help="swap, likewise; 0: none")
    add("--cpus", group=limits, metavar="N", type=_cores, help="CPU time per time: 1.5 is one and a half cores; 0: any")
    add("--cpu-weight", group=limits, metavar="N", type=count, help="share of contended CPUs, 1 to 10000; usual is 100")
    add("--pids-max", group=limits, metavar="N", type=count, help="processes and threads; 0: any")
    add("--io-weight", group=limits, metavar="N", type=count, help="share of contended I/O, 1 to 10000; usual is 100")
    add(
        "--rlimit",
        group=limits,
        metavar="NAME=SOFT[:HARD]",
        type=_of(parse_rlimit),
        action="append",
        default=[],
        help="of setrlimit(2), repeatable: nofile=1024:4096, core=0, stack=unlimited",
    )
    add("--nice", group=limits, metavar="N", type=_whole, help="from -20, most favoured, to 19")
    add("--cpu-affinity", group=limits, metavar="CPUS", type=_of(parse_cpus), default=(), help="CPUs to run on: 0,2-3")
    add("--umask", group=limits, metavar="OCTAL", type=_of(parse_umask), help="permissions new files do not get: 027")
    add("--oom-score-adj", group=limits, metavar="N", type=_whole, help="from -1000 to 1000: kill it late or early")
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

    fields: dict[str, Any] = {
        "memory_max_bytes": arguments.memory_max,
        "swap_max_bytes": arguments.swap_max,
        "cpu_max_cores": arguments.cpus,
        "cpu_weight": arguments.cpu_weight,
        "pids_max": arguments.pids_max,
        "io_weight": arguments.io_weight,
        "rlimits": [Rlimit(name=name, soft=soft, hard=hard) for name, (soft, hard) in arguments.rlimit],
        "nice": arguments.nice,
        "cpu_affinity": list(arguments.cpu_affinity),
        "umask": arguments.umask,
        "oom_score_adj": arguments.oom_score_adj,
    }
    given = {name: value for name, value in fields.items() if value is not None and value != []}
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
