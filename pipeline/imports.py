"""Import what a process needs for its life, without the garbage collector's looking through it again and again."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


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
