"""worker.toml, the environment and flags: what is taken, and what each refusal says."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest
import tomli

from worker_svc.config import (
    MAX_FILE_BYTES,
    Address,
    Config,
    ConfigError,
    GrpcServerConfig,
    JobsConfig,
    Key,
    LogConfig,
    Problem,
    SchedulerConfig,
    StateConfig,
    SupervisorConfig,
    Variables,
    flag_name,
    keys,
    load,
    load_config,
    variable_name,
)
from worker_svc.config.toml_lines import key_lines

SAMPLE = Path(__file__).parents[2] / "worker.toml"
ENVIRON = {"HOME": "/home/someone", "PATH": "/usr/bin"}
SECRET = "hunter2-topsecret"

AN_ADDRESS = "host:port, [ipv6]:port or unix:/path"
A_SIGNAL = 'a signal, by name ("SIGTERM" or "TERM") or by number as text ("15")'

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write conf/worker.toml, from a current directory beside it; its relative path."""
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    conf = tmp_path / "conf"
    conf.mkdir()

    def write(text: str) -> Path:
        (conf / "worker.toml").write_text(text)
        return Path("../conf/worker.toml")

    return write


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def problems_of(
    path: Path | None, environ: Mapping[str, str] = ENVIRON, overrides: Mapping[str, str] | None = None
) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, environ=environ, overrides=overrides or {})
    assert str(caught.value).splitlines() == [str(problem) for problem in caught.value.problems]
    return str(caught.value).splitlines()


def from_variable(name: str, text: str) -> Config:
    return load_config(None, environ={**ENVIRON, name: text})


# Defaults and the sample


def test_defaults_without_a_file(in_tmp_path: Path) -> None:
    config = load_config(None, environ=ENVIRON)
    assert config == Config(
        grpc_server=GrpcServerConfig(
            addr=Address("127.0.0.1", 50000),
            use_tls=False,
            crt_file=in_tmp_path / "server.pem",
            key_file=in_tmp_path / "server.key",
            client_ca_file=None,
            advertise_addr=None,
            drain_grace_s=10.0,
        ),
        scheduler=SchedulerConfig(
            addr=Address("127.0.0.1", 3000),
            use_tls=False,
            ca_file=None,
            crt_file=None,
            key_file=None,
            server_name="",
            register_timeout_s=5.0,
            backoff_initial_s=0.2,
            backoff_max_s=30.0,
            keepalive_s=10.0,
        ),
        jobs=JobsConfig(
            cwd=in_tmp_path,
            slots=0,
            queue_length=10_000,
            timeout_s=0.0,
            stop_signal="SIGTERM",
            stop_grace_s=10.0,
            pass_env=("PATH", "HOME", "LANG", "LC_ALL", "TZ", "USER", "LOGNAME", "SHELL", "TMPDIR"),
            env=Variables(),
            on_reboot="start",
        ),
        state=StateConfig(dir=Path("/home/someone/.local/state/worker-svc")),
        supervisor=SupervisorConfig(idle_exit_s=60.0),
        log=LogConfig(format="auto", level="info", file=None),
    )


def test_an_empty_file_is_all_defaults(write: Write) -> None:
    config = load_config(write(""), environ=ENVIRON)
    assert config.jobs == JobsConfig(cwd=Path.cwd())
    assert config.scheduler == SchedulerConfig()


def test_sample_names_every_key_with_its_default() -> None:
    with SAMPLE.open("rb") as stream:
        sample = tomli.load(stream)
    written = {(section, name): value for section, table in sample.items() for name, value in table.items()}
    assert written == {(key.section, key.name): key.default for key in keys()}


def test_sample_loads_as_the_defaults(in_tmp_path: Path) -> None:
    defaults = load(None, environ=ENVIRON)
    (in_tmp_path / "worker.toml").write_text(SAMPLE.read_text())
    loaded = load(None, environ=ENVIRON)
    assert loaded.config == defaults.config
    assert {setting.source for setting in defaults.settings} == {"default"}
    assert all(setting.source.startswith("worker.toml:") for setting in loaded.settings)


def test_sample_comments_every_section_or_key() -> None:
    lines = SAMPLE.read_text().splitlines()
    assert sum(line.startswith("#") for line in lines) > len(keys())


# Keys, flags and variables derive from the declarations


