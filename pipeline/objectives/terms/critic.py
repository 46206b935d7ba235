"""The loss of the value model that PPO trains beside the policy."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def value_loss(
    values: Tensor, returns: Tensor, proximal_values: Tensor | None, value_clip: float | None
) -> tuple[Tensor, Tensor]:
    """1/2 max((V - R)^2, (V_o + clip(V - V_o, +-value_clip) - R)^2) at each token, and its derivative by V.

    PPO, 1707.06347, eq. 9 without the clip; the clip is that of its authors' code (baselines, ppo2). Where the clipped
    error is the larger one, V is outside the clip, so the derivative is 0; elsewhere it is V - R.
    values, returns, proximal_values: [S, T]. value_clip: reward units, None for no clip; needs proximal_values.
    """
    slope = values - returns
    value = slope.square()
    if value_clip is not None:
        if proximal_values is None:
            raise ValueError("value_clip bounds the move from the proximal values: pass proximal_values")
        moved = (values - proximal_values).clamp_(-value_clip, value_clip)
        clipped = moved.add_(proximal_values).sub_(returns).square_()
        slope.mul_(torch.le(clipped, value, out=torch.empty_like(value)))
        value = torch.maximum(value, clipped, out=value)
    return value.mul_(0.5), slope
