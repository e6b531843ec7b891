"""Fixtures of tests about the output of jobs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from worker_svc.job import OutputVia

# The others where they are needed, as in conftest.py.
if TYPE_CHECKING:
    from tests.support.streams import Teller
    from worker_svc.output import OutputReader


@pytest.fixture
def holes(tmp_path: Path) -> None:
    """The test needs a file system that can make holes in files."""
    from tests.support.output_files import why_no_holes

    if why := why_no_holes(tmp_path):
        pytest.skip(why)


@pytest.fixture(params=["disk", "tmpfs"])
def output_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "disk":
        yield tmp_path
        return
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK):
        pytest.skip("/dev/shm is not there or not writable")
    with tempfile.TemporaryDirectory(dir=shm) as path:
        yield Path(path)


@pytest.fixture
def output_file(output_folder: Path) -> Path:
    return output_folder / "job.out"


@pytest.fixture
async def output_reader() -> AsyncIterator[OutputReader]:
    """And nothing is held by the time the test ends."""
    from tests.support.output_files import inotify_watches, open_fds
    from tests.support.waiting import eventually
    from worker_svc.output import OutputReader

    before = open_fds()
    reader = OutputReader()
    yield reader
    await eventually(lambda: inotify_watches() == 0)
    reader.close()
    await eventually(lambda: len(open_fds()) <= len(before))


@pytest.fixture(params=OutputVia, ids=lambda via: via.name)
def via(request: pytest.FixtureRequest) -> OutputVia:
    return OutputVia(request.param)


@pytest.fixture
def teller(tmp_path: Path) -> Iterator[Teller]:
    from tests.support.streams import Teller

    with Teller(tmp_path, "teller") as one:
        yield one
