"""What of a configuration is refused, and where the message points."""

import os
from pathlib import Path

import pytest

from tests.support.configured import (
    A_SIGNAL,
    AN_ADDRESS,
    ENVIRON,
    SECRET,
    Write,
    from_variable,
    load_config,
    problems_of,
)
from worker_svc.config import MAX_FILE_BYTES, ConfigError, Problem

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
        ("[jobs]\nslots = 2020-01-01", "2: jobs.slots: must be a whole number from 0 to 100000, not a date or time"),
        (
            f"[jobs]\nslots = 0x{'f' * 5000}",
            "2: jobs.slots: must be a whole number from 0 to 100000, not a number that large",
        ),
        ("[grpc_server]\nuse_tls = 1", "2: grpc_server.use_tls: must be true or false, not 1"),
        ("[grpc_server]\nuse_tls = 'true'", '2: grpc_server.use_tls: must be true or false, not "true"'),
        ("[jobs]\ntimeout_s = nan", "2: jobs.timeout_s: must be a number of seconds from 0 to 316224000, not nan"),
        ("[jobs]\ntimeout_s = inf", "2: jobs.timeout_s: must be a number of seconds from 0 to 316224000, not inf"),
        ("[jobs]\ntimeout_s = -1", "2: jobs.timeout_s: must be a number of seconds from 0 to 316224000, not -1"),
        ("[jobs]\ntimeout_s = false", "2: jobs.timeout_s: must be a number of seconds from 0 to 316224000, not false"),
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
        ("[jobs]\nstop_signal = 15", f"2: jobs.stop_signal: must be {A_SIGNAL}, not 15"),
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
        (f"[jobs.env]\n'B={SECRET}' = ''", "1: jobs.env.B: a variable's name must not be empty nor contain = or NUL"),
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
        ('[scheduler]\nserver_name = "a\\nb"', '2: scheduler.server_name: must be text on one line, not "a\\nb"'),
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
        ("[scheduler]\nuse_tls = true\ncrt_file = 'c'", "3: scheduler.crt_file: needs key_file as well"),
        ("[scheduler]\nuse_tls = true\nkey_file = 'c'", "3: scheduler.key_file: needs crt_file as well"),
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
def test_refused_file(text: str, expected: str, write_config: Write) -> None:
    assert SECRET not in expected
    assert problems_of(write_config(text)) == [f"../conf/worker.toml:{expected}"]


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
        ("JOBS_ENV", f"A=1,{SECRET}", "part 2 must be NAME=value; where a value has a comma, write { NAME = 'value' }"),
        ("JOBS_ENV", f"={SECRET}", '"": a variable\'s name must not be empty nor contain = or NUL'),
        ("JOBS_ENV", f"{{ A = {SECRET} }}", "must be a TOML table on one line, such as { NAME = 'value' }"),
        ("JOBS_ENV", f"{{ A = ['{SECRET}'] }}", "A: must be text, not a list"),
        ("JOBS_ENV", f"{{}}\nB='{SECRET}'", "must be one TOML table and nothing after it"),
        ("LOG_FILE", "\udcff", "is not UTF-8"),
        ("JOB_SLOTS", SECRET, "unknown variable; did you mean WORKER_SVC_JOBS_SLOTS?"),
        ("CONFIGS", SECRET, "unknown variable; did you mean WORKER_SVC_CONFIG?"),
    ],
)
def test_refused_variable(name: str, text: str, expected: str, elsewhere: Path) -> None:
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
def test_refused_flag(path: str, text: str, expected: str, elsewhere: Path) -> None:
    assert problems_of(None, overrides={path: text}) == [expected]


def test_all_problems_at_once_in_the_order_of_precedence(write_config: Write) -> None:
    path = write_config("[jobs]\nslots = -3\nslot = 1\ntimeout_s = 'x'\n[scheduler]\nca_file = 'x'\n[nope]\n")
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


def test_a_refused_value_makes_no_conflict(write_config: Write) -> None:
    path = write_config("[grpc_server]\nuse_tls = 'yes'\nclient_ca_file = 'ca.pem'")
    assert problems_of(path) == ['../conf/worker.toml:2: grpc_server.use_tls: must be true or false, not "yes"']


def test_a_limit_of_output_and_keeping_all_of_it_exclude_each_other(write_config: Write) -> None:
    path = write_config("[output]\nmax_bytes = 10\nmax_bytes_limit = 100\npolicy = 'none'")
    assert problems_of(path) == [
        '../conf/worker.toml:4: output.policy: policy "none" keeps all, so max_bytes_limit cannot hold'
    ]


def test_a_conflict_is_judged_on_the_merged_values(write_config: Write) -> None:
    path = write_config("[grpc_server]\nclient_ca_file = 'ca.pem'")
    config = load_config(path, environ={**ENVIRON, "WORKER_SVC_GRPC_SERVER_USE_TLS": "1"})
    assert config.grpc_server.client_ca_file is not None


def test_a_file_that_is_no_toml_hides_neither_variables_nor_makes_conflicts(write_config: Write) -> None:
    environ = {"WORKER_SVC_JOBS_SLOTS": "x", "WORKER_SVC_GRPC_SERVER_CLIENT_CA_FILE": "ca.pem"}
    first, second = problems_of(write_config("[jobs"), environ)
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
def test_unusable_file(content: bytes, expected: str, elsewhere: Path) -> None:
    (elsewhere / "w.toml").write_bytes(content)
    assert problems_of(Path("w.toml")) == [expected]


def test_an_integer_of_too_many_digits(elsewhere: Path) -> None:
    (elsewhere / "w.toml").write_text("a = " + "1" * 5000)
    [problem] = problems_of(Path("w.toml"))
    assert problem.startswith("w.toml: is not valid TOML: Exceeds the limit")


def test_largest_file(elsewhere: Path) -> None:
    text = "[jobs]\nslots = 3\n"
    (elsewhere / "w.toml").write_text("#" * (MAX_FILE_BYTES - len(text) - 1) + "\n" + text)
    assert load_config(Path("w.toml"), environ=ENVIRON).jobs.slots == 3


def test_file_that_cannot_be_read(elsewhere: Path) -> None:
    (elsewhere / "directory").mkdir()
    assert problems_of(Path("gone.toml")) == ["gone.toml: cannot be read: No such file or directory"]
    assert problems_of(Path("directory")) == ["directory: cannot be read: Is a directory"]
    assert problems_of(Path("a\0b")) == ["a\0b: cannot be read: embedded null byte"]
    (elsewhere / "worker.toml").mkdir()
    assert problems_of(None) == ["worker.toml: cannot be read: Is a directory"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission(elsewhere: Path) -> None:
    (elsewhere / "worker.toml").write_text("")
    (elsewhere / "worker.toml").chmod(0)
    assert problems_of(None) == ["worker.toml: cannot be read: Permission denied"]


def test_byte_order_mark_and_windows_line_ends(elsewhere: Path) -> None:
    (elsewhere / "w.toml").write_bytes(b"\xef\xbb\xbf[jobs]\r\nslots = 3\r\nslot = 4\r\n")
    assert problems_of(Path("w.toml")) == ["w.toml:3: jobs.slot: unknown key; did you mean slots?"]


def test_unix_socket_path_that_is_too_long(elsewhere: Path) -> None:
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
