"""What loops compiled by numba have in common: the exponential function, and numbers by which threads share work out.

It becomes part of the loops where they are, and numba keeps those as long as their own file is as it was: who changes
this file clears `__pycache__`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, njit, types

intrinsic: Any = extending.intrinsic
"""What it makes is called by compiled code, without `typing`."""

_INT = ir.IntType(64)


@intrinsic
def take(typing: Any, counter: Any) -> Any:
    """The number at an address, of int64, and one more is there: each thread gets another."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(arguments[0], _INT.as_pointer()), _INT(1), "acq_rel")

    return types.int64(types.int64), generate


@intrinsic
def look(typing: Any, counter: Any) -> Any:
    """The number at an address, of int64, after which all is seen that was done before it was counted."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(arguments[0], _INT.as_pointer()), "acquire", 8)

    return types.int64(types.int64), generate


@njit("f4(f4)", inline="always", fastmath={"contract"})
def exp(t):
    """e^t, right to 1.2e-7 of it (3e-7 in loops that may reorder sums) from -87 to 88; beyond, what it is there. A loop
    over it vectorises, which numpy's does not.

    2^n e^(t - n ln 2), of which the second is Cephes' polynomial for float32 (S. L. Moshier). NaN stays NaN.
    """
    t = np.float32(88) if t > np.float32(88) else t
    t = np.float32(-87) if t < np.float32(-87) else t
    n = np.floor(t * np.float32(1.44269504) + np.float32(0.5))
    r = t - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4) * r + np.float32(1.3981999507e-3)
    p = (p * r + np.float32(8.3334519073e-3)) * r + np.float32(4.1665795894e-2)
    p = (p * r + np.float32(1.6666665459e-1)) * r + np.float32(5.0000001201e-1)
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return (p * r * r + r + np.float32(1)) * power
