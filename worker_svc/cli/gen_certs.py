"""`worker-svc gen-certs`: certificates for trying out.

Needs the extra `certs` (cryptography). Exit status 2 for names that cannot be, 1 for files that cannot be written.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from worker_svc.cli.command import Failure, count, make_parser, program
from worker_svc.cli.console import say

_ROLES: Final = ("admin", "operator", "submitter", "viewer")
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}\Z")

_CONFIG: Final = """\
# Made by worker-svc gen-certs: a worker that demands certificates of this directory's authority.
[grpc_server]
addr = ":50000"
use_tls = true
crt_file = "server.pem"
key_file = "server.key"
client_ca_file = "ca.pem"
crl_file = "crl.pem"

[access]
{lists}
anonymous = "none"
"""


def main(prog: str, argv: Sequence[str]) -> int:
    parser = make_parser(
        prog,
        "Make a small certificate authority in DIR, with certificates for the server and for clients, a list of "
        "revoked ones and a worker.toml that uses them. What is there stays, so that more clients can be added later.",
    )
    parser.add_argument("directory", metavar="DIR", type=Path)
    parser.add_argument(
        "--host",
        action="append",
        metavar="NAME",
        help="a host name or address of the server, repeatable (default: localhost, 127.0.0.1, ::1 and this host)",
    )
    parser.add_argument(
        "--client",
        action="append",
        metavar="NAME",
        help=f"a client, repeatable (default: {', '.join(_ROLES)}, whom worker.toml gives these roles)",
    )
    parser.add_argument(
        "--revoke", action="append", default=[], metavar="NAME", help="refuse this client from now on, repeatable"
    )
    parser.add_argument("--days", type=count, default=825, help="how long certificates last (default: 825)")
    arguments = parser.parse_args(argv)
    clients = arguments.client or ([] if arguments.revoke else list(_ROLES))
    for name in clients:
        if not _NAME.match(name) or name in ("ca", "server"):
            raise Failure(f"--client: {name!r} cannot be a name: use small letters, digits, '.', '_' and '-'", 2)
    try:
        from worker_svc.access import certs
    except ImportError as error:
        raise Failure(
            f"needs the package cryptography ({error}): pip install 'worker-svc[certs]', which is its extra"
        ) from error
    directory: Path = arguments.directory
    hosts = arguments.host or certs.default_hosts()
    try:
        made = certs.make_directory(
            directory, hosts=hosts, clients=clients, revoke=arguments.revoke, days=arguments.days
        )
        made += _write_config(directory)
    except (OSError, ValueError) as error:
        raise Failure(f"{directory}: {error}") from error
    say(f"{directory}: made {', '.join(made) if made else 'nothing: all was there'}")
    if "server" in made:
        where = shlex.quote(str(directory))
        say(f"  serve:  {program()} serve --config {where}/worker.toml")
        first = shlex.quote(clients[0] if clients else "admin")
        credentials = f"--ca {where}/ca.pem --crt {where}/{first}.pem --key {where}/{first}.key"
        say(f"  call:   {program()} list --addr localhost:50000 {credentials}")
    return 0


def _write_config(directory: Path) -> list[str]:
    path = directory / "worker.toml"
    if path.exists():
        return []
    lists = "\n".join(f'{role}s = ["dns:{role}"{_OWN_USERS if role == "admin" else ""}]' for role in _ROLES)
    path.write_text(_CONFIG.format(lists=lists))
    path.chmod(0o644)
    return [path.name]


_OWN_USERS: Final = ', "uid:0", "uid:self"'
