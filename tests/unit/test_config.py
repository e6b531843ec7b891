"""worker.toml, the environment and flags: which keys there are, and which of them is taken."""

import os
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest
import tomli

from tests.support.configured import ENVIRON, Write, from_variable, load_config, problems_of
from worker_svc.config import (
    Address,
    Config,
    GrpcServerConfig,
    JobsConfig,
    Key,
    LogConfig,
    SchedulerConfig,
    StateConfig,
    SupervisorConfig,
    Variables,
    flag_name,
    keys,
    load,
    variable_name,
)

SAMPLE = Path(__file__).parents[2] / "worker.toml"


# Defaults and the sample


def test_defaults_without_a_file(elsewhere: Path) -> None:
    config = load_config(None, environ=ENVIRON)
    assert config == Config(
        grpc_server=GrpcServerConfig(
            addr=Address("127.0.0.1", 50000),
            use_tls=False,
            crt_file=elsewhere / "server.pem",
            key_file=elsewhere / "server.key",
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
            cwd=elsewhere,
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


def test_an_empty_file_is_all_defaults(write_config: Write) -> None:
    config = load_config(write_config(""), environ=ENVIRON)
    assert config.jobs == JobsConfig(cwd=Path.cwd())
    assert config.scheduler == SchedulerConfig()


def test_sample_names_every_key_with_its_default() -> None:
    with SAMPLE.open("rb") as stream:
        sample = tomli.load(stream)
    written = {(section, name): value for section, table in sample.items() for name, value in table.items()}
    assert written == {(key.section, key.name): key.default for key in keys()}


def test_sample_loads_as_the_defaults(elsewhere: Path) -> None:
    defaults = load(None, environ=ENVIRON)
    (elsewhere / "worker.toml").write_text(SAMPLE.read_text())
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
def test_every_default_is_taken_as_text_too(key: Key, elsewhere: Path) -> None:
    text = ",".join(key.default) if isinstance(key.default, list) else key.default_toml.strip('"')
    expected = load_config(None, environ=ENVIRON)
    assert from_variable(key.variable, text) == expected
    assert load_config(None, environ=ENVIRON, overrides={key.path: text}) == expected


def test_config_is_frozen() -> None:
    config = JobsConfig()
    with pytest.raises(FrozenInstanceError):
        config.slots = 3  # type: ignore[misc]


# Precedence and paths


def test_flag_beats_environment_beats_file_beats_default(write_config: Write) -> None:
    path = write_config("[jobs]\nslots = 1\nqueue_length = 1\ntimeout_s = 1")
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


def test_relative_paths_start_where_they_are_written(write_config: Write, tmp_path: Path) -> None:
    path = write_config("state.dir = 'state'\nlog.file = 'w.log'\ngrpc_server.addr = 'unix:w.sock'\njobs.cwd = '.'")
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


def test_absolute_and_empty_paths_stay(write_config: Write) -> None:
    config = load_config(write_config('[grpc_server]\ncrt_file = "/etc/a.pem"\nkey_file = ""'), environ=ENVIRON)
    assert config.grpc_server.crt_file == Path("/etc/a.pem")
    assert config.grpc_server.key_file is None
    assert config.jobs.cwd == Path.cwd()


def test_worker_toml_of_the_current_directory_is_used(elsewhere: Path) -> None:
    (elsewhere / "worker.toml").write_text("[jobs]\nslots = 5")
    assert load_config(None, environ=ENVIRON).jobs.slots == 5


def test_variable_names_the_file(elsewhere: Path) -> None:
    (elsewhere / "worker.toml").write_text("[jobs]\nslots = 5")
    (elsewhere / "other.toml").write_text("[jobs]\nslots = 6")
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
def test_state_directory(environ: dict[str, str], expected: str, elsewhere: Path) -> None:
    assert load_config(None, environ=environ).state.dir == Path(expected)


@pytest.mark.parametrize("environ", [{}, {"HOME": ""}, {"HOME": "relative"}])
def test_no_state_directory(environ: dict[str, str], elsewhere: Path) -> None:
    [problem] = problems_of(None, environ)
    assert problem.startswith("state.dir: no directory to keep state in")
    assert problem.endswith("set state.dir")


def test_current_directory_that_is_gone(elsewhere: Path) -> None:
    program = (
        "import os, sys; d = sys.argv[1]; os.mkdir(d); os.chdir(d); os.rmdir(d)\n"
        "from worker_svc.config import *\n"
        "try: load(None, environ={})\n"
        "except ConfigError as error: print(error)"
    )
    environ = {**os.environ, "PYTHONPATH": str(SAMPLE.parent)}
    command = [sys.executable, "-c", program, str(elsewhere / "gone")]
    ran = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert ran.stdout == "current directory: cannot be found: No such file or directory\n"
