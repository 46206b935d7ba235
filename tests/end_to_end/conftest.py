"""Real engines, all of them forked from preloaded processes unless a test asks for the plain start."""

from pathlib import Path

import pytest

from tests.support.command import QUICKSTART, Command


@pytest.fixture(scope="session", autouse=True)
def engines_are_forked(preloaded):
    """Before any fixture that starts engines."""


@pytest.fixture
def command(tmp_path):
    """Starts commands in folders of their own; none outlives the test."""
    started: list[Command] = []

    def start(*overrides: str, folder: Path | None = None, config: str = QUICKSTART) -> Command:
        folder = folder or tmp_path / str(len(started))
        folder.mkdir(exist_ok=True)
        started.append(Command(folder, *overrides, config=config))
        return started[-1]

    yield start
    for one in started:
        one.stop()
