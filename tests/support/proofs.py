"""Which cases of a long proof `make test` runs; `make proofs` runs the others."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def sampled(names: Iterable[str], sample: Collection[str]) -> list:
    """All names as parameters of a test; those that are not in the sample are marked `proof`."""
    names = list(names)
    assert set(sample) <= set(names), f"{sorted(set(sample) - set(names))} is no case"
    return [pytest.param(name, marks=() if name in sample else pytest.mark.proof) for name in names]


def parameters_of(item: pytest.Item) -> dict[str, Any]:
    """The parameters of a test, {} where it has none. By those of a session a fixture makes no more than is asked."""
    return item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
