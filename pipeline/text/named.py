"""Names in configurations: {NAME} in the texts of some JSON, and lists of sources."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

NAMED = re.compile(r"\{(\w+)\}")


def names_in(value: Any) -> Iterator[str]:
    """Every name, as often as it stands there; keys are not looked at."""
    if isinstance(value, str):
        yield from NAMED.findall(value)
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from names_in(inner)


def is_among(source: str, names: Collection[str]) -> bool:
    """Whether a source is named, or the one that it is a task of: gym.countdown is of gym. Without names all are."""
    return not names or source in names or source.partition(".")[0] in names
