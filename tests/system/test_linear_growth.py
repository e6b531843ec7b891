"""Work grows with what a request brings, and no faster: in every text field of every message, of hostile text.

What is asserted is the ratio between the work for a text and that for one ten times as long: what is quadratic takes a
hundred times as much. Work is the processors' time of worker and supervisor, whatever else the machine does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support.peers import Peer, Peers
from tests.support.secured import tls_keys
from tests.support.workers import Worker
from worker_svc.access.roles import RPCS

# Ten times as long is as long as an argument may be.
LENGTH: Final = 12_000
GROWTH: Final = 10
# Twice what is proportional, and a fifth of what is quadratic.
RATIO_MAX: Final = 20
HOSTILE: Final = (
    "\\", ":\\", "a=", "=", "a:", "'", '"', "password='\"", '"password":\\"', '"password":[', "://u:", "@", "a@", ":@",
    "--password ", "\t", "\n", "-", "9", "/..", "/a", "/a/b", "a/", "*a", "(", "é",
)  # fmt: skip

Way = tuple[str, ...]

# What each run tries; the others run with --all.
FEW: Final = ("\\", "a=", "--password ", "/a")

pytestmark = pytest.mark.timeout(1200)


def text_fields(descriptor: Any, path: Way = ()) -> Iterator[Way]:
    """The way to each field that takes a text: of a map, to its keys and to its values."""
    for field in descriptor.fields:
        here = (*path, field.name)
        if field.message_type is None:
            if field.type in (field.TYPE_STRING, field.TYPE_BYTES):
                yield here
        elif field.message_type.GetOptions().map_entry:
            yield from ((*here, "key"), (*here, "value"))
        elif not field.message_type.full_name.startswith("google."):
            yield from text_fields(field.message_type, here)


def filled(fields: dict[str, Any], message: Any, path: Way, text: str) -> Any:
    request = message(**fields)
    part = request
    for name in path[:-1]:
        inner = getattr(part, name)
        if path[-2:] in ((name, "key"), (name, "value")) and hasattr(inner, "update"):
            inner.update({text: "x"} if path[-1] == "key" else {"x": text})
            return request
        part = inner.add() if hasattr(inner, "add") else inner
    field = part.DESCRIPTOR.fields_by_name[path[-1]]
    value: Any = text.encode() if field.type == field.TYPE_BYTES else text
    if hasattr(getattr(part, path[-1]), "append"):
        getattr(part, path[-1]).append(value)
    else:
        setattr(part, path[-1], value)
    return request


def work_ns(worker: Worker) -> int:
    """What worker and supervisor have had of the processors so far, threads that have ended included."""
    # The clock of a process, as clock_getcpuclockid(3) makes its number.
    return sum(time.clock_gettime_ns(~pid << 3 | 2) for pid in (worker.pid, worker.supervisor_pid()))


def assert_linear(worker: Worker, do: Callable[[int], None], what: str) -> None:
    costs = {LENGTH: 2**63, LENGTH * GROWTH: 2**63}
    for _ in range(5):  # a collection of garbage, or a log line that was late, is not the request's
        for length in costs:
            before = work_ns(worker)
            do(length)
            costs[length] = min(costs[length], work_ns(worker) - before)
        if costs[LENGTH * GROWTH] <= RATIO_MAX * costs[LENGTH]:
            return
    pytest.fail(f"{what}: {costs}")


# What else a request must have to come as far as its texts.
OTHERS: Final[dict[str, dict[str, Any]]] = {
    "StartJob": {"command": "true"},
    "PruneJobs": {"max_count": 1_000_000},
    "ListJobs": {"page_size": 1},
    "ShutdownWorker": {},
}


def assert_fields_linear(worker: Worker, clients: dict[str, Peer], method: str, texts: tuple[str, ...]) -> None:
    """The job that a StartJob may make is then looked at by its owner and by others."""
    caller, viewer = clients["red"], clients["viewer"]
    message = getattr(caller.messages, f"{method}Req")
    known = caller.start("true")
    for path in text_fields(message.DESCRIPTOR):
        fields = dict(OTHERS.get(method, {}))
        if "jobID" in message.DESCRIPTOR.fields_by_name and path != ("jobID",):
            fields["jobID"] = known
        for part in texts:

            def ask(length: int, part: str = part, path: Way = path, fields: dict[str, Any] = fields) -> None:
                request = filled(fields, message, path, part * (length // len(part)))
                for peer in (caller, viewer):
                    peer.call_with(method, request)
                    if method == "StartJob":
                        (job,) = peer.ok("ListJobs", page_size=1).jobs
                        peer.wait(job.job_id)

            assert_linear(worker, ask, f"{method}.{'.'.join(path)}: {part!r}")


@pytest.mark.parametrize("method", ["ListJobs", "StartJob"])
def test_of_some_texts(secured: Worker, clients: dict[str, Peer], method: str) -> None:
    assert_fields_linear(secured, clients, method, FEW)


@pytest.mark.long
@pytest.mark.parametrize("method", sorted(RPCS))
def test_of_requests_and_of_what_is_told_of_them(secured: Worker, clients: dict[str, Peer], method: str) -> None:
    assert_fields_linear(secured, clients, method, HOSTILE)


RULES: Final = (
    '{ allow_commands = ["/usr/**", "/bin/**", "/opt/**/bin/**/tool"], deny_commands = ["/**/a/**/b"], '
    'script_roots = ["/opt"], allow_cwd = ["/"], deny_args = ["--evil"], '
    'allow_env = ["PATH", "JOB_*_*_X"], deny_env = ["*_SECRET_*"] }'
)


@pytest.mark.long
def test_of_starts_that_a_policy_judges(tmp_path: Path, peers: Peers) -> None:
    with (
        Worker(tmp_path, **tls_keys(peers.certs), POLICY_ALL=RULES) as worker,
        peers.connect(worker.address, "red") as caller,
    ):
        message = caller.messages.StartJobReq
        ways = [({"command": "true"}, way) for way in text_fields(message.DESCRIPTOR)]
        ways += [({"command": "true", "path": "x"}, ("cwd",)), ({"command": "sh"}, ("path",))]
        for fields, way in ways:
            for part in HOSTILE:

                def ask(length: int, part: str = part, way: Way = way, fields: dict[str, Any] = fields) -> None:
                    caller.call_with("StartJob", filled(fields, message, way, part * (length // len(part))))

                assert_linear(worker, ask, f"{'.'.join(way)}: {part!r}")
        for part in (":", "a:", "/a/b:"):  # the directories that a program is looked for in

            def look(length: int, part: str = part) -> None:
                caller.call("StartJob", command="tool", env={"PATH": part * (length // len(part))}, cwd="/")

            assert_linear(worker, look, f"PATH: {part!r}")