def test_every_field_is_a_declared_key() -> None:
    declared = {(key.section, key.name) for key in keys()}
    config = Config(state=StateConfig(dir=Path("/x")))
    assert declared == {
        (section.name, item.name) for section in fields(Config) for item in fields(getattr(config, section.name))
    }
    assert all(key.doc.endswith(".") for key in keys())
    assert all(key.type_name and key.expects for key in keys())


def test_flag_and_variable_names_are_unambiguous() -> None:
    assert flag_name("grpc_server", "use_tls") == "--grpc-server-use-tls"
    assert variable_name("grpc_server", "use_tls") == "WORKER_SVC_GRPC_SERVER_USE_TLS"
    assert len({key.flag for key in keys()}) == len({key.variable for key in keys()}) == len(keys())
    assert "WORKER_SVC_CONFIG" not in {key.variable for key in keys()}


@pytest.mark.parametrize("key", keys(), ids=lambda key: key.path)
def test_every_default_is_taken_as_text_too(key: Key, in_tmp_path: Path) -> None:
    text = ",".join(key.default) if isinstance(key.default, list) else key.default_toml.strip('"')
    expected = load_config(None, environ=ENVIRON)
    assert from_variable(key.variable, text) == expected
    assert load_config(None, environ=ENVIRON, overrides={key.path: text}) == expected


def test_config_is_frozen() -> None:
    config = JobsConfig()
    with pytest.raises(FrozenInstanceError):
        config.slots = 3  # type: ignore[misc]


# Precedence and paths


def test_flag_beats_environment_beats_file_beats_default(write: Write) -> None:
    path = write("[jobs]\nslots = 1\nqueue_length = 1\ntimeout_s = 1")
    environ = {**ENVIRON, "WORKER_SVC_JOBS_SLOTS": "2", "WORKER_SVC_JOBS_QUEUE_LENGTH": "2"}
    loaded = load(path, environ=environ, overrides={"jobs.slots": "3"})
    jobs = loaded.config.jobs
    assert (jobs.slots, jobs.queue_length, jobs.timeout_s, jobs.stop_grace_s) == (3, 2, 1.0, 10.0)
    assert {s.key.name: s.source for s in loaded.settings if s.key.section == "jobs"} == {
        "cwd": "default",
        "slots": "--jobs-slots",
        "queue_length": "WORKER_SVC_JOBS_QUEUE_LENGTH",
        "timeout_s": "../conf/worker.toml:4",
        "stop_signal": "default",
        "stop_grace_s": "default",
        "pass_env": "default",
        "env": "default",
        "user": "default",
        "no_new_privs": "default",
        "leader_exit": "default",
        "on_reboot": "default",
    }


def test_relative_paths_start_where_they_are_written(write: Write, tmp_path: Path) -> None:
    path = write("state.dir = 'state'\nlog.file = 'w.log'\ngrpc_server.addr = 'unix:w.sock'\njobs.cwd = '.'")
    environ = {**ENVIRON, "WORKER_SVC_LOG_FILE": "env.log"}
    config = load_config(path, environ=environ, overrides={"grpc_server.key_file": "flag.key"})
    # As `conf` is named by way of `cwd/..`, the paths are compared as the kernel sees them.
    assert config.state.dir.resolve() == tmp_path / "conf/state"
    assert config.jobs.cwd.resolve() == tmp_path / "conf"
    assert Path(config.grpc_server.addr.unix_path).resolve() == tmp_path / "conf/w.sock"
    assert config.grpc_server.crt_file is not None
    assert config.grpc_server.crt_file.resolve() == tmp_path / "conf/server.pem"
    assert config.log.file == tmp_path / "cwd/env.log"
    assert config.grpc_server.key_file == tmp_path / "cwd/flag.key"


def test_absolute_and_empty_paths_stay(write: Write) -> None:
    config = load_config(write('[grpc_server]\ncrt_file = "/etc/a.pem"\nkey_file = ""'), environ=ENVIRON)
    assert config.grpc_server.crt_file == Path("/etc/a.pem")
    assert config.grpc_server.key_file is None
    assert config.jobs.cwd == Path.cwd()


def test_worker_toml_of_the_current_directory_is_used(in_tmp_path: Path) -> None:
    (in_tmp_path / "worker.toml").write_text("[jobs]\nslots = 5")
    assert load_config(None, environ=ENVIRON).jobs.slots == 5


