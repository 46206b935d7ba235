"""Lines of the pinned engines that code or tests rely on, read where they are installed, without importing them."""

from __future__ import annotations

import importlib.util
import textwrap
from pathlib import Path

from tests.support.te import stand_in


def lines(file: str, first: int, last: int, *, begins: str) -> str:
    """Lines `first` to `last` of a file such as "sglang/srt/server_args.py", dedented.

    begins: how the first line begins without its indentation. Raises AssertionError where it does not: the vendor's
    code has moved, and what relies on it must be read again.
    """
    package, _, inner = file.partition("/")
    text = (_folder(package) / inner).read_text().splitlines()[first - 1 : last]
    found = textwrap.dedent("\n".join(text))
    assert found.startswith(begins), f"{file}:{first} is {found.splitlines()[:1]}, not {begins!r}: it has moved"
    return found


def _folder(package: str) -> Path:
    if package == "transformer_engine":  # beside the environment, see tests/support/te
        return stand_in.FOLDER / package
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is not installed"
    assert spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations)))
