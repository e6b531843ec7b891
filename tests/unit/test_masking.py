"""What looks like a secret does not show to others; nor does what could be one without looking like it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from worker_svc.config import LogConfig
from worker_svc.job import JobRecord, JobSpec, JobState, Sandbox, name_of
from worker_svc.masking import MASK, Masker
from worker_svc.telemetry import set_up_log

SECRET = "hunter2-topsecret"


@pytest.mark.parametrize(
    "key",
    ["PASSWORD", "db_passwd", "API_KEY", "GITHUB_TOKEN", "client-secret", "AUTHORIZATION", "aws_credentials", "PWD"],
)  # fmt: skip
def test_keys_of_secrets(key: str) -> None:
    masker = Masker()
    assert masker.hides(key)
    assert masker.table({key: SECRET, "PLAIN": "v"}) == {key: MASK, "PLAIN": "v"}
    for text in (f"{key}={SECRET}", f"start {key}={SECRET};", f"({key}='{SECRET} and more') x", f'{key}="{SECRET}"'):
        assert SECRET not in masker.text(text), text
        assert key in masker.text(text)


@pytest.mark.parametrize(
    "text", ["", "A=1", "KEY=1", "--key=2", "PATH=/usr/bin:/bin x", "no key here", "= = =", "exit status 3"]
)
def test_harmless_text_stays(text: str) -> None:
    assert Masker().text(text) == text
    assert Masker().argument(text) == text


# Whatever comes before the secret, and however the value is written.
@pytest.mark.parametrize(
    "arguments",
    [
        ["--token=S", "plain"],
        ["--token", "S", "plain"],
        ["-password", "S"],
        ["--password", "-S"],
        ["--auth", "--password", "S"],
        ["--password:", "S"],
        ["TOKEN=S y"],
        ["TOKEN=", "S"],
        ["password", "S"],
        ["login me password S"],
        ["-H", "Authorization: Bearer S"],
        ["Authorization:", "S"],
        ["Accept: x Authorization: Bearer S"],
        ["-e", "JAVA_OPTS=-Ddb.password=S"],
        ["--url=http://h/?token=S"],
        ["--env=DB_PASSWORD=S"],
        ["data=user=bob&password=S"],
        ["-c", 'JAVA_OPTS="-Ddb.password=S" java -jar x'],
        ["-c", "export OPTS='--password S'"],
        ["-c", r'export TOKEN="a\" S" b'],
        ["-c", "true\npassword = 'x\nS'"],
        ['{"password":"S","a":"b"}'],
        [r"{\"token\":\"S\",\"a\":1}"],
        ['{"env": {"x":1, "password": ["a", "S"]}}'],
        ['{"a":["--password","S"]}'],
        ["<password>S</password>"],
        ["CREATE USER x PASSWORD 'S'"],
        ["creds[password]=S", "password:=S", "password => S"],
        ["https://u:S@h/"],
        ["https://S@h/"],
        ["redis://:S/y@h/0"],
        ["http://a:b@c/ http://u:S@h"],
        ["--proxy=http://u:S@h"],
        ["u:S@tcp(h:3306)/db"],
        ["u:S-token@h"],
        ["x" * 8185 + " --password", "S"],
    ],
)
@pytest.mark.parametrize("secret", ["S3cr3t", "hunter2-topsecret-token"])
def test_no_way_to_write_a_secret_shows_it(arguments: list[str], secret: str) -> None:
    given = [re.sub("(?<![A-Z])S(?![A-Z])", secret, argument) for argument in arguments]
    assert secret in "".join(given)
    masked = Masker().arguments(given)
    assert len(masked) == len(given)
    assert secret not in "".join(masked), masked


@pytest.mark.parametrize(
    "arguments, masked",
    [
        (["--token=x", "b"], [f"--token={MASK}", "b"]),
        (["--token", "x", "b"], ["--token", MASK, "b"]),
        (["--verbose", "x", "a=b"], ["--verbose", "x", "a=b"]),
        (["--key", "2", "--key=2"], ["--key", "2", "--key=2"]),
        (["-H", "Authorization: Bearer x"], ["-H", f"Authorization:{MASK}"]),
        (["X-Api-Key:x", "Authorization:", "x"], [f"X-Api-Key:{MASK}", "Authorization:", MASK]),
        (["-c", "export TOKEN=x; run"], ["-c", f"export TOKEN={MASK}"]),
        (["https://h/", "https://h:80/b", "a:b", "--no-color"], ["https://h/", "https://h:80/b", "a:b", "--no-color"]),
        (["git@h.example:a/b", "auth-service"], ["git@h.example:a/b", "auth-service"]),
        (["x" * 8193], ["x" * 8192 + "… (1 more characters)"]),
    ],
)
def test_what_is_left_of_arguments(arguments: list[str], masked: list[str]) -> None:
    assert Masker().arguments(arguments) == tuple(masked)


@pytest.mark.parametrize(
    "text, masked",
    [
        ("not '--password=x,y'", f"not '--password={MASK}"),
        ("use mysql --password x now", f"use mysql --password{MASK}"),
        ('{"token": ["x", "y"], "a": {}}', f'{{"token{MASK}'),
        ("postgres://u:x@y@h/d cannot be reached", f"postgres:{MASK}"),
        (f"a\nTOKEN={SECRET}\nb", f"a\nTOKEN={MASK}\nb"),
        # Texts of ours name fields and files before a colon.
        ("grpc_server.key_file: server.key: no such file", "grpc_server.key_file: server.key: no such file"),
        ("page_token: is not one that ListJobs gave", "page_token: is not one that ListJobs gave"),
        ("y" * 10_000, "y" * 8192 + "… (1808 more characters)"),
    ],
)
def test_texts_of_ours(text: str, masked: str) -> None:
    assert Masker().text(text) == masked


@pytest.mark.parametrize(
    "text, name",
    [
        ("bash", "bash"),
        ("/opt/tools/gcc-12.2/bin/g++", "/opt/tools/gcc-12.2/bin/g++"),
        ("/büro/a@b~", "/büro/a@b~"),
        ("", ""),
        ("mysql --password x", "mysql…"),
        ("/no/such/TOKEN=x", "/no/such/TOKEN…"),
        ("https://u:x@h/", "https…"),
        ("\x1b[2Jx", "…"),
        ("a\udcffb", "a…"),
        ("x" * 1000, "x" * 256 + "…"),
    ],
)
def test_names_are_what_texts_say_of_programs(text: str, name: str) -> None:
    assert name_of(text) == name


def _spec() -> JobSpec:
    return JobSpec(
        "mysql --flag",
        f"--password={SECRET}",
        args=("plain", f"SSH_KEY={SECRET}"),
        env={"PLAIN": SECRET},
        cwd="/data",
        labels={"team": "red", "api_key": SECRET, "opts": f"--set=db.password={SECRET}"},
        sandbox=Sandbox(read_only_paths=("/", f"/{SECRET}"), no_network=True),
    )


def test_others_see_command_and_path_and_no_arguments() -> None:
    shown = Masker().spec(_spec())
    assert (shown.command, shown.path, shown.args) == ("mysql…", "--password…", (MASK,))
    assert (shown.env, shown.cwd) == ({"PLAIN": MASK}, "/data")
    assert shown.labels == {"team": "red", "api_key": MASK, "opts": f"--set=db.password={MASK}"}
    assert shown.sandbox == Sandbox(read_only_paths=(MASK,), no_network=True)
    nothing = JobSpec("true")
    assert Masker().spec(nothing) == nothing


def test_with_show_arguments_they_see_all_that_does_not_look_like_a_secret() -> None:
    shown = Masker(show_arguments=True).spec(_spec()._replace(env={"PLAIN": "v", "TOKEN": SECRET}))
    assert shown.argv == ["mysql --flag", f"--password={MASK}", "plain", f"SSH_KEY={MASK}"]
    assert shown.env == {"PLAIN": "v", "TOKEN": MASK}
    assert shown.sandbox == _spec().sandbox


def test_reasons_recorded_by_earlier_versions_are_read_once_more() -> None:
    record = JobRecord(1, "j", _spec(), JobState.FINISHED, 1, 1, reason=f"TOKEN={SECRET} is bad")
    assert SECRET not in Masker().record(record).reason


def test_without_a_pattern_nothing_looks_like_a_secret() -> None:
    assert Masker("").text(f"TOKEN={SECRET}") == f"TOKEN={SECRET}"
    assert not Masker("").hides("TOKEN")
    assert Masker("").arguments(["--token", SECRET, f"db://u:{SECRET}@h"]) == ("--token", SECRET, f"db://u:{SECRET}@h")
    assert Masker("").spec(_spec()).args == (MASK,)


def test_no_line_of_the_log_shows_one(capfd: pytest.CaptureFixture[str]) -> None:
    whole = set_up_log(LogConfig(format="json"))
    log = whole.events
    nested: dict[str, Any] = {"env": {"TOKEN": SECRET, "A": "1"}, "list": [f"TOKEN={SECRET}", 3]}
    log.warning("event", reason=f"TOKEN={SECRET}", spec=nested, token_count=3)
    try:
        raise ValueError(f"PASSWORD={SECRET}")
    except ValueError:
        log.exception("failed")
    log.warning("event", reason=f"db://u:{SECRET}@h")
    whole.close()
    lines = capfd.readouterr().err
    assert SECRET not in lines
    first = json.loads(lines.splitlines()[0])
    assert first["spec"] == {"env": {"TOKEN": MASK, "A": "1"}, "list": [f"TOKEN={MASK}", 3]}
    assert first["token_count"] == 3