def test_variable_names_the_file(in_tmp_path: Path) -> None:
    (in_tmp_path / "worker.toml").write_text("[jobs]\nslots = 5")
    (in_tmp_path / "other.toml").write_text("[jobs]\nslots = 6")
    environ = {**ENVIRON, "WORKER_SVC_CONFIG": "other.toml"}
    assert load_config(None, environ=environ).jobs.slots == 6
    assert load_config(Path("worker.toml"), environ=environ).jobs.slots == 5
    assert problems_of(None, {**ENVIRON, "WORKER_SVC_CONFIG": "gone.toml"}) == [
        "gone.toml: cannot be read: No such file or directory (WORKER_SVC_CONFIG names it)"
    ]


@pytest.mark.parametrize(
    "environ,expected",
    [
        ({"STATE_DIRECTORY": "/var/lib/w", "XDG_STATE_HOME": "/x", "HOME": "/h"}, "/var/lib/w"),
        ({"STATE_DIRECTORY": "/var/lib/w:/var/lib/v", "HOME": "/h"}, "/var/lib/w"),
        ({"XDG_STATE_HOME": "/x", "HOME": "/h"}, "/x/worker-svc"),
        ({"XDG_STATE_HOME": "relative", "HOME": "/h"}, "/h/.local/state/worker-svc"),
        ({"STATE_DIRECTORY": "", "XDG_STATE_HOME": "", "HOME": "/h"}, "/h/.local/state/worker-svc"),
        ({"HOME": "/h", "WORKER_SVC_STATE_DIR": "/mine"}, "/mine"),
    ],
)
def test_state_directory(environ: dict[str, str], expected: str, in_tmp_path: Path) -> None:
    assert load_config(None, environ=environ).state.dir == Path(expected)


@pytest.mark.parametrize("environ", [{}, {"HOME": ""}, {"HOME": "relative"}])
def test_no_state_directory(environ: dict[str, str], in_tmp_path: Path) -> None:
    [problem] = problems_of(None, environ)
    assert problem.startswith("state.dir: no directory to keep state in")
    assert problem.endswith("set state.dir")


def test_current_directory_that_is_gone(in_tmp_path: Path) -> None:
    program = (
        "import os, sys; d = sys.argv[1]; os.mkdir(d); os.chdir(d); os.rmdir(d)\n"
        "from worker_svc.config import *\n"
        "try: load_config(None, environ={})\n"
        "except ConfigError as error: print(error)"
    )
    environ = {**os.environ, "PYTHONPATH": str(SAMPLE.parent)}
    command = [sys.executable, "-c", program, str(in_tmp_path / "gone")]
    ran = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert ran.stdout == "current directory: cannot be found: No such file or directory\n"


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
    name: str, text: str, get: Callable[[Config], object], expected: object, in_tmp_path: Path
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
def test_stop_signal(text: str, name: str, number: int, in_tmp_path: Path) -> None:
    jobs = from_variable("WORKER_SVC_JOBS_STOP_SIGNAL", text).jobs
    assert (jobs.stop_signal, jobs.stop_signal_number) == (name, number)


@pytest.mark.parametrize("text", ["", "0", "-9", "999", "SIGNOPE", "SIG_IGN", "RTMIN+99", "SIGRTMIN+", "TERM KILL"])
def test_no_such_stop_signal(text: str, in_tmp_path: Path) -> None:
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
def test_bad_address(text: str, reason: str, write: Write) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        Address.parse(text)
    assert str(caught.value) == reason
    assert problems_of(write(f"[grpc_server]\naddr = '{text}'")) == [
        f'../conf/worker.toml:2: grpc_server.addr: must be {AN_ADDRESS}, not "{text}": {reason}'
    ]


# What is refused, and where the message points


