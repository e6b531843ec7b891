"""The command line, as far as it is about certificates and policy."""

from __future__ import annotations

import builtins
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from tests.support.configured import load_config
from tests.support.fake_worker import FakeWorker, finished, serving_in_thread
from worker_svc.access.certs import read_pair
from worker_svc.cli import main
from worker_svc.cli.job_options import JobOptions, read_stdin, start_request
from worker_svc.pb.jobscheduler import Outcome, StartJobReq

pytestmark = pytest.mark.usefixtures("elsewhere")

# gen-certs


def test_gen_certs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gen-certs", "certs"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("certs: made ca, server, admin, operator, submitter, viewer, crl.pem, worker.toml\n")
    certs = tmp_path / "certs"
    assert stat.S_IMODE(certs.stat().st_mode) == 0o700
    for file in certs.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == (0o600 if file.suffix == ".key" else 0o644), file
    config = load_config(certs / "worker.toml", environ={"HOME": "/home"})
    assert (config.grpc_server.use_tls, config.grpc_server.client_ca_file) == (True, certs / "ca.pem")
    assert config.access.submitters == ("dns:submitter",)
    names = read_pair(certs, "server").certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert {"localhost"} <= set(names.value.get_values_for_type(x509.DNSName))


def test_gen_certs_adds_and_never_replaces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gen-certs", "c", "--host", "w.example", "--host", "10.0.0.1", "--client", "ci"]) == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "c").iterdir()}
    capsys.readouterr()
    assert main(["gen-certs", "c", "--client", "ci", "--client", "more"]) == 0
    assert capsys.readouterr().out == "c: made more\n"
    assert {file.name: file.read_bytes() for file in (tmp_path / "c").iterdir() if file.name in before} == before
    assert main(["gen-certs", "c", "--revoke", "more"]) == 0
    assert main(["gen-certs", "c", "--revoke", "ci"]) == 0
    crl = x509.load_pem_x509_crl((tmp_path / "c" / "crl.pem").read_bytes())
    serials = {read_pair(tmp_path / "c", name).certificate.serial_number for name in ("ci", "more")}
    assert {entry.serial_number for entry in crl} == serials
    assert not (tmp_path / "c" / "admin.pem").exists()


@pytest.mark.parametrize(
    "arguments, status, text",
    [
        (["--client", "../x"], 2, "cannot be a name"),
        (["--client", "ca"], 2, "cannot be a name"),
        (["--revoke", "nobody"], 1, "No such file"),
    ],
)
def test_gen_certs_refuses(arguments: list[str], status: int, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gen-certs", "c", *arguments]) == status
    assert text in capsys.readouterr().err


def test_gen_certs_without_its_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "worker_svc.access.certs", raising=False)
    real = builtins.__import__

    def refuse(name: str, *arguments: Any) -> Any:
        if name.startswith("cryptography"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *arguments)

    monkeypatch.delattr("worker_svc.access.certs", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    assert main(["gen-certs", "c"]) == 1
    assert "pip install 'worker-svc[certs]'" in capsys.readouterr().err


# Clients


@contextmanager
def serving_with_tls(certs: Path) -> Iterator[str]:
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certs / "server.pem", certs / "server.key")
    context.load_verify_locations(certs / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols(["h2"])
    worker = FakeWorker()
    worker.jobs["a"] = finished("a", Outcome.SUCCEEDED)
    with serving_in_thread(worker, context) as address:
        yield address


def test_clients_show_a_certificate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["gen-certs", "certs", "--host", "w.example"]) == 0
    with serving_with_tls(tmp_path / "certs") as address:
        tls = ["--ca", "certs/ca.pem", "--crt", "certs/admin.pem", "--key", "certs/admin.key"]
        assert main(["query", "a", "--addr", address, *tls, "--server-name", "w.example"]) == 0
        assert main(["query", "a", "--addr", address, *tls]) == 1  # the name is another
        assert "certificate" in capsys.readouterr().err
        assert main(["query", "a", "--addr", address]) == 1  # no TLS
        for name, value in {"CA": "ca.pem", "CRT": "admin.pem", "KEY": "admin.key"}.items():
            monkeypatch.setenv(f"WORKER_SVC_{name}", f"certs/{value}")
        monkeypatch.setenv("WORKER_SVC_SERVER_NAME", "w.example")
        assert main(["query", "a", "--addr", address]) == 0
        assert main(["start", "--addr", address, "--server-name", "w.example", "true"]) == 0
        # They are the clients' variables, and none of the configuration's.
        assert main(["check-config"]) == 0


