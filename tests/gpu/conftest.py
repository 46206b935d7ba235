"""Tests that were asked for and cannot run fail; none is skipped."""

from __future__ import annotations

import pytest

from tests.gpu.needs import lacking


@pytest.fixture(autouse=True)
def _gpu():
    if said := lacking():
        pytest.fail(said, pytrace=False)