@pytest.mark.parametrize(
    "text,expected",
    [
        ("[jobs]\n# no\nslots = -3", "3: jobs.slots: must be a whole number from 0 to 100000, not -3"),
        ("[jobs]\nslots = true", "2: jobs.slots: must be a whole number from 0 to 100000, not true"),
        ("[jobs]\nslots = 1.0", "2: jobs.slots: must be a whole number from 0 to 100000, not 1.0"),
        ("[jobs]\nslots = '8'", '2: jobs.slots: must be a whole number from 0 to 100000, not "8"'),
        ("[jobs]\nslots = [1]", "2: jobs.slots: must be a whole number from 0 to 100000, not a list"),
        ("[jobs.slots]\na = 1", "1: jobs.slots: must be a whole number from 0 to 100000, not a table"),
        (
            "[jobs]\nslots = 2020-01-01",
            "2: jobs.slots: must be a whole number from 0 to 100000, not a date or time",
        ),
        (
            f"[jobs]\nslots = 0x{'f' * 5000}",
            "2: jobs.slots: must be a whole number from 0 to 100000, not a number that large",
        ),
        ("[grpc_server]\nuse_tls = 1", "2: grpc_server.use_tls: must be true or false, not 1"),
        ("[grpc_server]\nuse_tls = 'true'", '2: grpc_server.use_tls: must be true or false, not "true"'),
        (
            "[jobs]\ntimeout_s = nan",
            "2: jobs.timeout_s: must be a number of seconds from 0 to 316224000, not nan",
        ),
        (
            "[jobs]\ntimeout_s = inf",
            "2: jobs.timeout_s: must be a number of seconds from 0 to 316224000, not inf",
        ),
        (
            "[jobs]\ntimeout_s = -1",
            "2: jobs.timeout_s: must be a number of seconds from 0 to 316224000, not -1",
        ),
        (
            "[jobs]\ntimeout_s = false",
            "2: jobs.timeout_s: must be a number of seconds from 0 to 316224000, not false",
        ),
        (
            "[scheduler]\nkeepalive_s = 0",
            "2: scheduler.keepalive_s: must be a number of seconds from 0.001 to 316224000, not 0",
        ),
        ("[log]\nlevel = 'warn'", '2: log.level: must be "debug", "info", "warning" or "error", not "warn"'),
        ("[log]\nlevel = 3", '2: log.level: must be "debug", "info", "warning" or "error", not 3'),
        ("[log]\nformat = 'xml'", '2: log.format: must be "auto", "json" or "console", not "xml"'),
        ("[log]\nfile = 3", "2: log.file: must be a path, not 3"),
        ('[log]\nfile = "a\\u0000b"', '2: log.file: must be a path, not "a\\u0000b": it contains NUL'),
        (
            "[state]\ndir = '~/state'",
            '2: state.dir: must be a path, not "~/state": ~ is not expanded here, write the whole path',
        ),
        ("[jobs]\non_reboot = 'keep'", '2: jobs.on_reboot: must be "start" or "drop", not "keep"'),
        (
            "[jobs]\nstop_signal = 15",
            f"2: jobs.stop_signal: must be {A_SIGNAL}, not 15",
        ),
        ("[jobs]\npass_env = 'PATH'", '2: jobs.pass_env: must be a list of variable names, not "PATH"'),
        ("[jobs]\npass_env = ['A', 1]", "2: jobs.pass_env: entry 2 must be a variable name, not 1"),
        (
            f"[jobs]\npass_env = ['A={SECRET}']",
            "2: jobs.pass_env: entry 1 must be a variable name: not empty, without = and NUL",
        ),
        (f"[jobs]\nenv = '{SECRET}'", "2: jobs.env: must be a table of text values, not text"),
        ("[jobs]\n[jobs.env]\nA = '1'\nPIN = 4711", "4: jobs.env.PIN: must be text, not a number"),
        ("jobs.env.PIN = true", "1: jobs.env.PIN: must be text, not true or false"),
        ("[jobs]\nenv = { A = '1',\tPIN = [] }", "2: jobs.env.PIN: must be text, not a list"),
        (f'[jobs.env]\nB = "{SECRET}\\u0000"', "2: jobs.env.B: must not contain NUL"),
        (
            f"[jobs.env]\n'B={SECRET}' = ''",
            "1: jobs.env.B: a variable's name must not be empty nor contain = or NUL",
        ),
        (
            "[scheduler]\naddr = 'sched'",
            f'2: scheduler.addr: must be {AN_ADDRESS} (or empty), not "sched": the port is missing',
        ),
        (
            "[scheduler]\naddr = ':3000'",
            f'2: scheduler.addr: must be {AN_ADDRESS} (or empty), not ":3000": the host is missing',
        ),
        (
            "[scheduler]\naddr = 'a:0'",
            f'2: scheduler.addr: must be {AN_ADDRESS} (or empty), not "a:0": port 0 can\'t be connected to',
        ),
        (
            '[scheduler]\nserver_name = "a\\nb"',
            '2: scheduler.server_name: must be text on one line, not "a\\nb"',
        ),
        # Names
        ("[jobs]\n\nslot = 3", "3: jobs.slot: unknown key; did you mean slots?"),
        ("[jobs]\nqueue-length = 3", "2: jobs.queue-length: unknown key; did you mean queue_length?"),
        ("[log]\nslots = 3", "2: log.slots: unknown key; did you mean jobs.slots?"),
        ("[log]\nxyzzy = 3", "2: log.xyzzy: unknown key"),
        ('[log]\n"a\\nb" = 3', '2: log."a\\nb": unknown key'),
        ("\n[grpc-server]\nx = 1\ny = 2", "2: grpc-server: unknown section; did you mean grpc_server?"),
        ("[xyzzy]", "1: xyzzy: unknown section"),
        ("slots = 3", "1: slots: unknown key; every key belongs in a section; did you mean jobs.slots?"),
        (
            "addr = 'a:1'",
            ("1: addr: unknown key; every key belongs in a section; did you mean grpc_server.addr or scheduler.addr?"),
        ),
        ("\njobs = 3", "2: jobs: must be a section, written [jobs], not a number"),
        ("[[jobs]]\nslots = 3", "1: jobs: must be a section, written [jobs], not a list"),
        # Keys that do not go together
        ("[grpc_server]\nclient_ca_file = 'ca.pem'", "2: grpc_server.client_ca_file: needs use_tls = true"),
        (
            "[grpc_server]\nuse_tls = true\ncrt_file = ''",
            "3: grpc_server.crt_file: must not be empty when use_tls is true",
        ),
        (
            "[grpc_server]\nadvertise_addr = '0.0.0.0:1'",
            ("2: grpc_server.advertise_addr: must be a host that can be reached; 0.0.0.0:1 stands for every interface"),
        ),
        ("[scheduler]\nca_file = 'ca.pem'", "2: scheduler.ca_file: needs use_tls = true"),
        ("[scheduler]\nserver_name = 's'\nuse_tls = false", "2: scheduler.server_name: needs use_tls = true"),
        (
            "[scheduler]\nuse_tls = true\ncrt_file = 'c'",
            "3: scheduler.crt_file: needs key_file as well",
        ),
        (
            "[scheduler]\nuse_tls = true\nkey_file = 'c'",
            "3: scheduler.key_file: needs crt_file as well",
        ),
        (
            "[scheduler]\nbackoff_initial_s = 31",
            "2: scheduler.backoff_initial_s: backoff_initial_s 31 must not be more than backoff_max_s, 30",
        ),
        (
            "[scheduler]\n\nbackoff_max_s = 0.1",
            "3: scheduler.backoff_max_s: backoff_initial_s 0.2 must not be more than backoff_max_s, 0.1",
        ),
        # Not TOML
        ("[jobs]\nslots = \n", "2: column 9: Invalid value"),
        ("[jobs]\n\n  slots 3", "3: column 9: Expected '=' after a key in a key/value pair"),
        ("[jobs]\nslots = 1\nslots = 2", "3: column 10: Cannot overwrite a value"),
    ],
)
def test_refused_file(text: str, expected: str, write: Write) -> None:
    assert SECRET not in expected
    assert problems_of(write(text)) == [f"../conf/worker.toml:{expected}"]


