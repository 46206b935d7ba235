"""Routes that stay where they were decoded, in the Ray object store of that node, and whoever trains on them reads.

They are most of what an answer weighs (384 bytes a token of Qwen3-30B-A3B's), and the controller reads none of it. To
numpy they are an array: `np.asarray(routes)` brings them here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.errors import SamerouteError


class StoredRoutesLostError(SamerouteError):
    """The node that held them is gone."""


@dataclass(frozen=True, eq=False)
class StoredRoutes:
    """Routes [rows, layers, topk] of one sequence, checked where they were decoded.

    parts: references to arrays in the object store, one behind the other; the owner of each is the controller, so that
    they outlive the process that decoded them. shape: of all parts together.
    """

    parts: tuple[Any, ...]
    shape: tuple[int, int, int]
    dtype: np.dtype

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def size(self) -> int:
        """Expert ids."""
        return self.shape[0] * self.shape[1] * self.shape[2]

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def joined(self, more: StoredRoutes) -> StoredRoutes:
        """These and more rows behind them; nothing is read. Raises ValueError for other layers or another type."""
        if more.shape[1:] != self.shape[1:] or more.dtype != self.dtype:
            raise ValueError(f"routes {more.dtype} {more.shape} do not go on from {self.dtype} {self.shape}")
        parts = self.parts + more.parts if len(more) else self.parts
        return StoredRoutes(parts, (len(self) + len(more), *self.shape[1:]), self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Of one part, a view of the store that nobody can write to. Raises StoredRoutesLostError."""
        import ray  # not where no routes are stored
        from ray.exceptions import RayError

        try:
            parts = ray.get(list(self.parts))
        except RayError as error:
            raise StoredRoutesLostError(
                f"routes of a sampled answer are lost with the node that had them: {error}"
            ) from error
        whole = parts[0] if len(parts) == 1 else np.concatenate([np.empty((0, *self.shape[1:]), self.dtype), *parts])
        assert whole.shape == self.shape, f"{whole.shape} was stored, not {self.shape}"
        return np.array(whole, dtype, copy=copy)


Routes = np.ndarray | StoredRoutes


def join_routes(own: Routes, more: Routes) -> Routes:
    """The rows of one sequence and those behind them. Where some are stored and some are here, all come here."""
    if isinstance(own, StoredRoutes) and isinstance(more, StoredRoutes):
        return own.joined(more)
    return np.concatenate([np.asarray(own), np.asarray(more)])
