"""What the C library does with memory that is freed.

It gives the larger part back to the kernel, which clears every page again when it is asked for the next tensor: an
activation function over 6 MB took seven times as long as its arithmetic. Both engines ask for the same sizes again and
again, so what they have freed stays with them.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_NEVER = -1
_LARGEST = 1 << 25  # bytes; the C library takes no more, and what is larger always comes from the kernel


def keep_freed_memory() -> None:
    """In this process, from now on. Nothing happens where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST)
        mallopt(_TRIM_THRESHOLD, _NEVER)