@pytest.mark.parametrize(
    "name,text,expected",
    [
        ("JOBS_SLOTS", "many", 'must be a whole number from 0 to 100000, not "many"'),
        ("JOBS_SLOTS", "", 'must be a whole number from 0 to 100000, not ""'),
        ("JOBS_SLOTS", "1_0", 'must be a whole number from 0 to 100000, not "1_0"'),
        ("JOBS_SLOTS", "100001", "must be a whole number from 0 to 100000, not 100001"),
        ("JOBS_TIMEOUT_S", "nan", 'must be a number of seconds from 0 to 316224000, not "nan"'),
        ("JOBS_TIMEOUT_S", "1e999", 'must be a number of seconds from 0 to 316224000, not "1e999"'),
        ("JOBS_TIMEOUT_S", "5s", 'must be a number of seconds from 0 to 316224000, not "5s"'),
        ("LOG_FORMAT", "x" * 100, f'must be "auto", "json" or "console", not "{"x" * 60}…"'),
        ("GRPC_SERVER_USE_TLS", "yes", 'must be true or false, not "yes"'),
        ("GRPC_SERVER_CLIENT_CA_FILE", "ca.pem", "needs use_tls = true"),
        ("JOBS_PASS_ENV", "A,,B", "entry 2 must be a variable name: not empty, without = and NUL"),
        (
            "JOBS_ENV",
            f"A=1,{SECRET}",
            "part 2 must be NAME=value; where a value has a comma, write { NAME = 'value' }",
        ),
        ("JOBS_ENV", f"={SECRET}", '"": a variable\'s name must not be empty nor contain = or NUL'),
        ("JOBS_ENV", f"{{ A = {SECRET} }}", "must be a TOML table on one line, such as { NAME = 'value' }"),
        ("JOBS_ENV", f"{{ A = ['{SECRET}'] }}", "A: must be text, not a list"),
        ("JOBS_ENV", f"{{}}\nB='{SECRET}'", "must be one TOML table and nothing after it"),
        ("LOG_FILE", "\udcff", "is not UTF-8"),
        ("JOB_SLOTS", SECRET, "unknown variable; did you mean WORKER_SVC_JOBS_SLOTS?"),
        ("CONFIGS", SECRET, "unknown variable; did you mean WORKER_SVC_CONFIG?"),
    ],
)
def test_refused_variable(name: str, text: str, expected: str, in_tmp_path: Path) -> None:
    problems = problems_of(None, {**ENVIRON, f"WORKER_SVC_{name}": text})
    assert problems == [f"environment: WORKER_SVC_{name}: {expected}"]


