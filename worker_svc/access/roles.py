"""Who a peer is, which role that gives, and what the role may do. Decisions only: the guard enforces them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from enum import Enum, IntEnum
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from weakref import WeakKeyDictionary

from worker_svc.linux.kinship import peer_credentials

if TYPE_CHECKING:
    from asyncio import BaseTransport

    from worker_svc.config import AccessConfig

ANONYMOUS: Final = "anonymous"
NAMELESS: Final = "nameless"
"""The identity of who shows a certificate that names nobody: no pattern matches it."""
# Longer names are nobody's: an identity is in every record of a job and every line of the audit.
NAME_MAX_CHARS: Final = 256

_KINDS_OF_NAMES: Final = (("URI", "uri:"), ("DNS", "dns:"), ("email", "email:"))


class Role(IntEnum):
    """An identity that is given several roles has the largest of them."""

    VIEWER = 1
    SUBMITTER = 2
    OPERATOR = 3
    ADMIN = 4

    @property
    def label(self) -> str:
        return self.name.lower()


class Verdict(Enum):
    ALLOWED = "allowed"
    OWN = "own"
    """With the caller's own jobs only: no other job is there for it."""
    DENIED = "denied"


class Scope(Enum):
    """How OWN is kept to."""

    JOB = "job"
    """The request names one job: the guard looks whose it is, before the handler sees the request."""
    QUERY = "query"
    """The request may be about many jobs: the handler narrows it down to `Call.owner`."""
    START = "start"
    """The job comes to belong to the caller."""
    MANY = "many"
    """The request holds others, each of which passes the guard as a call by itself."""
    NONE = "none"
    """It is about no job."""


class Rpc(NamedTuple):
    viewer: Verdict
    submitter: Verdict
    operator: Verdict
    admin: Verdict
    scope: Scope
    mutates: bool = False
    makes_room: bool = False
    """What it does helps where the disk is full."""

    def verdict(self, role: Role | None) -> Verdict:
        return Verdict.DENIED if role is None else (self.viewer, self.submitter, self.operator, self.admin)[role - 1]


_ALL, _OWN, _NO = Verdict.ALLOWED, Verdict.OWN, Verdict.DENIED

# Every RPC of the service; one that is missing here is refused to all.
RPCS: Final[dict[str, Rpc]] = {
    #                    viewer submitter operator admin
    "StartJob":       Rpc(_NO,  _OWN,     _OWN,    _OWN, Scope.START, mutates=True),
    "StopJob":        Rpc(_NO,  _OWN,     _ALL,    _ALL, Scope.JOB, mutates=True, makes_room=True),
    "QueryJob":       Rpc(_ALL, _OWN,     _ALL,    _ALL, Scope.JOB),
    "ListJobs":       Rpc(_ALL, _OWN,     _ALL,    _ALL, Scope.QUERY),
    "WatchJobs":      Rpc(_ALL, _OWN,     _ALL,    _ALL, Scope.QUERY),
    "WaitJob":        Rpc(_ALL, _OWN,     _ALL,    _ALL, Scope.JOB),
    "SignalJob":      Rpc(_NO,  _OWN,     _ALL,    _ALL, Scope.JOB, mutates=True),
    "PauseJob":       Rpc(_NO,  _OWN,     _ALL,    _ALL, Scope.JOB, mutates=True),
    "ResumeJob":      Rpc(_NO,  _OWN,     _ALL,    _ALL, Scope.JOB, mutates=True),
    "DeleteJob":      Rpc(_NO,  _OWN,     _ALL,    _ALL, Scope.JOB, mutates=True, makes_room=True),
    "PruneJobs":      Rpc(_NO,  _OWN,     _ALL,    _ALL, Scope.QUERY, mutates=True, makes_room=True),
    "StreamJob":      Rpc(_ALL, _OWN,     _ALL,    _ALL, Scope.JOB),
    "ShutdownWorker": Rpc(_NO,  _NO,      _NO,     _ALL, Scope.NONE, mutates=True, makes_room=True),
    "GetWorker":      Rpc(_ALL, _OWN,     _ALL,    _ALL, Scope.QUERY),
    "RunJobs":        Rpc(_NO,  _OWN,     _OWN,    _OWN, Scope.MANY, mutates=True),
    "StartJobs":      Rpc(_NO,  _OWN,     _OWN,    _OWN, Scope.MANY, mutates=True),
    "QueryJobs":      Rpc(_ALL, _OWN,     _ALL,    _ALL, Scope.MANY),
    "StopJobs":       Rpc(_NO,  _OWN,     _ALL,    _ALL, Scope.MANY, mutates=True, makes_room=True),
}  # fmt: skip
UNKNOWN_RPC: Final = Rpc(_NO, _NO, _NO, _NO, Scope.NONE, mutates=True)


