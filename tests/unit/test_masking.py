"""What looks like a secret does not show."""

from __future__ import annotations

import json
import time

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
        (["-c", "export TOKEN=x; run"], ["-c", f"export TOKEN={MASK}; run"]),
        (["--verbose", "x", "a=b"], ["--verbose", "x", "a=b"]),
        (["--key", "2", "--key=2"], ["--key", "2", "--key=2"]),
        (["--api-key", "2", "--ApiKey=2"], ["--api-key", MASK, f"--ApiKey={MASK}"]),
    ],
)
def test_arguments(arguments: list[str], masked: list[str]) -> None:
    assert Masker().arguments(arguments) == tuple(masked)


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


def test_long_texts_do_not_take_long() -> None:
    began_s = time.monotonic()
    for text in ("a" * 100_000 + "=", "=" * 100_000, "a=" * 50_000, "a='" + "b" * 100_000):
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
    lines = capfd.readouterr().err
    assert SECRET not in lines
    first = json.loads(lines.splitlines()[0])
    assert first["spec"] == {"env": {"TOKEN": MASK, "A": "1"}, "list": [f"TOKEN={MASK}", 3]}
    assert first["token_count"] == 3