@pytest.mark.parametrize(
    "path,text,expected",
    [
        ("jobs.slots", "-1", "--jobs-slots: must be a whole number from 0 to 100000, not -1"),
        ("grpc_server.use_tls", "x", '--grpc-server-use-tls: must be true or false, not "x"'),
        ("scheduler.ca_file", "ca.pem", "--scheduler-ca-file: needs use_tls = true"),
        ("jobs.slot", "1", "jobs.slot: unknown key; did you mean jobs.slots?"),
    ],
)
def test_refused_flag(path: str, text: str, expected: str, in_tmp_path: Path) -> None:
    assert problems_of(None, overrides={path: text}) == [expected]


def test_all_problems_at_once_in_the_order_of_precedence(write: Write) -> None:
    path = write("[jobs]\nslots = -3\nslot = 1\ntimeout_s = 'x'\n[scheduler]\nca_file = 'x'\n[nope]\n")
    environ = {**ENVIRON, "WORKER_SVC_JOBS_SLOTS": "x", "WORKER_SVC_NOPE": ""}
    with pytest.raises(ConfigError) as caught:
        load_config(path, environ=environ, overrides={"jobs.slots": "y"})
    file = "../conf/worker.toml"
    assert [(p.source, p.line, p.key) for p in caught.value.problems] == [
        (file, 2, "jobs.slots"),
        (file, 3, "jobs.slot"),
        (file, 4, "jobs.timeout_s"),
        (file, 7, "nope"),
        ("environment", None, "WORKER_SVC_JOBS_SLOTS"),
        ("environment", None, "WORKER_SVC_NOPE"),
        ("", None, "--jobs-slots"),
        (file, 6, "scheduler.ca_file"),
    ]


def test_a_refused_value_makes_no_conflict(write: Write) -> None:
    path = write("[grpc_server]\nuse_tls = 'yes'\nclient_ca_file = 'ca.pem'")
    assert problems_of(path) == ['../conf/worker.toml:2: grpc_server.use_tls: must be true or false, not "yes"']


def test_a_limit_of_output_and_keeping_all_of_it_exclude_each_other(write: Write) -> None:
    path = write("[output]\nmax_bytes = 10\nmax_bytes_limit = 100\npolicy = 'none'")
    assert problems_of(path) == [
        '../conf/worker.toml:4: output.policy: policy "none" keeps all, so max_bytes_limit cannot hold'
    ]


def test_a_conflict_is_judged_on_the_merged_values(write: Write) -> None:
    path = write("[grpc_server]\nclient_ca_file = 'ca.pem'")
    config = load_config(path, environ={**ENVIRON, "WORKER_SVC_GRPC_SERVER_USE_TLS": "1"})
    assert config.grpc_server.client_ca_file is not None


