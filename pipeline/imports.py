"""Import what a process needs for its life, without the garbage collector's looking through it again and again."""

from __future__ import annotations

import contextlib
import gc
import sysconfig
from collections.abc import Iterator
from pathlib import Path


def own_folder() -> list[str]:
    """The folder of the packages, to stand first on a child's path; none where that is Python's own, which every
    interpreter has and whose place, behind the standard library, must stay."""
    folder = Path(__file__).resolve().parent.parent
    python = {Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib")}
    return [] if folder in python else [str(folder)]


@contextlib.contextmanager
def lasting_imports() -> Iterator[None]:
    """Around the imports of a process that does little else meanwhile: a fifth of their time is collections.

    What there is at the end lasts as long as the process: no later collection looks at it.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
