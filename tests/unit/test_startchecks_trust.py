"""What others could change or replace is found before a worker serves."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.support.startchecks import config, found, mended_by, needs_root
from worker_svc.config import (
    AccessConfig,
    Address,
    Config,
    GrpcServerConfig,
    LogConfig,
    PolicyConfig,
    PolicyRules,
    StateConfig,
)

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
