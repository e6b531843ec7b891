"""Configurations, good and bad."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from worker_svc.config import Config, ConfigError, load

ENVIRON = {"HOME": "/home/someone", "PATH": "/usr/bin"}

SECRET = "hunter2-topsecret"

AN_ADDRESS = "host:port, [ipv6]:port or unix:/path"

A_SIGNAL = 'a signal, by name ("SIGTERM" or "TERM") or by number as text ("15")'

Write = Callable[[str], Path]


def load_config(path: Path | None, *, environ: Mapping[str, str], overrides: Mapping[str, str] = {}) -> Config:
    return load(path, environ=environ, overrides=overrides).config


def problems_of(
    path: Path | None, environ: Mapping[str, str] = ENVIRON, overrides: Mapping[str, str] | None = None
) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, environ=environ, overrides=overrides or {})
    assert str(caught.value).splitlines() == [str(problem) for problem in caught.value.problems]
    return str(caught.value).splitlines()


def from_variable(name: str, text: str) -> Config:
    return load_config(None, environ={**ENVIRON, name: text})
