"""What DAPO (2503.14476) does to rewards and groups before an update."""

from __future__ import annotations

import torch
from torch import Tensor


def overlong_penalty(lengths: Tensor, max_length: int, ramp: int) -> Tensor:
    """What a long response loses: 0 up to max_length - ramp tokens, falling in a line to -1 at max_length, -1 beyond.

    DAPO, eq. 13 (max_length 20,480, ramp 4,096). lengths: [S], trained tokens. Returns [S] floating, to be added to the
    reward.
    Raises ValueError for a ramp outside [1, max_length].
    """
    if not 1 <= ramp <= max_length:
        raise ValueError(f"the ramp of the overlong penalty is 1 to max_length = {max_length} tokens, got {ramp}")
    over = lengths.to(torch.get_default_dtype()) - (max_length - ramp)
    return -(over / ramp).clamp(0.0, 1.0)


def is_informative(rewards: Tensor) -> bool:
    """Whether a group teaches anything: its rewards are not all equal (DAPO, eq. 11: 0 < right answers < G).

    rewards: [G], the verifier's, before any penalty of length. A group without rewards is not informative.
    """
    return bool(rewards.numel() > 0 and (rewards != rewards[0]).any())
