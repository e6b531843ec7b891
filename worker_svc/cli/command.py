"""What commands are made of: failures, parsers, and how client commands reach the worker."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NoReturn

import worker_svc
from worker_svc.printable import printable

if TYPE_CHECKING:
    from ssl import SSLContext

    from worker_svc.address import Address
    from worker_svc.client import WorkerClient
    from worker_svc.client.blocking import BlockingWorker

ADDRESS_VARIABLE: Final = "WORKER_SVC_ADDR"
TLS_OPTIONS: Final = {
    "--ca": ("WORKER_SVC_CA", "FILE", "certificates to verify the worker with"),
    "--crt": ("WORKER_SVC_CRT", "FILE", "certificate to show to the worker"),
    "--key": ("WORKER_SVC_KEY", "FILE", "private key of that certificate"),
    "--server-name": ("WORKER_SVC_SERVER_NAME", "NAME", "name in the worker's certificate, if it is not the host"),
}
CLIENT_VARIABLES: Final = frozenset({ADDRESS_VARIABLE, *(variable for variable, *_ in TLS_OPTIONS.values())})
DEFAULT_ADDRESS: Final = "127.0.0.1:50000"
FAILED_STATUS: Final = 1
AGENT_FAILED_STATUS: Final = 125
"""What `run` returns when the job did not run; its other statuses are the job's."""
CANCELLED_STATUS: Final = 130
"""After Ctrl-C."""
ANSWER_DEADLINE_S: Final = 30.0
"""For calls that a worker in good health answers at once."""


class Failure(Exception):
    """A command did not do what was asked: its text is for the user, `status` for the shell."""

    def __init__(self, text: str, status: int = FAILED_STATUS, *, hint: str = "") -> None:
        """`hint`: more lines, all of them ours."""
        super().__init__(text)
        self.status = status
        self.hint = hint


def program() -> str:
    """How the reader can call this program: hints are there to be copied."""
    if shutil.which("worker-svc"):
        return "worker-svc"
    from pathlib import Path

    wrapper = Path(worker_svc.__file__).parent.parent / "scripts" / "worker"
    if not wrapper.is_file():
        return "python -m worker_svc"
    try:
        here = Path.cwd()
    except FileNotFoundError:  # removed meanwhile
        return str(wrapper)
    return str(wrapper.relative_to(here) if wrapper.is_relative_to(here) else wrapper)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def make_parser(prog: str, description: str, **options: Any) -> argparse.ArgumentParser:
    # Without abbreviations: an option that comes later must not change what a script means.
    return _Parser(prog=prog, description=description, allow_abbrev=False, **options)


def add_address_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--addr",
        metavar="ADDRESS",
        default=os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS,
        help=f"where the worker is: host:port or unix:/path (default: ${ADDRESS_VARIABLE}, else {DEFAULT_ADDRESS})",
    )

    group = parser.add_argument_group("TLS, if any of these is given")
    for flag, (variable, metavar, what) in TLS_OPTIONS.items():
        group.add_argument(
            flag, metavar=metavar, default=os.environ.get(variable) or None, help=f"{what} (default: ${variable})"
        )


def key_value(text: str) -> tuple[str, str]:
    """K=V, for argparse."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, not {text!r}")
    return key, value


def seconds(text: str) -> float:
    """For argparse; the worker checks the rest."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, not {text!r}") from None
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds from 0 up, not {text!r}")
    return number


def count(text: str) -> int:
    """A whole number from 0 up, for argparse."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 up, not {text!r}")
    return int(text)


def ask_worker(arguments: argparse.Namespace, use: Callable[[BlockingWorker], None]) -> int:
    """Runs `use` with the worker that the options name, for short questions: this is the light way to it. What goes
    wrong becomes a `Failure`."""
    with _failures(arguments.addr, FAILED_STATUS):
        address = _address(arguments)
        tls = _tls(arguments)
        from worker_svc.client.blocking import BlockingWorker

        with BlockingWorker(address, ssl=tls, server_name=arguments.server_name or "") as worker:
            use(worker)
    return 0


def with_worker(
    arguments: argparse.Namespace,
    use: Callable[[WorkerClient], Coroutine[Any, Any, int]],
    *,
    failed_status: int = FAILED_STATUS,
) -> int:
    """Runs `use` with a client for the worker that the options name, and returns its status; what goes wrong becomes a
    `Failure`."""
    with _failures(arguments.addr, failed_status):
        address = _address(arguments)
        tls = _tls(arguments)
        import asyncio

        from worker_svc.client import WorkerClient

        async def connected() -> int:
            async with WorkerClient(str(address), ssl=tls, server_name=arguments.server_name or "") as client:
                return await use(client)

        return asyncio.run(connected())


@contextmanager
def _failures(address: str, status: int) -> Iterator[None]:
    """Makes a `Failure` of what a client raises."""
    from grpclib.exceptions import GRPCError

    from worker_svc.client.errors import Unreachable, Untrusted
    from worker_svc.job import JobError

    try:
        yield
    except Untrusted as error:
        raise Failure(error.message, status) from error
    except Unreachable as error:
        raise Failure(str(error), status, hint=_how_to_reach_one(address)) from error
    except JobError as error:
        raise Failure(error.message, status) from error
    except GRPCError as error:
        raise Failure(f"the worker answered {error.status.name}: {error.message}", status) from error


def _address(arguments: argparse.Namespace) -> Address:
    from worker_svc.address import Address

    try:
        return Address.parse(arguments.addr)
    except ValueError as error:
        raise Failure(f"{arguments.addr!r} is not a worker's address: {error}", 2) from None


def _tls(arguments: argparse.Namespace) -> SSLContext | None:
    given = (arguments.ca, arguments.crt, arguments.key, arguments.server_name)
    if not any(given):
        return None
    if (arguments.crt is None) != (arguments.key is None):
        raise Failure("--crt and --key go together", 2)
    from pathlib import Path

    from worker_svc.access.tls import SecurityError, client_context

    try:
        return client_context(*(path and Path(path) for path in given[:3]))
    except SecurityError as error:
        raise Failure(str(error)) from error


def _how_to_reach_one(address: str) -> str:
    flag = "" if address == DEFAULT_ADDRESS else f" --grpc-server-addr {address}"
    return f"  start one there: {program()} serve{flag}\n  or say where it is: --addr or ${ADDRESS_VARIABLE}"
