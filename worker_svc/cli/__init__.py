"""The command line: `main` finds the command and calls it; each command is a module that is imported only
then."""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Final, NoReturn

from worker_svc import __version__
from worker_svc.cli.command import AGENT_FAILED_STATUS, CANCELLED_STATUS, FAILED_STATUS, Failure
from worker_svc.cli.console import CannotWrite, complain, give_up_output, own_streams, what_was_lost

_COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "serve": ("serve", "run the worker"),
    "check-config": ("check_config", "check the configuration and show what is in effect"),
    "gen-certs": ("gen_certs", "make certificates for trying out"),
    "demo": ("demo", "watch a worker run real jobs; needs nothing else"),
    "run": ("run", "run a job: show its output, exit with its status"),
    "run-many": ("run_many", "run jobs from lines of JSON; say which failed"),
    "start": ("start", "start a job and print its id"),
    "stop": ("stop", "ask a job to stop"),
    "pause": ("pause", "make a running job stand still"),
    "resume": ("resume", "let a paused job go on"),
    "signal": ("send_signal", "send a signal to a running job"),
    "query": ("query", "show what is known of a job"),
    "list": ("list_jobs", "list jobs, newest first"),
    "logs": ("logs", "show what a job wrote"),
    "prune": ("prune", "remove finished jobs"),
    "shutdown": ("shutdown", "end the worker and its supervisor"),
}

# What a shell reports of a program that wrote into a pipe nobody reads any more.
_BROKEN_PIPE_STATUS: Final = 128 + 13


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status (argparse exits by itself: 0 after --help, 2 for wrong
    usage)."""
    if argv is None:
        own_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else ""
    failed_status = AGENT_FAILED_STATUS if name in ("run", "run-many") else FAILED_STATUS
    try:
        try:
            status = _run(name, arguments)
        except Failure as failure:
            complain(name, str(failure), failure.hint)
            status = failure.status
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        return CANCELLED_STATUS
    except BrokenPipeError:
        give_up_output()
        return _BROKEN_PIPE_STATUS
    except CannotWrite as error:
        give_up_output()
        complain(name, f"standard output: {error.strerror}")
        return failed_status
    lost = what_was_lost(sys.stderr.buffer)
    if status == 0 and lost is not None and lost.errno != errno.EBADF:  # who closed it wanted none of what we say
        return failed_status  # of what was to be said there, the one thing that can be
    return status


def _run(name: str, arguments: Sequence[str]) -> int:
    if name not in _COMMANDS:
        _refuse(arguments)
    command = import_module(f"worker_svc.cli.{_COMMANDS[name][0]}")
    status: int = command.main(f"worker-svc {name}", arguments[1:])
    return status


def _refuse(arguments: Sequence[str]) -> NoReturn:
    """Ends with help, the version, or what is wrong with the first argument."""
    width = max(map(len, _COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {what}" for name, (_, what) in _COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="worker-svc",
        usage="worker-svc COMMAND [options]",
        description="A worker that runs jobs for a scheduler over gRPC, and keeps them when it dies.",
        epilog=f"commands:\n{listing}\n\nworker-svc COMMAND --help tells more. New here? worker-svc demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"worker-svc {__version__}")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    parser.parse_known_args(arguments[:1])
    if not arguments:
        parser.print_help(sys.stderr)
        parser.exit(2)
    from difflib import get_close_matches

    near = get_close_matches(arguments[0], _COMMANDS, n=1, cutoff=0.7)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(_COMMANDS)}"
    parser.error(f"there is no command {arguments[0]!r}: {hint}")
