"""How much better than expected: from one reward per sequence to an advantage per sequence or per token.

Computed once per batch, over whole groups, before anything is split. Nothing here is differentiable.
A group is the samples of one prompt; groups may differ in size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.objectives.cells import Std


def _group(group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Index [S] of each sequence's group among the groups present, and the size of each group."""
    _, index, sizes = torch.unique(group_ids, return_inverse=True, return_counts=True)
    return index, sizes


def group_mean(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """A_i = R_i - mean of its group (Dr.GRPO, 2503.20783, section 3.2).

    rewards: [S] floating. group_ids: [S] integer. Returns [S].
    A group of equal rewards has A = 0 exactly, whatever the rounding of its mean; so has a group of one.
    """
    index, sizes = _group(group_ids)
    zeros = rewards.new_zeros(len(sizes))
    mean = zeros.index_add(0, index, rewards) / sizes
    low = zeros.scatter_reduce(0, index, rewards, "amin", include_self=False)
    high = zeros.scatter_reduce(0, index, rewards, "amax", include_self=False)
    return torch.where((low == high)[index], 0.0, rewards - mean[index])


def group_std(rewards: Tensor, group_ids: Tensor, epsilon: float = 1e-6, std: Std = "population") -> Tensor:
    """A_i = (R_i - mean) / (std + epsilon) over its group (GRPO, 2402.03300, section 4.1.2).

    std: population divides by G, sample by G - 1. The paper does not say which; code that takes torch's default has the
    sample's, which multiplies A by sqrt((G-1)/G). Shapes as in group_mean; equal rewards, and a group of one, give
    A = 0.
    """
    centred = group_mean(rewards, group_ids)
    index, sizes = _group(group_ids)
    squares = rewards.new_zeros(len(sizes)).index_add(0, index, centred.square())
    variance = squares / (sizes if std == "population" else (sizes - 1).clamp(min=1))
    return centred / (variance.sqrt()[index] + epsilon)


def leave_one_out(rewards: Tensor, group_ids: Tensor, *, alone: bool = False) -> Tensor:
    """A_i = R_i - mean of the others of its group = G/(G-1) (R_i - mean) (RLOO, 2402.14740).

    Shapes as in group_mean. alone: a group of one has A = 0. Else it raises ValueError: it has no others.
    """
    if not alone:
        refuse_alone(group_ids)
    index, sizes = _group(group_ids)
    size = sizes[index]
    return group_mean(rewards, group_ids) * size / (size - 1).clamp(min=1)


def mean_relative(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """A_i = (R_i - mean) / mean of its group; 0 where the mean is not above 0 (MaxRL, 2602.02710; prime-rl's max_rl).

    For rewards of 0 or 1 a prompt's gradient is multiplied by (1 - (1-p)^(G-1)) / p: that of log p, cut off after G - 1
    terms of its series in 1 - p. Shapes as in group_mean.
    """
    centred = group_mean(rewards, group_ids)
    index, sizes = _group(group_ids)
    mean = (rewards.new_zeros(len(sizes)).index_add(0, index, rewards) / sizes)[index]
    return torch.where(mean > 0, centred / torch.where(mean > 0, mean, 1.0), 0.0)


def batch_scaled(rewards: Tensor, group_ids: Tensor, epsilon: float = 1e-6, std: Std = "population") -> Tensor:
    """A_i = (R_i - mean of its group) / (the std of that over the batch's answers + epsilon) (ScaleRL, 2510.13786).

    One scale for all prompts, so none is favoured. Shapes as in group_mean; std: as in group_std.
    """
    centred = group_mean(rewards, group_ids)
    count = len(centred) if std == "population" else max(len(centred) - 1, 1)
    spread = (centred - centred.mean()).square().sum() / max(count, 1)
    return centred / (spread.sqrt() + epsilon)


def refuse_alone(group_ids: Tensor) -> None:
    """Raise ValueError where leave-one-out has a group of one."""
    index, sizes = _group(group_ids)
    if (sizes == 1).any():
        alone = group_ids[(sizes == 1)[index]]
        raise ValueError(
            f"leave-one-out needs two samples per prompt, and group {int(alone[0])} has one; sample more or write "
            "advantage: group_mean"
        )


def whiten(advantages: Tensor, mask: Tensor, epsilon: float = 1e-6, std: Std = "population") -> Tensor:
    """(A - mean) / (std + epsilon), mean and std over the trained tokens of the batch.

    advantages: [S] (each counts once per trained token) or [S, T]. mask: [S, T] bool. std: as in group_std. Returns
    advantages' shape; with [S, T], 0 on untrained tokens. A batch whose advantages are all equal has A = 0.
    REINFORCE++, 2501.03262.
    """
    weights = mask.to(advantages.dtype) if advantages.dim() == 2 else mask.sum(-1).to(advantages.dtype)
    counted = weights > 0
    if not counted.any():
        return torch.zeros_like(advantages)
    kept = advantages[counted]
    if kept.min() == kept.max():
        return torch.zeros_like(advantages)
    tokens = weights.sum()
    mean = torch.where(counted, advantages * weights, 0.0).sum() / tokens
    centred = torch.where(counted, advantages - mean, 0.0)
    count = tokens if std == "population" else tokens - 1  # advantages differ, so there are at least two tokens
    return centred / (((centred.square() * weights).sum() / count).sqrt() + epsilon)


def token_rewards(rewards: Tensor, mask: Tensor, penalty: Tensor | None = None) -> Tensor:
    """The sequence's reward on its last trained token, minus a penalty per trained token.

    rewards: [S]. mask: [S, T] bool. penalty: [S, T], beta times a KL estimate. Returns [S, T], 0 on untrained tokens; a
    sequence without trained tokens has nowhere to put its reward.
    """
    if mask.shape[1] == 0:
        return rewards.new_zeros(mask.shape)
    tokens_from_here = mask.flip(-1).cumsum(-1).flip(-1)
    last = mask & (tokens_from_here == 1)
    placed = torch.where(last, rewards[:, None], 0.0)
    return placed if penalty is None else torch.where(mask, placed - penalty, 0.0)


def returns_to_go(rewards: Tensor, mask: Tensor) -> Tensor:
    """sum_{i >= t} reward_i at each trained token (REINFORCE++, 2501.03262, with its KL already in the rewards).

    rewards: [S, T], 0 on untrained tokens. Returns [S, T], 0 on untrained tokens.
    """
    return rewards.flip(-1).cumsum(-1).flip(-1) * mask


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """GAE (1506.02438, eq. 16) over the trained tokens. For a trained token t let t+ be the next trained token:

        delta_t = reward_t + gamma V_{t+} - V_t
        A_t     = delta_t + gamma lam A_{t+}        V = A = 0 where there is no t+
        R_t     = A_t + V_t                         what the critic regresses on

    An untrained token is stepped over: it costs no factor of gamma or lam, and its value and reward are not read. So a
    sequence with untrained tokens has the advantages of the same sequence without them.

    rewards, values: [S, T]. mask: [S, T] bool. Returns (A, R), [S, T], 0 on untrained tokens. A response cut at the
    length limit is treated as ended.
    """
    values = torch.where(mask, values.detach(), 0.0)
    advantages = torch.zeros_like(values)
    next_value = values.new_zeros(mask.shape[0])
    next_advantage = values.new_zeros(mask.shape[0])
    for t in range(mask.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = torch.where(mask[:, t], advantage, 0.0)
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
    return advantages, torch.where(mask, advantages + values, 0.0)
