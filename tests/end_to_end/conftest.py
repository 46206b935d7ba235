"""Real engines, all of them forked from preloaded processes unless a test asks for the plain start."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def engines_are_forked(preloaded):
    """Before any fixture that starts engines."""
