"""What the client commands say when TLS comes to nothing: what to do about it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.workers import Worker
from worker_svc.cli import main

REFUSED = "the certificate was refused: revoked, expired or of another authority"


def said(address: str, certs: Path, capsys: pytest.CaptureFixture[str], **files: str) -> str:
    options = [part for name, file in files.items() if file for part in (f"--{name}", str(certs / file))]
    assert main(["list", "--addr", address, *options]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def pair(name: str) -> dict[str, str]:
    return {"crt": f"{name}.pem", "key": f"{name}.key"}


@pytest.mark.parametrize(
    "files, text",
    [
        ({}, "it may want TLS: give --ca, --crt, --key"),
        ({"ca": "ca.pem"}, "it wants one: give --crt and --key"),
        *(({"ca": "ca.pem", **pair(name)}, REFUSED) for name in ("revoked", "expired", "foreign", "server-as-client")),
        (pair("admin"), "name the authority with --ca: "),
        ({"ca": "foreign.pem", **pair("admin")}, "name the authority with --ca: "),
    ],
    ids=["plain", "none", "revoked", "expired", "foreign", "server", "no-ca", "wrong-ca"],
)
def test_what_is_wrong(
    files: dict[str, str], text: str, secured: Worker, certs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if files.get("ca") == "foreign.pem":
        files = {**files, "ca": _another_authority(certs)}
    for _ in range(5):
        assert text in said(secured.address, certs, capsys, **files)


def _another_authority(certs: Path) -> str:
    from worker_svc.access.certs import Authority

    if not (certs / "another.pem").exists():
        Authority.create("another").pair.write(certs, "another")
    return "another.pem"


def test_another_name(secured: Worker, certs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"ca": "ca.pem", **pair("admin")}
    assert main(["list", "--addr", secured.address, "--server-name", "other.example", *_flags(certs, options)]) == 1
    err = capsys.readouterr().err
    assert "use a name that the certificate has (--server-name): " in err
    assert "other.example" in err
    assert "start one there" not in err


def _flags(certs: Path, files: dict[str, str]) -> list[str]:
    return [part for name, file in files.items() for part in (f"--{name}", str(certs / file))]


def test_tls_where_there_is_none(shared: Worker, certs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(5):
        assert "it does not speak TLS" in said(shared.address, certs, capsys, ca="ca.pem", **pair("admin"))


def test_nobody_is_there(certs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--addr", "127.0.0.1:1", *_flags(certs, {"ca": "ca.pem"})]) == 1
    assert "start one there" in capsys.readouterr().err
