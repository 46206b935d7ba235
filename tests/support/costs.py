"""What files of tests cost, so that the dear ones begin first."""

from __future__ import annotations

from pathlib import Path

_TESTS = Path(__file__).parents[1]
SECONDS: dict[str, int] = {}
"""Of a processor, children included, on an EPYC of 2.4 GHz; files of less than five are left out."""


def of(path: Path) -> int:
    """Seconds of the file at `path`; 0 for one that is not in the table."""
    return SECONDS.get(str(path.relative_to(_TESTS)), 0)


for _name in SECONDS:
    assert (_TESTS / _name).is_file(), f"{_name} is not there any more"