def test_a_file_that_is_no_toml_hides_neither_variables_nor_makes_conflicts(write: Write) -> None:
    environ = {"WORKER_SVC_JOBS_SLOTS": "x", "WORKER_SVC_GRPC_SERVER_CLIENT_CA_FILE": "ca.pem"}
    first, second = problems_of(write("[jobs"), environ)
    assert first.startswith("../conf/worker.toml:1: column ")
    assert second.startswith("environment: WORKER_SVC_JOBS_SLOTS: ")


@pytest.mark.parametrize(
    "content,expected",
    [
        (b"# fine\n[jobs]\ncwd = '\xff'\n", "w.toml:3: is not UTF-8: byte 0xff"),
        (b"#" * (MAX_FILE_BYTES + 1), "w.toml: is larger than 1024 KiB"),
        (b"a = " + b"[" * 100_000, "w.toml: is nested too deeply"),
    ],
)
def test_unusable_file(content: bytes, expected: str, in_tmp_path: Path) -> None:
    (in_tmp_path / "w.toml").write_bytes(content)
    assert problems_of(Path("w.toml")) == [expected]


def test_an_integer_of_too_many_digits(in_tmp_path: Path) -> None:
    (in_tmp_path / "w.toml").write_text("a = " + "1" * 5000)
    [problem] = problems_of(Path("w.toml"))
    assert problem.startswith("w.toml: is not valid TOML: Exceeds the limit")


def test_largest_file(in_tmp_path: Path) -> None:
    text = "[jobs]\nslots = 3\n"
    (in_tmp_path / "w.toml").write_text("#" * (MAX_FILE_BYTES - len(text) - 1) + "\n" + text)
    assert load_config(Path("w.toml"), environ=ENVIRON).jobs.slots == 3


