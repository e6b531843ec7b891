"""What must be right before the worker may serve; each complaint has the command that mends it."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from worker_svc.access.startchecks import Finding, check, check_unix_socket, mend_state_dir
from worker_svc.config import (
    AccessConfig,
    Address,
    Config,
    GrpcServerConfig,
    JobsConfig,
    LogConfig,
    PolicyConfig,
    PolicyRules,
    SandboxConfig,
    StateConfig,
    Variables,
)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


def config(tmp_path: Path, **fields: Any) -> Config:
    return Config(**{"state": StateConfig(dir=tmp_path / "state"), **fields})


def found(config: Config, file: Path | None = None, *, is_named: bool = True) -> list[Finding]:
    return check(config, file, is_named=is_named)


def mended_by(findings: list[Finding]) -> None:
    """Does what the texts say."""
    for finding in findings:
        subprocess.run(shlex.split(finding.text.rpartition(": ")[2]), check=True)


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


# What others can change or replace


EVERYTHING = ["client_ca_file", "crl_file", "crt_file", "key_file", "config", "state", "log", "socket", "script_roots"]


def guarded(name: str, folder: Path) -> tuple[Config, Path | None]:
    """A configuration whose one file of this name lies in the folder."""
    state = StateConfig(dir=folder.parent.parent / "safe")
    file = folder / "file"
    if name == "socket":
        return Config(state=state, grpc_server=GrpcServerConfig(addr=Address.unix(str(file)))), None
    if name == "state":
        return Config(state=StateConfig(dir=file)), None
    if name == "log":
        return Config(state=state, log=LogConfig(file=file)), None
    file.touch(mode=0o600)
    if name == "config":
        return Config(state=state), file
    if name == "script_roots":
        return Config(state=state, policy=PolicyConfig(submitter=PolicyRules(script_roots=(str(folder),)))), None
    files: dict[str, Any] = {"crt_file": None, "key_file": None, name: file}
    access = AccessConfig(viewers=("dns:a",))
    return Config(state=state, access=access, grpc_server=GrpcServerConfig(use_tls=True, **files)), None


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_directory_that_everybody_can_write(name: str, tmp_path: Path) -> None:
    above = tmp_path / "a b"
    folder = above / "folder"
    folder.mkdir(parents=True)
    whole, file = guarded(name, folder)
    assert found(whole, file) == []
    for place in (folder, above):
        place.chmod(0o777)
        [finding] = found(whole, file)
        assert finding.is_error
        assert str(place) in finding.text
        mended_by([finding])
        assert found(whole, file) == []
    above.chmod(0o1777)  # as /tmp: what is in it belongs to us
    assert found(whole, file) == []


@needs_root
@pytest.mark.parametrize("name", EVERYTHING)
def test_a_directory_of_somebody_else_or_of_another_group(name: str, tmp_path: Path) -> None:
    above = tmp_path / "above"
    folder = above / "folder"
    folder.mkdir(parents=True)
    whole, file = guarded(name, folder)
    os.chown(above, 1234, 0)
    [finding] = found(whole, file)
    assert finding.is_error == (name not in ("config", "log", "script_roots"))
    assert f"{above}: belongs to user 1234, who can change" in finding.text
    mended_by([finding])
    assert found(whole, file) == []
    if name == "config":
        os.chown(above, 1234, 0)
        assert found(whole, file, is_named=False)[0].is_error
        os.chown(above, 0, 0)
    os.chown(above, 0, 1234)
    above.chmod(0o770)
    [finding] = found(whole, file)
    assert not finding.is_error
    assert "group 1234 can change" in finding.text
    mended_by([finding])
    assert found(whole, file) == []


@pytest.mark.parametrize("name", ["client_ca_file", "crl_file", "crt_file", "log"])
def test_a_file_that_everybody_can_write(name: str, tmp_path: Path) -> None:
    whole, _ = guarded(name, tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "file").chmod(0o646)
    [finding] = found(whole)
    assert finding.is_error
    assert finding.text.endswith(f"(mode 0646): chmod o-w {tmp_path}/file")
    mended_by([finding])
    assert found(whole) == []
    (tmp_path / "file").chmod(0o664)
    [finding] = found(whole)
    assert not finding.is_error
    mended_by([finding])
    assert found(whole) == []


def test_the_way_over_links(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "ca.pem").touch(mode=0o600)
    (tmp_path / "open" / "second").symlink_to("../real")
    (tmp_path / "first").symlink_to(tmp_path / "open" / "second")
    mtls = GrpcServerConfig(use_tls=True, key_file=None, crt_file=None, client_ca_file=tmp_path / "first" / "ca.pem")
    whole = config(tmp_path, grpc_server=mtls, access=AccessConfig(viewers=("dns:a",)))
    [finding] = found(whole)
    assert finding.is_error
    assert f"{tmp_path}/open: everybody can change who is let in" in finding.text
    mended_by([finding])
    assert found(whole) == []
    (tmp_path / "real" / "ca.pem").unlink()
    (tmp_path / "real" / "ca.pem").symlink_to("ca.pem")
    assert found(whole) == []  # where it is read, that is told


def test_devices_are_everybodys(tmp_path: Path) -> None:
    for path in ("/dev/null", "/dev/stdout"):
        assert found(config(tmp_path, log=LogConfig(file=Path(path)))) == []


@pytest.mark.parametrize(
    "rules, dangerous",
    [
        ({"script_roots": ["{}/bin"]}, {"tool", "sub", "sub/deep"}),
        ({"allow_commands": ["{}/bin/**"]}, {"tool", "sub", "sub/deep"}),
        ({"allow_commands": ["{}/bin/tool", "{}/bin/gone"]}, {"tool"}),
        ({"allow_commands": ["{}/bin/t*"]}, {"tool"}),
        ({"allow_commands": ["{}/bin/x*"]}, set()),
        ({"allow_commands": ["{}/bin/*/other"]}, {"sub"}),
        ({"allow_commands": ["{}/bin/**/deep"]}, {"sub", "sub/deep"}),
        ({"deny_commands": ["{}/bin/tool"]}, set()),
    ],
)
def test_what_the_policy_allows(rules: dict[str, list[str]], dangerous: set[str], tmp_path: Path) -> None:
    places = {name: tmp_path / "bin" / name for name in ("tool", "sub", "sub/deep")}
    places["sub"].mkdir(parents=True)
    (tmp_path / "bin" / "link").symlink_to("tool")
    for name in ("tool", "sub/deep"):
        places[name].touch()
    lists: dict[str, Any] = {key: tuple(text.format(tmp_path) for text in texts) for key, texts in rules.items()}
    whole = config(tmp_path, policy=PolicyConfig(all=PolicyRules(**lists)))
    assert found(whole) == []
    for name, place in places.items():
        mode = place.stat().st_mode
        place.chmod(0o777)
        findings = found(whole)
        assert {finding.is_error for finding in findings} == ({True} if name in dangerous else set()), name
        mended_by(findings)
        assert found(whole) == []
        place.chmod(mode)


@pytest.mark.parametrize("name", ["script_roots", "allow_commands", "allow_cwd"])
def test_a_directory_where_everybody_can_put_files(name: str, tmp_path: Path) -> None:
    """That nobody can replace those of others does not help, except where jobs only work."""
    place = tmp_path / "place"
    (place / "below").mkdir(parents=True)
    entries: dict[str, Any] = {name: (str(place / "*" if name == "allow_commands" else place),)}
    whole = config(tmp_path, policy=PolicyConfig(all=PolicyRules(**entries)))
    for folder in (place, place / "below") if name == "script_roots" else (place,):
        folder.chmod(0o1777)
        findings = found(whole)
        assert [finding.is_error for finding in findings] == ([] if name == "allow_cwd" else [True])
        mended_by(findings)
        assert found(whole) == []
    tmp_path.chmod(0o777)
    assert any(finding.text.startswith(f"policy.all.{name}: {tmp_path}: everybody") for finding in found(whole))


def test_a_large_tree_does_not_hold_up_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    for number in range(60):
        (root / str(number)).mkdir(parents=True)
        for name in range(50):
            (root / str(number) / str(name)).touch()
        (root / str(number)).chmod(0o777)
    looked = 0
    lstat = Path.lstat

    def counted(self: Path) -> os.stat_result:
        nonlocal looked
        looked += 1
        return lstat(self)

    monkeypatch.setattr(Path, "lstat", counted)
    findings = found(config(tmp_path, policy=PolicyConfig(all=PolicyRules(script_roots=(str(root),)))))
    assert len(findings) == 3
    assert looked < 2500  # of 3,060, and the ways to them


def test_as_another_user(tmp_path: Path) -> None:
    """What is root's is no danger to anybody, what is another user's is."""
    if os.geteuid() != 0:
        pytest.skip("only root can be another user")
    with tempfile.TemporaryDirectory(prefix="worker-svc-test-") as folder:
        theirs = Path(folder)
        theirs.chmod(0o755)
        (theirs / "ca.pem").touch()
        mtls = GrpcServerConfig(use_tls=True, key_file=None, crt_file=None, client_ca_file=theirs / "ca.pem")
        access = AccessConfig(viewers=("dns:a",))
        whole = Config(state=StateConfig(dir=theirs / "state"), grpc_server=mtls, access=access)
        os.seteuid(1234)
        try:
            assert found(whole) == []
            os.seteuid(0)
            os.chown(theirs, 1235, 0)
            os.seteuid(1234)
            assert [finding.is_error for finding in found(whole)] == [True, True]
        finally:
            os.seteuid(0)