class Caller(NamedTuple):
    identity: str
    role: Role | None
    peer: str
    """Where it calls from."""

    @property
    def role_label(self) -> str:
        return self.role.label if self.role else "none"


class Doorkeeper:
    """From connections to callers, by the patterns of the section `[access]`."""

    def __init__(self, config: AccessConfig, own_uid: int | None = None, *, is_job: Callable[[Any], bool]) -> None:
        """`is_job`: whether who connected to a unix socket is one of the worker's own jobs."""
        self._is_job = is_job
        own = f"uid:{os.geteuid() if own_uid is None else own_uid}"
        by_role = {
            Role.ADMIN: config.admins,
            Role.OPERATOR: config.operators,
            Role.SUBMITTER: config.submitters,
            Role.VIEWER: config.viewers,
        }
        self._patterns = [
            # fnmatch's [...] is no wildcard of ours: brackets stand in names, such as addresses in URIs.
            (role, own if pattern == "uid:self" else _folded(pattern).replace("[", "[[]"))
            for role, patterns in by_role.items()
            for pattern in patterns
        ]
        self._anonymous = None if config.anonymous == "none" else Role[config.anonymous.upper()]
        # A connection's identity cannot change; to work it out takes longer than many a call.
        self._callers: WeakKeyDictionary[Any, Caller] = WeakKeyDictionary()

    def role_of(self, names: Sequence[str]) -> Role | None:
        return max((role for role, pattern in self._patterns if _matches(names, pattern)), default=None)

    def caller(self, transport: BaseTransport) -> Caller:
        known = self._callers.get(transport)
        if known is None:
            known = self._callers[transport] = self._identify(transport)
        return known

    def rate_key(self, transport: BaseTransport, peer: str) -> str:
        """Whose requests are counted together: of those without identity, those of one address."""
        identity = self.caller(transport).identity
        return peer if identity in (ANONYMOUS, NAMELESS) else identity

    def _identify(self, transport: BaseTransport) -> Caller:
        names, peer = self._names_of(transport)
        if names is None:
            return Caller(ANONYMOUS, self._anonymous, peer)
        if not names:
            return Caller(NAMELESS, None, peer)
        return Caller(names[0], self.role_of(names), peer)

    def _names_of(self, transport: BaseTransport) -> tuple[Sequence[str] | None, str]:
        """The names that the peer has proved to have, None if it was not asked for any; and its address."""
        connected = transport.get_extra_info("socket")
        certificate = transport.get_extra_info("peercert")
        if connected is not None and connected.family == socket.AF_UNIX:
            pid, uid, _ = peer_credentials(connected)
            # A job that runs as an admin's user is no admin by that.
            kind = "job" if self._is_job(connected) else "uid"
            return (names_in(certificate) if certificate else [f"{kind}:{uid}"]), f"pid:{pid}"
        address = transport.get_extra_info("peername")
        peer = ""
        if address:
            peer = f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}"
        return (names_in(certificate) if certificate else None), peer


def _matches(names: Sequence[str], pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def names_in(certificate: Mapping[str, Any]) -> list[str]:
    """The names in a verified certificate, as getpeercert() gives it: alternative names, or else common names.

    Each tells its kind, so that nobody can be `uid:0` by a certificate.
    """
    alternatives = certificate.get("subjectAltName", ())
    names = [prefix + value for kind, prefix in _KINDS_OF_NAMES for found, value in alternatives if found == kind]
    if not names:
        subject = certificate.get("subject", ())
        names = [f"cn:{value}" for part in subject for name, value in part if name == "commonName"]
    return [name for name in map(_folded, names) if len(name) <= NAME_MAX_CHARS and name.isprintable()]


def _folded(name: str) -> str:
    """DNS names are the same in any case."""
    return name.lower() if name.startswith("dns:") else name
