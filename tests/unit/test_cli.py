"""The command line: what it makes of its arguments."""

from __future__ import annotations

import pytest

from worker_svc.cli import main
from worker_svc.cli.job_options import JobOptions


def usage_error(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


# --- arguments


@pytest.mark.parametrize(
    "argv, command",
    [
        (["ls"], ["ls"]),
        (["ls", "-l", "--id", "x"], ["ls", "-l", "--id", "x"]),
        (["--id", "x", "ls"], ["ls"]),
        (["--id=x", "ls", "--", "-l"], ["ls", "--", "-l"]),
        (["--separate-stderr", "ls"], ["ls"]),
        (["--", "-odd-name"], ["-odd-name"]),
        (["--id", "x", "--", "ls", "--"], ["ls", "--"]),
        (["--", "--", "x"], ["--", "x"]),
        (["--env", "A=-b", "--label", "k=v", "--timeout", "3", "ls"], ["ls"]),
        (["-"], ["-"]),
    ],
)
def test_where_the_command_begins(argv: list[str], command: list[str]) -> None:
    assert JobOptions("worker-svc start", "").parse(argv).command == command


@pytest.mark.parametrize(
    "argv",
    [
        ["start"],
        ["start", "--"],
        ["start", "--id"],
        ["start", "--bogus", "ls"],
        ["start", "--sep", "ls"],
        ["start", "--env", "NOT_THERE_AT_ALL", "ls"],
        ["start", "--label", "=v", "ls"],
        ["start", "--timeout", "soon", "ls"],
        ["start", "--timeout=-1", "ls"],
        ["start", "--stop-grace", "nan", "ls"],
        ["start", "--memory-max", "much", "ls"],
        ["start", "--cpus", "nan", "ls"],
        ["start", "--rlimit", "nofile", "ls"],
        ["start", "--rlimit", "bogus=1", "ls"],
        ["start", "--cpu-affinity", "3-1", "ls"],
        ["start", "--umask", "9", "ls"],
        ["start", "--nice", "low", "ls"],
        ["pause"],
        ["signal", "a"],
        ["stop"],
        ["query"],
        ["logs", "a", "--tail", "1", "--since-offset", "2"],
        ["logs", "a", "--tail", "-1"],
        ["list", "--state", "new"],
        ["list", "--limit", "x"],
        ["serve", "--no-such-key", "1"],
        ["nonsense"],
        [],
    ],
)
def test_wrong_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    usage_error(argv)
    assert capsys.readouterr().err.startswith("usage: ")


def test_a_command_that_is_nearly_right(capsys: pytest.CaptureFixture[str]) -> None:
    usage_error(["qurey"])
    assert "did you mean 'query'?" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["run", "--help"], ["serve", "--help"], ["--version"]])
def test_help(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 0
    assert "worker-svc" in capsys.readouterr().out
