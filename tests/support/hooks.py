"""Which tests run, and how one that failed is repeated."""

from __future__ import annotations

import shlex
import signal

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all", action="store_true", dest="run_all", help="run also the tests that need a long time or a quiet machine"
    )


def pytest_configure() -> None:
    """Undoes what nohup and shells without job control do: which signals are ignored is passed on, to jobs too."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is marked `long`, save for `--all` and for tests that are named one by one."""
    if config.getoption("run_all") or any("::" in argument for argument in config.args):
        return
    long = [item for item in items if item.get_closest_marker("long")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if not item.get_closest_marker("long")]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    failed = {report.nodeid for kind in ("failed", "error") for report in terminalreporter.stats.get(kind, [])}
    if failed:
        terminalreporter.section("to repeat each alone")
        for nodeid in sorted(failed):
            terminalreporter.line(f"scripts/test {shlex.quote(nodeid)}")
