"""The sections that say who may do what, and what jobs may be: as declared in `sections`."""

# ruff: noqa: RUF009 -- declare() is dataclasses.field() with a kind and a doc: its values are immutable.

from dataclasses import dataclass
from typing import Literal

from worker_svc.config.declare import Section, declare
from worker_svc.config.kinds import PATTERN, Bool, Choice, Listed
from worker_svc.config.policy_rules import PolicyRules, RulesTable
from worker_svc.config.values import quote
from worker_svc.masking import DEFAULT_PATTERN

AnonymousRole = Literal["admin", "operator", "submitter", "viewer", "none"]

_KINDS_OF_NAMES = ("uri:", "dns:", "email:", "cn:", "uid:", "job:")


def _identity(text: str) -> str:
    if text == "*" or text.startswith(_KINDS_OF_NAMES):
        return text
    kinds = f"{', '.join(_KINDS_OF_NAMES[:-1])} or {_KINDS_OF_NAMES[-1]}"
    raise ValueError(f"must begin with {kinds}, not {quote(text)}")


_IDENTITIES = Listed('patterns of identities, such as "dns:*.jobs.example"', _identity)


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessConfig(Section):
    """Who may do what. Of several roles that patterns give an identity, the first in this order is its."""

    admins: tuple[str, ...] = declare(
        ["uid:0", "uid:self"],
        _IDENTITIES,
        "Who may do everything. uid:self is the user the worker runs as; * and ? are wildcards.",
    )
    operators: tuple[str, ...] = declare([], _IDENTITIES, "Who may do everything with all jobs.")
    submitters: tuple[str, ...] = declare([], _IDENTITIES, "Who may do everything with jobs of their own.")
    viewers: tuple[str, ...] = declare([], _IDENTITIES, "Who may look at all jobs and their output.")
    anonymous: AnonymousRole = declare(
        "admin",
        Choice(AnonymousRole),
        "The role of those who have no identity: on TCP without client certificates, which is loopback only "
        'unless grpc_server.insecure is set. "none": they may do nothing.',
    )
    secret_keys: str = declare(
        DEFAULT_PATTERN,
        PATTERN,
        "Keys of variables, labels and options whose values are shown to nobody but the job's owner and admins, and in "
        "no log: a regular expression. Empty: none.",
    )
    show_arguments: bool = declare(
        False,
        Bool(),
        "Whether viewers, and operators of others' jobs, see more than a job's command and path: arguments, variables "
        "and sandbox paths; and the log, with each job that is started, its arguments. What looks like a secret stays "
        "hidden.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig(Section):
    """Which jobs may be started: rules for all, and for each role; a job must satisfy both."""

    all: PolicyRules = declare({}, RulesTable(), "Rules for every role.")
    admin: PolicyRules = declare({}, RulesTable(), "More rules for admins.")
    operator: PolicyRules = declare({}, RulesTable(), "More rules for operators.")
    submitter: PolicyRules = declare({}, RulesTable(), "More rules for submitters.")
