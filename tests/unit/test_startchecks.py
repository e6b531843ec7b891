"""What is checked before a worker serves."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.startchecks import config, found, mended_by, needs_root
from worker_svc.access.startchecks import check_unix_socket, mend_state_dir
from worker_svc.config import (
    AccessConfig,
    Address,
    Config,
    GrpcServerConfig,
    JobsConfig,
    PolicyConfig,
    PolicyRules,
    SandboxConfig,
    StateConfig,
    Variables,
)


def test_nothing_to_complain_of(tmp_path: Path) -> None:
    assert found(config(tmp_path)) == []


# Addresses


@pytest.mark.parametrize("addr", ["0.0.0.0:1", ":1", "[::]:1", "10.1.2.3:1", "example.com:1", "[fe80::1]:1"])
def test_an_address_that_others_reach(addr: str, tmp_path: Path) -> None:
    plain = GrpcServerConfig(addr=Address.parse(addr))
    [finding] = found(config(tmp_path, grpc_server=plain))
    assert finding.is_error
    assert finding.text.startswith(f"grpc_server.addr: {addr} can be reached from other machines")
    assert "insecure = true" in finding.text
    # TLS alone tells nobody who calls.
    assert found(config(tmp_path, grpc_server=GrpcServerConfig(addr=Address.parse(addr), use_tls=True)))[0].is_error
    [warning] = found(config(tmp_path, grpc_server=GrpcServerConfig(addr=Address.parse(addr), insecure=True)))
    assert not warning.is_error
    assert "without TLS: everybody who can reach it has the role access.anonymous (admin)" in warning.text


@pytest.mark.parametrize("addr", ["127.0.0.1:1", "[::1]:1", "localhost:1", "127.9.9.9:1", "unix:/run/x.sock"])
def test_an_address_of_this_machine(addr: str, tmp_path: Path) -> None:
    assert found(config(tmp_path, grpc_server=GrpcServerConfig(addr=Address.parse(addr)))) == []


ANONYMOUS_SUBMITTER = AccessConfig(anonymous="submitter")


@pytest.mark.parametrize(
    "fields, said",
    [
        ({}, ""),  # whoever gets in is an admin
        ({"access": AccessConfig(viewers=("dns:v",))}, ""),  # who starts nothing
        ({"access": ANONYMOUS_SUBMITTER}, "can kill the worker and the supervisor"),
        ({"access": AccessConfig(operators=("dns:o",))}, "can kill the worker and the supervisor"),
        ({"access": ANONYMOUS_SUBMITTER, "sandbox": SandboxConfig(private_tmp=True)}, "can kill the worker"),
        ({"access": ANONYMOUS_SUBMITTER, "sandbox": SandboxConfig(read_only_paths=("/usr",))}, "sandbox"),
        ({"access": ANONYMOUS_SUBMITTER, "jobs": JobsConfig(user=str(os.geteuid()))}, "can kill the worker"),
        ({"access": ANONYMOUS_SUBMITTER, "jobs": JobsConfig(user="somebody-else")}, ""),
        # Nobody is anonymous there.
        ({"access": ANONYMOUS_SUBMITTER, "grpc_server": GrpcServerConfig(addr=Address.parse("unix:/run/x.sock"))}, ""),
    ],
)
def test_jobs_of_the_workers_own_user(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    findings = found(config(tmp_path, **fields))
    assert len(findings) == bool(said)
    for finding in findings:
        assert not finding.is_error
        assert finding.text.startswith("jobs.user: jobs of roles below admin run as the worker's own user, ")
        assert said in finding.text


def test_a_policy_that_lets_jobs_run_as_the_workers_own_user(tmp_path: Path) -> None:
    policy = PolicyConfig(submitter=PolicyRules(allow_users=("nobody", str(os.geteuid()))))
    jobs = JobsConfig(user="somebody-else")
    [finding] = found(config(tmp_path, access=ANONYMOUS_SUBMITTER, jobs=jobs, policy=policy))
    assert finding.text.startswith("policy.submitter.allow_users: jobs of roles below admin run as")


def test_certificates_that_give_no_role(tmp_path: Path) -> None:
    mtls = GrpcServerConfig(
        addr=Address.parse(":1"), use_tls=True, client_ca_file=tmp_path / "ca", key_file=tmp_path / "key"
    )
    [warning] = found(config(tmp_path, grpc_server=mtls))
    assert not warning.is_error
    assert "no certificate has a role" in warning.text
    assert found(config(tmp_path, grpc_server=mtls, access=AccessConfig(viewers=("dns:a",)))) == []


# Files


@pytest.mark.parametrize(
    "mode, is_error", [(0o600, None), (0o400, None), (0o640, False), (0o644, True), (0o604, True), (0o620, True)]
)
def test_a_private_key(mode: int, is_error: bool | None, tmp_path: Path) -> None:
    key = tmp_path / "server key"
    key.touch()
    key.chmod(mode)
    tls = config(tmp_path, grpc_server=GrpcServerConfig(use_tls=True, key_file=key))
    findings = found(tls)
    assert [finding.is_error for finding in findings] == ([] if is_error is None else [is_error])
    mended_by(findings)
    assert found(tls) == []
    # Without TLS nobody reads it.
    key.chmod(0o644)
    assert found(config(tmp_path, grpc_server=GrpcServerConfig(key_file=key))) == []


@pytest.mark.parametrize("mode, is_error", [(0o644, None), (0o600, None), (0o664, False), (0o666, True), (0o646, True)])
def test_the_file_of_the_configuration(mode: int, is_error: bool | None, tmp_path: Path) -> None:
    file = tmp_path / "worker.toml"
    file.touch()
    file.chmod(mode)
    findings = found(config(tmp_path), file)
    assert [finding.is_error for finding in findings] == ([] if is_error is None else [is_error])
    mended_by(findings)
    assert found(config(tmp_path), file) == []


def test_a_configuration_with_secrets_that_all_can_read(tmp_path: Path) -> None:
    file = tmp_path / "worker.toml"
    file.touch()
    file.chmod(0o644)
    secret = config(tmp_path, jobs=JobsConfig(cwd=tmp_path, env=Variables({"TOKEN": "x"})))
    [finding] = found(secret, file)
    assert not finding.is_error
    mended_by([finding])
    assert found(secret, file) == []


@needs_root
def test_files_of_somebody_else(tmp_path: Path) -> None:
    file, key, state = tmp_path / "worker.toml", tmp_path / "key", tmp_path / "state"
    for path in (file, key):
        path.touch()
        path.chmod(0o600)
    state.mkdir(mode=0o700)
    for path in (file, key, state):
        os.chown(path, 1234, 0)
    whole = config(tmp_path, grpc_server=GrpcServerConfig(use_tls=True, key_file=key))
    findings = found(whole, file)
    assert [finding.is_error for finding in findings] == [True, True, False]
    # One that merely lay there is no configuration of ours.
    assert all(finding.is_error for finding in found(whole, file, is_named=False))
    for finding in findings:
        subprocess.run(shlex.split(finding.text.rpartition(": ")[2].removesuffix(", or set another")), check=True)
    assert found(whole, file, is_named=False) == []


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_state_directory_that_is_open_is_closed(mode: int, tmp_path: Path) -> None:
    tmp_path.chmod(mode)
    assert f"(mode {mode:04o})" in mend_state_dir(tmp_path)
    assert tmp_path.stat().st_mode & 0o777 == 0o700
    assert mend_state_dir(tmp_path) == ""


def test_a_state_directory_that_others_can_replace(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    below = Config(state=StateConfig(dir=tmp_path / "open" / "state"))
    [finding] = found(below)
    assert finding.is_error
    mended_by([finding])
    assert found(below) == []
    (tmp_path / "open").chmod(0o1777)  # as /tmp
    assert found(below) == []


# The unix socket


def test_the_place_of_the_unix_socket(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    served = config(tmp_path, grpc_server=GrpcServerConfig(addr=Address.unix(str(folder / "x.sock"))))
    assert found(served) == []
    folder.chmod(0o777)
    [finding] = found(served)
    assert finding.is_error
    mended_by([finding])
    (folder / "x.sock").touch()
    [finding] = found(served)
    assert finding.is_error
    assert "no socket" in finding.text


@needs_root
def test_a_socket_of_somebody_else(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))
        os.chown(path, 1234, 0)
        served = config(tmp_path, grpc_server=GrpcServerConfig(addr=Address.unix(str(path))))
        [finding] = found(served)
        assert finding.is_error
        mended_by([finding])
        assert found(served) == []


def test_the_socket_that_was_made(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))
        check_unix_socket(path, 0o660)
        assert path.stat().st_mode & 0o777 == 0o660
    path.unlink()
    path.touch()
    with pytest.raises(PermissionError, match="is not the socket"):
        check_unix_socket(path, 0o600)