def test_file_that_cannot_be_read(in_tmp_path: Path) -> None:
    (in_tmp_path / "directory").mkdir()
    assert problems_of(Path("gone.toml")) == ["gone.toml: cannot be read: No such file or directory"]
    assert problems_of(Path("directory")) == ["directory: cannot be read: Is a directory"]
    assert problems_of(Path("a\0b")) == ["a\0b: cannot be read: embedded null byte"]
    (in_tmp_path / "worker.toml").mkdir()
    assert problems_of(None) == ["worker.toml: cannot be read: Is a directory"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission(in_tmp_path: Path) -> None:
    (in_tmp_path / "worker.toml").write_text("")
    (in_tmp_path / "worker.toml").chmod(0)
    assert problems_of(None) == ["worker.toml: cannot be read: Permission denied"]


def test_byte_order_mark_and_windows_line_ends(in_tmp_path: Path) -> None:
    (in_tmp_path / "w.toml").write_bytes(b"\xef\xbb\xbf[jobs]\r\nslots = 3\r\nslot = 4\r\n")
    assert problems_of(Path("w.toml")) == ["w.toml:3: jobs.slot: unknown key; did you mean slots?"]


def test_unix_socket_path_that_is_too_long(in_tmp_path: Path) -> None:
    name = "unix:/" + "x" * 107
    [problem] = problems_of(None, {**ENVIRON, "WORKER_SVC_GRPC_SERVER_ADDR": name})
    assert problem.startswith("environment: WORKER_SVC_GRPC_SERVER_ADDR: the socket's path ")
    assert "has 108 bytes; at most 107 are possible" in problem
    assert from_variable("WORKER_SVC_GRPC_SERVER_ADDR", name[:-1]).grpc_server.addr.is_unix


@pytest.mark.parametrize(
    "problem,expected",
    [
        (Problem("worker.toml", 12, "jobs.slots", "no"), "worker.toml:12: jobs.slots: no"),
        (Problem("worker.toml", None, "", "no"), "worker.toml: no"),
        (Problem("environment", None, "WORKER_SVC_X", "no"), "environment: WORKER_SVC_X: no"),
        (Problem("", None, "--jobs-slots", "no"), "--jobs-slots: no"),
    ],
)
def test_problem_on_one_line(problem: Problem, expected: str) -> None:
    assert str(problem) == expected


# Secrets, and the dump


def test_values_of_variables_never_show(write: Write) -> None:
    loaded = load(write(f"[jobs]\nenv = {{ TOKEN = '{SECRET}', 'o dd' = '' }}"), environ=ENVIRON)
    assert loaded.config.jobs.env["TOKEN"] == SECRET
    for shown in (repr(loaded), str(loaded.config.jobs.env), loaded.dump()):
        assert SECRET not in shown
        assert "TOKEN" in shown
    assert 'env = { TOKEN = "(hidden)", "o dd" = "(hidden)" }' in loaded.dump()


def test_variables_are_a_hashable_mapping() -> None:
    assert Variables({"A": "1"}) == Variables({"A": "1"}) != Variables({"A": "2"})
    assert len({Variables({"A": "1", "B": "2"}), Variables({"B": "2", "A": "1"})}) == 1
    given = {"A": "1"}
    variables = Variables(given)
    given["A"] = "2"
    assert variables == {"A": "1"}


def test_dump_is_a_file_that_means_the_same(write: Write) -> None:
    text = (
        "[jobs]\nstop_signal = '40'\ncwd = 'a \"b\" é'\npass_env = []\ntimeout_s = 1e7\n"
        "[grpc_server]\naddr = '[::1]:0'\n[log]\nfile = \"x\\ty\""
    )
    loaded = load(write(text), environ=ENVIRON)
    dumped = loaded.dump()
    assert 'addr = "[::1]:0"                          # ../conf/worker.toml:7\n' in dumped
    assert load_config(write(dumped), environ={}) == loaded.config
    assert [line for line in dumped.splitlines() if line.startswith("[")] == [
        f"[{section.name}]" for section in fields(Config)
    ]


# Lines of keys

TRICKY = '''\
# [jobs] in a comment
top = 1
[ jobs . "env" ]  # a header with blanks
"a.b" = "x" # = not a key
'c' = """
[log]
level = "not a key"
\\""" still the string """""
d = \'\'\'
[state]'\'\'\'\'
[jobs]
pass_env = [ # comment with ] and "
  "A]",
  'B"', """
]""", [ { x = 1 } ],
]
dotted . slots = 0x1F
when = 1979-05-27 07:32:00
inline = { a = { b = 1, "c" = [1, 2] }, d = "}" }
"q\\u0075oted" = {}
[[things]]
n = 1
[[things]]
n = 2
[last]
k = "\\"#"
'''


def test_lines_of_keys_in_a_tricky_document() -> None:
    tomli.loads(TRICKY)
    assert key_lines(TRICKY) == {
        ("top",): 2,
        ("jobs",): 3,
        ("jobs", "env"): 3,
        ("jobs", "env", "a.b"): 4,
        ("jobs", "env", "c"): 5,
        ("jobs", "env", "d"): 9,
        ("jobs", "pass_env"): 12,
        ("jobs", "dotted"): 17,
        ("jobs", "dotted", "slots"): 17,
        ("jobs", "when"): 18,
        ("jobs", "inline"): 19,
        ("jobs", "inline", "a"): 19,
        ("jobs", "inline", "d"): 19,
        ("jobs", "quoted"): 20,
        ("things",): 21,
        ("things", "n"): 22,
        ("last",): 25,
        ("last", "k"): 26,
    }


@pytest.mark.parametrize(
    "text,path,line",
    [
        ("jobs.slots = 1", ("jobs", "slots"), 1),
        ("\n\njobs = { queue_length = 2, slots = 1 }", ("jobs", "slots"), 3),
        ("'jobs'.\"slots\" = 1", ("jobs", "slots"), 1),
        ("[jobs]\n\t slots\t=\t1", ("jobs", "slots"), 2),
        ("[a]\nb = ''''''\n[jobs]\nslots=1", ("jobs", "slots"), 4),
        ("[a]\nb = [[], ['''\n]'''], {c = '}'}]\n[jobs]\nslots=1", ("jobs", "slots"), 5),
        ("a.b.c.d.e = {f = '='}\n[jobs]\nslots=1", ("jobs", "slots"), 3),
        ("a = [{b = 1}, {c = {d = 2}}]\n[jobs]\nslots=1", ("jobs", "slots"), 3),
        ("a = []\nb = {}\n[jobs]\n#\nslots=1", ("jobs", "slots"), 5),
    ],
)
def test_line_of_a_key(text: str, path: tuple[str, ...], line: int) -> None:
    tomli.loads(text)
    assert key_lines(text)[path] == line
