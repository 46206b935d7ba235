"""The loss of the value model that PPO trains beside the policy."""

from __future__ import annotations

import torch
from torch import Tensor


def value_loss(values: Tensor, returns: Tensor, proximal_values: Tensor | None, value_clip: float | None) -> Tensor:
    """1/2 max((V - R)^2, (V_o + clip(V - V_o, +-value_clip) - R)^2) at each token; differentiable in V.

    PPO, 1707.06347, eq. 9 without the clip; the clip is that of its authors' code (baselines, ppo2). Where the clipped
    error is the larger one, V is outside the clip and the derivative is 0; elsewhere it is V - R.
    values, returns, proximal_values: [S, T]. value_clip: reward units, None for no clip; needs proximal_values.
    """
    squared = (values - returns).square()
    if value_clip is None:
        return 0.5 * squared
    if proximal_values is None:
        raise ValueError("value_clip bounds the move from the proximal values: pass proximal_values")
    moved = proximal_values + (values - proximal_values).clamp(-value_clip, value_clip)
    clipped = (moved - returns).square()
    return 0.5 * torch.maximum(squared, clipped)