def test_bad_tls_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--crt", "x"]) == 2
    assert capsys.readouterr().err == "worker-svc: list: --crt and --key go together\n"
    assert main(["list", "--ca", "no-such.pem"]) == 1
    assert "--ca: no-such.pem" in capsys.readouterr().err


# check-config


RULES = """\
[policy.submitter]
allow_commands = ["/bin/bash"]
script_roots = ["{root}"]
"""


def test_explain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.sh").write_text("")
    (tmp_path / "worker.toml").write_text(RULES.format(root=tmp_path.resolve()))
    assert main(["check-config", "--explain", "bash x.sh"]) == 0
    root = f'policy.submitter.script_roots: "{tmp_path.resolve()}"'
    assert capsys.readouterr().out.splitlines()[:3] == [
        "admin: allowed by default: everything is allowed",
        "operator: allowed by default: everything is allowed",
        f'submitter: allowed by policy.submitter.allow_commands: "/bin/bash", {root}',
    ]
    assert main(["check-config", "--explain", "bash -c 'echo x'", "--role", "submitter", "--cwd", "/usr"]) == 1
    assert capsys.readouterr().out == (
        "submitter: denied by policy.submitter.script_roots\n  path: /usr/-c is not below a script root\n"
    )
    assert main(["check-config", "--explain", "bash x.sh", "--env", "LD_PRELOAD=x", "--role", "submitter"]) == 1
    assert "policy.submitter.allow_env" in capsys.readouterr().out
    assert main(["check-config", "--explain", "bash gone.sh", "--role", "submitter"]) == 1
    assert capsys.readouterr().out == (
        f"submitter: allowed, but cannot start: path: {tmp_path.resolve()}/gone.sh no such file or directory\n"
        f'  allowed by policy.submitter.allow_commands: "/bin/bash", {root}\n'
    )
    assert main(["check-config", "--explain", "bash -c id", "--role", "submitter", "--cwd", str(tmp_path)]) == 1
    assert "submitter: allowed, but cannot start: path: " in capsys.readouterr().out
    assert main(["check-config", "--explain", "'"]) == 2
    assert main(["check-config", "--explain", ""]) == 2


LIMITED = """\
[policy.submitter]
max = { timeout_s = 60, output_max_bytes = 1000, memory_max_bytes = 1048576, stdin_bytes = 3, "rlimits.nofile" = 9 }
"""


def test_explain_knows_all_that_a_job_can_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "worker.toml").write_text(LIMITED)
    (tmp_path / "in").write_text("four")

    def explain(*options: str) -> tuple[int, str]:
        status = main(["check-config", "--role", "submitter", "--explain", "true", *options])
        return status, capsys.readouterr().out.partition("\n")[0]

    # Who leaves a limit out has the maximum.
    assert explain() == (0, "submitter: allowed by policy.submitter: nothing against it")
    for options, rule in {
        ("--timeout", "61"): "policy.submitter.max.timeout_s: 60",
        ("--timeout", "0"): "policy.submitter.max.timeout_s: 60",
        ("--output-policy", "none"): "policy.submitter.max.output_max_bytes: 1000",
        ("--memory-max", "2M"): "policy.submitter.max.memory_max_bytes: 1048576 (1M)",
        ("--rlimit", "nofile=10"): "policy.submitter.max.rlimits.nofile: 9",
        ("--stdin", "in"): "policy.submitter.max.stdin_bytes: 3",
        ("--user", "no-such-user"): 'jobs.user: ""',
        ("--group", "adm"): 'jobs.user: ""',
        ("--new-privs",): "jobs.no_new_privs: true",
    }.items():
        assert explain(*options) == (1, f"submitter: denied by {rule}")
    assert explain("--timeout", "60", "--private-tmp", "--read-only", "/", "--label", "a=b")[0] == 0
    assert explain("--rlimit", "nofile=5:4")[0] == 2


