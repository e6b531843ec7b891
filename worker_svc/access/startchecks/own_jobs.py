"""Jobs that run as the worker's own user, started by who is trusted with less than that user may do."""

from __future__ import annotations

import os
import pwd

from worker_svc.config import Config


def what_jobs_can_do(config: Config) -> str:
    """Empty: none of them run as the worker's own user, or only admins can start any."""
    if not _has_roles_below_admin(config):
        return ""
    names = {str(os.geteuid()), _own_name()}
    keys = [] if config.jobs.user and config.jobs.user not in names else ["jobs.user"]
    for table in ("all", "operator", "submitter"):
        if names & {*getattr(config.policy, table).allow_users}:
            keys.append(f"policy.{table}.allow_users")
    if not keys:
        return ""
    return (
        f"{keys[0]}: jobs of roles below admin run as the worker's own user, {_own_name()}: {_what_is_left(config)}; "
        "name another user to keep them apart (docs/security.md)"
    )


def _what_is_left(config: Config) -> str:
    if not (config.sandbox.read_only_paths or config.sandbox.read_write_paths):
        return (
            "each of them can kill the worker and the supervisor, and read and change the state directory, other jobs "
            "and their environments"
        )
    if os.geteuid() == 0:
        return "root's capabilities lead out of any sandbox"
    return (
        "the sandbox leaves them what the user may have of memory, processes and disk, the priority of the worker, and "
        "signals before Linux 6.12"
    )


def _has_roles_below_admin(config: Config) -> bool:
    """Who may start jobs."""
    server, access = config.grpc_server, config.access
    names_callers = server.addr.is_unix or (server.use_tls and server.client_ca_file)
    is_anonymous_below = access.anonymous in ("operator", "submitter") and not names_callers
    return bool(access.operators or access.submitters or is_anonymous_below)


def _own_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())
