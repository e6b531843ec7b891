"""What looks like a secret does not show."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from worker_svc.config import LogConfig
from worker_svc.job import JobRecord, JobSpec, JobState
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


@pytest.mark.parametrize(
    "arguments, masked",
    [
        (["--token=x", "b"], [f"--token={MASK}", "b"]),
        (["--token", "x", "b"], ["--token", MASK, "b"]),
        (["--token", "--force", "x"], ["--token", "--force", "x"]),
        (["TOKEN=x y"], [f"TOKEN={MASK}"]),
        (["-c", "export TOKEN=x; run"], ["-c", f"export TOKEN={MASK} run"]),
        (["--verbose", "x", "a=b"], ["--verbose", "x", "a=b"]),
        (["--key", "2", "--key=2"], ["--key", "2", "--key=2"]),
        (["--api-key", "2", "--ApiKey=2"], ["--api-key", MASK, f"--ApiKey={MASK}"]),
        # One hyphen is enough for an option, and for a secret.
        (["-password", "x", "b"], ["-password", MASK, "b"]),
        (["--password", "-x", "b"], ["--password", MASK, "b"]),
        (["--password", "--x1", "b"], ["--password", MASK, "b"]),
        (["--auth", "--password", "x"], ["--auth", "--password", MASK]),
        (["--password", "-secret", "x"], ["--password", MASK, MASK]),
        (["-H", "Authorization: Bearer x"], ["-H", f"Authorization:{MASK}"]),
        (["X-Api-Key:x", "Authorization:", "x"], [f"X-Api-Key:{MASK}", "Authorization:", MASK]),
        (['{"password":"x y","a":"b"}'], [f'{{"password":{MASK},"a":"b"}}']),
        (['{"a=b":1,"token":"x"}'], [f'{{"a=b":1,"token":{MASK}}}']),
        (["https://u:x@h/", "https://h:80/b@c"], [f"https://u:{MASK}@h/", "https://h:80/b@c"]),
        (["https://u:x@h/?token=y"], [f"https://u:{MASK}@h/?token={MASK}"]),
        (["redis://:x/y@h/0", "http://h:80/?a=b@c"], [f"redis://:{MASK}@h/0", "http://h:80/?a=b@c"]),
        (['password: "x"', "-H", 'Token: a "x"'], [f"password:{MASK}", "-H", f"Token:{MASK}"]),
        (["-c", r'curl -H "Token: a=\"x\" y" b'], ["-c", f'curl -H "Token:{MASK}" b']),
        (["-c", r'export TOKEN="a\" x" b TOKEN=a\ x b'], ["-c", f"export TOKEN={MASK} b TOKEN={MASK} b"]),
        (["creds[password]=x", "password:=x"], [f"creds[password]={MASK}", f"password:={MASK}"]),
        (["-c", 'curl -H "Token: x y" url'], ["-c", f'curl -H "Token:{MASK}" url']),
        (["-c", "mysql --password x b; --auth --force b"], ["-c", f"mysql --password {MASK} b; --auth --force b"]),
        (["-c", "password = 'x y' b"], ["-c", f"password = {MASK} b"]),
        (["https://h/", "oauth://h", "a:b", "--no-color"], ["https://h/", "oauth://h", "a:b", "--no-color"]),
    ],
)
def test_arguments(arguments: list[str], masked: list[str]) -> None:
    assert Masker().arguments(arguments) == tuple(masked)


@pytest.mark.parametrize(
    "text, masked",
    [
        ("not '--password=x,y'", f"not '--password={MASK}"),
        ("TOKEN=a'b c'd e", f"TOKEN={MASK} e"),
        ("args: 'Authorization: Bearer x' is no good", f"args: 'Authorization:{MASK}' is no good"),
        ('{"token": ["x", "y"], "a": {}}', f'{{"token": {MASK}, "a": {{}}}}'),
        (r"{\"token\":\"x\",\"a\":1}", rf"{{\"token\":{MASK},\"a\":1}}"),
        ("postgres://u:x@y@h/d cannot be reached", f"postgres://u:{MASK}@h/d cannot be reached"),
        # Texts of ours name fields and files before a colon.
        ("grpc_server.key_file: server.key: no such file", "grpc_server.key_file: server.key: no such file"),
        ("page_token: is not one that ListJobs gave", "page_token: is not one that ListJobs gave"),
    ],
)
def test_texts_of_ours(text: str, masked: str) -> None:
    assert Masker().text(text) == masked


def test_command_and_path_are_masked_as_the_arguments_are() -> None:
    def shown(**fields: Any) -> JobSpec:
        return Masker().spec(JobSpec(**fields), shows_env=True)

    assert shown(command="c", path="--password=x").path == f"--password={MASK}"
    assert shown(command="c", path="--password", args=("x", "b")).args == (MASK, "b")
    assert shown(command="c", path="", args=("--token", "x")).argv == ["c", "--token", MASK]
    assert shown(command="c", path="s.sh", args=("b",)).argv == ["c", "s.sh", "b"]
    assert shown(command="sh -c 'TOKEN=x y'").command == f"sh -c 'TOKEN={MASK} y'"
    assert shown(command="c", cwd="/data/token=x").cwd == f"/data/token={MASK}"
    harmless_keys = {"OPTS": "--password x", "URL": "db://u:x@h"}
    both = shown(command="c", env=harmless_keys, labels=harmless_keys)
    assert both.env == both.labels == {"OPTS": f"--password {MASK}", "URL": f"db://u:{MASK}@h"}


def test_a_record_as_its_owner_and_as_others_see_it() -> None:
    spec = JobSpec(
        "c", env={"PLAIN": "v", "TOKEN": SECRET}, labels={"team": "red", "api_key": SECRET}, args=(f"SSH_KEY={SECRET}",)
    )
    record = JobRecord(1, "j", spec, JobState.FINISHED, 1, 1, reason=f"TOKEN={SECRET} is bad")
    theirs = Masker().record(record, shows_env=True)
    others = Masker().record(record, shows_env=False)
    assert theirs.spec.env == {"PLAIN": "v", "TOKEN": MASK}
    assert others.spec.env == {"PLAIN": MASK, "TOKEN": MASK}
    for shown in (theirs, others):
        assert SECRET not in repr(shown.spec.args) + repr(shown.spec.labels) + shown.reason
        assert shown.spec.labels["team"] == "red"


def test_without_a_pattern_nothing_is_masked() -> None:
    assert Masker("").text(f"TOKEN={SECRET}") == f"TOKEN={SECRET}"
    assert not Masker("").hides("TOKEN")
    assert Masker("").arguments(["--token", SECRET, f"db://u:{SECRET}@h"]) == ("--token", SECRET, f"db://u:{SECRET}@h")


def test_long_texts_do_not_take_long() -> None:
    began_s = time.monotonic()
    long = ("a" * 100_000 + "=", "=" * 100_000, "a=" * 50_000, "a='" + "b" * 100_000, "a:" * 50_000, "\t" * 100_000)
    repeated = (
        "password='\"",
        '"password":',
        '"password":\\"',
        '"password":[',
        "://u:",
        "--password ",
        "\t",
        '\\"token\\":',
    )
    for text in (*long, *(part * 10_000 for part in repeated)):
        Masker().argument(text)
        Masker().text(text)
    assert time.monotonic() - began_s < 5


def test_no_line_of_the_log_shows_one(capfd: pytest.CaptureFixture[str]) -> None:
    log, _ = set_up_log(LogConfig(format="json"))
    nested = {"env": {"TOKEN": SECRET, "A": "1"}, "list": [f"TOKEN={SECRET}", 3]}
    log.warning("event", reason=f"TOKEN={SECRET}", spec=nested, token_count=3)
    try:
        raise ValueError(f"PASSWORD={SECRET}")
    except ValueError:
        log.exception("failed")
    log.warning("event", reason=f"db://u:{SECRET}@h")
    lines = capfd.readouterr().err
    assert SECRET not in lines
    first = json.loads(lines.splitlines()[0])
    assert first["spec"] == {"env": {"TOKEN": MASK, "A": "1"}, "list": [f"TOKEN={MASK}", 3]}
    assert first["token_count"] == 3
