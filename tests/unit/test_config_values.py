"""Values of keys, and addresses."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.configured import A_SIGNAL, AN_ADDRESS, ENVIRON, Write, from_variable, problems_of
from worker_svc.config import Address, Config, JobsConfig

# Values


@pytest.mark.parametrize(
    "name,text,get,expected",
    [
        ("WORKER_SVC_GRPC_SERVER_USE_TLS", "true", lambda c: c.grpc_server.use_tls, True),
        ("WORKER_SVC_GRPC_SERVER_USE_TLS", "1", lambda c: c.grpc_server.use_tls, True),
        ("WORKER_SVC_GRPC_SERVER_USE_TLS", "False", lambda c: c.grpc_server.use_tls, False),
        ("WORKER_SVC_GRPC_SERVER_USE_TLS", "0", lambda c: c.grpc_server.use_tls, False),
        ("WORKER_SVC_SCHEDULER_ADDR", "", lambda c: c.scheduler.addr, None),
        ("WORKER_SVC_SCHEDULER_ADDR", "s.example:1", lambda c: c.scheduler.addr, Address("s.example", 1)),
        ("WORKER_SVC_JOBS_SLOTS", " 12 ", lambda c: c.jobs.slots, 12),
        ("WORKER_SVC_JOBS_TIMEOUT_S", "7", lambda c: c.jobs.timeout_s, 7.0),
        ("WORKER_SVC_JOBS_TIMEOUT_S", ".5", lambda c: c.jobs.timeout_s, 0.5),
        ("WORKER_SVC_JOBS_TIMEOUT_S", "1e3", lambda c: c.jobs.timeout_s, 1000.0),
        ("WORKER_SVC_JOBS_PASS_ENV", "", lambda c: c.jobs.pass_env, ()),
        ("WORKER_SVC_JOBS_PASS_ENV", "A, B,A", lambda c: c.jobs.pass_env, ("A", "B")),
        ("WORKER_SVC_JOBS_ENV", "", lambda c: dict(c.jobs.env), {}),
        ("WORKER_SVC_JOBS_ENV", "A=1,B=x=y,C=", lambda c: dict(c.jobs.env), {"A": "1", "B": "x=y", "C": ""}),
        ("WORKER_SVC_JOBS_ENV", '{ A = "1,2", B = "é" }', lambda c: dict(c.jobs.env), {"A": "1,2", "B": "é"}),
        ("WORKER_SVC_LOG_LEVEL", "debug", lambda c: c.log.level, "debug"),
    ],
)
def test_text_is_read_by_the_type_of_the_key(
    name: str, text: str, get: Callable[[Config], object], expected: object, elsewhere: Path
) -> None:
    found = get(from_variable(name, text))
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    "text,name,number",
    [
        ("SIGTERM", "SIGTERM", signal.SIGTERM),
        ("term", "SIGTERM", signal.SIGTERM),
        ("int", "SIGINT", signal.SIGINT),
        ("9", "SIGKILL", signal.SIGKILL),
        ("RTMIN+3", "SIGRTMIN+3", signal.SIGRTMIN + 3),
        (str(signal.SIGRTMIN + 3), "SIGRTMIN+3", signal.SIGRTMIN + 3),
        ("SIGRTMAX-0", "SIGRTMAX", signal.SIGRTMAX),
    ],
)
def test_stop_signal(text: str, name: str, number: int, elsewhere: Path) -> None:
    jobs = from_variable("WORKER_SVC_JOBS_STOP_SIGNAL", text).jobs
    assert (jobs.stop_signal, jobs.stop_signal_number) == (name, number)


@pytest.mark.parametrize("text", ["", "0", "-9", "999", "SIGNOPE", "SIG_IGN", "RTMIN+99", "SIGRTMIN+", "TERM KILL"])
def test_no_such_stop_signal(text: str, elsewhere: Path) -> None:
    [problem] = problems_of(None, {**ENVIRON, "WORKER_SVC_JOBS_STOP_SIGNAL": text})
    assert problem == f'environment: WORKER_SVC_JOBS_STOP_SIGNAL: must be {A_SIGNAL}, not "{text}"'


@pytest.mark.parametrize("cpus,expected", [(1, 16), (4, 16), (5, 20), (64, 256)])
def test_automatic_slots(cpus: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(cpus)))
    assert JobsConfig().resolved_slots == expected
    assert JobsConfig(slots=3).resolved_slots == 3


# Addresses


@pytest.mark.parametrize(
    "text,address,loopback,unspecified",
    [
        ("127.0.0.1:50000", Address("127.0.0.1", 50000), True, False),
        ("127.8.9.1:1", Address("127.8.9.1", 1), True, False),
        ("localhost:0", Address("localhost", 0), True, False),
        ("[::1]:65535", Address("::1", 65535), True, False),
        ("[fe80::1%eth0]:1", Address("fe80::1%eth0", 1), False, False),
        ("worker_1.example.org.:80", Address("worker_1.example.org.", 80), False, False),
        ("10.0.0.1:80", Address("10.0.0.1", 80), False, False),
        ("0.0.0.0:80", Address("0.0.0.0", 80), False, True),
        ("[::]:80", Address("::", 80), False, True),
        (":80", Address("", 80), False, True),
        ("unix:/run/w.sock", Address.unix("/run/w.sock"), True, False),
    ],
)
def test_address(text: str, address: Address, loopback: bool, unspecified: bool) -> None:
    assert Address.parse(text) == address
    assert str(address) == text
    assert (address.is_loopback, address.is_unspecified) == (loopback, unspecified)
    assert address.is_unix == text.startswith("unix:")


@pytest.mark.parametrize(
    "text, meant, loopback",
    [
        ("[::ffff:127.0.0.1]:1", "127.0.0.1:1", True),
        ("[0:0:0:0:0:ffff:7f00:2]:1", "127.0.0.2:1", True),
        ("[::ffff:10.0.0.1]:1", "10.0.0.1:1", False),
        ("[::ffff:0.0.0.0]:1", "0.0.0.0:1", False),
        ("LocalHost.:1", "localhost:1", True),
    ],
)
def test_other_ways_to_write_an_address(text: str, meant: str, loopback: bool) -> None:
    address = Address.parse(text)
    assert (str(address), address.is_loopback) == (meant, loopback)


@pytest.mark.parametrize(
    "text", ["[::1%lo]:1", "[::%1]:1", "[::ffff:127.0.0.1%lo]:1", "127.255.255.255:1", "127.1:1", "2130706433:1"]
)
def test_addresses_that_could_not_be_served(text: str) -> None:
    with pytest.raises(ValueError, match=r"zone|broadcast|not an IPv4 address"):
        Address.parse(text)


@pytest.mark.parametrize(
    "host", ["0x7f000001", "0x7f.1", "localhost.example.org", "ip6-localhost", "::127.0.0.1", "::ffff:0:127.0.0.1"]
)
def test_what_is_not_known_for_sure_to_be_this_machine_is_not_loopback(host: str) -> None:
    assert not Address(host, 1).is_loopback


def test_unix_address_in_the_form_of_a_url() -> None:
    assert str(Address.parse("unix:///run/w.sock")) == "unix:/run/w.sock"


@pytest.mark.parametrize(
    "text,reason",
    [
        ("", "the port is missing"),
        ("localhost", "the port is missing"),
        ("localhost:", "the port is not a number from 0 to 65535"),
        ("localhost:http", "the port is not a number from 0 to 65535"),
        ("localhost:65536", "the port is not a number from 0 to 65535"),
        ("localhost:-1", "the port is not a number from 0 to 65535"),
        ("localhost:٣", "the port is not a number from 0 to 65535"),
        ("::1:80", "an IPv6 address goes in brackets, as in [::1]:50000"),
        ("[::g]:80", "what is in the brackets is not an IPv6 address"),
        ("[127.0.0.1]:80", "what is in the brackets is not an IPv6 address"),
        ("256.0.0.1:80", "the host is not an IPv4 address"),
        ("a b:80", "the host is not a host name"),
        ("-a:80", "the host is not a host name"),
        ("a..b:80", "the host is not a host name"),
        ("http://a:80", "an IPv6 address goes in brackets, as in [::1]:50000"),
        ("unix:", "the socket's path is missing"),
    ],
)
def test_bad_address(text: str, reason: str, write_config: Write) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        Address.parse(text)
    assert str(caught.value) == reason
    assert problems_of(write_config(f"[grpc_server]\naddr = '{text}'")) == [
        f'../conf/worker.toml:2: grpc_server.addr: must be {AN_ADDRESS}, not "{text}": {reason}'
    ]