def test_explain_judges_what_start_would_send(tmp_path: Path) -> None:
    argv = [
        "--cwd=/", "--env=A=b", "--timeout=3", "--label=k=v", "--stdin=in", "--separate-stderr", "--stop-signal=INT",
        "--stop-grace=1", "--output-max-bytes=9", "--output-policy=drop-head", "--wait-for-tree", "--memory-max=1M",
        "--user=nobody", "--no-network", "--secret-env=HOME",
    ]  # fmt: skip
    (tmp_path / "in").write_text("input")
    worker = FakeWorker()
    with serving_in_thread(worker) as address:
        assert main(["start", "--addr", address, *argv, "true"]) == 0
    arguments = JobOptions("worker-svc start", "").parse([*argv, "true"])
    read_stdin(arguments)
    request = start_request(arguments, command="true")
    assert worker.took(StartJobReq) == [request]
    # None of the fields was forgotten.
    left_out = {name for name, value in request.to_dict(include_default_values=True).items() if not value}
    assert left_out == {"path", "args", "jobId"}


def test_check_config_warns_of_a_policy_that_is_hardly_meant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "tool").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "bin")
    here = tmp_path.resolve()
    (tmp_path / "worker.toml").write_text(
        f"""\
[policy.all]
script_roots = ["/", "{here}/no-such", "{here}/bin"]
[policy.operator]
allow_commands = ["{here}/bin/tool", "{here}/bin/*", "{here}/**", "/bin/sh", "{here}/bin/t[o]*"]
allow_users = ["root", "12345", "no-such-user"]
"""
    )
    assert main(["check-config"]) == 0
    key, roots = "warning: policy.operator", "warning: policy.all.script_roots"
    without_effect = "matches no real path on this machine: nothing is allowed by it (of a link, such as "
    assert capsys.readouterr().err.splitlines() == [
        f'{roots}: "/" is everything: any file is a script below it',
        f'{roots}: "{here}/no-such" is no directory on this machine: nothing is allowed by it',
        f'{key}.allow_commands: "{here}/bin/t[o]*" {without_effect}/bin often is, the real path counts)',
        f'{key}.allow_users: there is no user "no-such-user" on this machine',
    ]
    (tmp_path / "worker.toml").write_text(
        "[policy.submitter]\n"
        f'allow_commands = ["{here}/gone", "{here}/link/*", "{here}/link/**", "/bin/sh", "/usr/*/*"]\n'
    )
    assert main(["check-config"]) == 0
    said = [
        line.removeprefix("warning: policy.submitter.allow_commands: ") for line in capsys.readouterr().err.splitlines()
    ]
    assert [line.partition(" ")[0] for line in said] == [
        f'"{here}/gone"', f'"{here}/link/*"', f'"{here}/link/**"', '"/bin/sh"', '"/usr/*/*"',
    ]  # fmt: skip
    assert all("run whatever it is told to" in line for line in said[3:])


def test_check_config_looks_at_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "worker.toml").write_text("[jobs]\nslots = 2\n")
    (tmp_path / "worker.toml").chmod(0o666)
    assert main(["check-config"]) == 2
    err = capsys.readouterr().err
    assert "error: worker.toml: everybody can change what jobs run (mode 0666): chmod go-w worker.toml" in err
    (tmp_path / "worker.toml").chmod(0o664)
    assert main(["check-config"]) == 0
    assert capsys.readouterr().err.startswith("warning: worker.toml: its group can change")
