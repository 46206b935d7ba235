"""How much better than expected: from one reward per sequence to an advantage per sequence or per token.

Computed once per batch, over whole groups, before anything is split. Nothing here is differentiable.
A group is the samples of one prompt; groups may differ in size.
"""

from __future__ import annotations

import torch
from torch import Tensor


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


def group_std(rewards: Tensor, group_ids: Tensor, epsilon: float = 1e-6) -> Tensor:
    """A_i = (R_i - mean) / (std + epsilon) over its group (GRPO, 2402.03300, section 4.1.2).

    std is the population's (divide by G). The paper does not say which; code that takes torch's default divides by
    G - 1, which multiplies A by sqrt((G-1)/G). Shapes as in group_mean; equal rewards give A = 0.
    """
    centred = group_mean(rewards, group_ids)
    index, sizes = _group(group_ids)
    variance = rewards.new_zeros(len(sizes)).index_add(0, index, centred.square()) / sizes
    return centred / (variance.sqrt()[index] + epsilon)


def leave_one_out(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """A_i = R_i - mean of the others of its group = G/(G-1) (R_i - mean) (RLOO, 2402.14740).

    Shapes as in group_mean. Raises ValueError for a group of one: it has no others.
    """
    index, sizes = _group(group_ids)
    if (sizes == 1).any():
        alone = group_ids[(sizes == 1)[index]]
        raise ValueError(
            f"leave-one-out needs two samples per prompt, and group {int(alone[0])} has one; sample more or write "
            "advantage: group_mean"
        )
    size = sizes[index]
    return group_mean(rewards, group_ids) * size / (size - 1)


def whiten(advantages: Tensor, mask: Tensor, epsilon: float = 1e-6) -> Tensor:
    """(A - mean) / (std + epsilon), mean and population std over the tokens of the batch.

    advantages: [S] (each counts once per token) or [S, T]. mask: [S, T] bool. Returns advantages' shape; with [S, T],
    0 on padding. A batch whose advantages are all equal has A = 0.
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
    std = ((centred.square() * weights).sum() / tokens).sqrt()
    return centred / (std + epsilon)


def token_rewards(rewards: Tensor, mask: Tensor, penalty: Tensor | None = None) -> Tensor:
    """The sequence's reward on its last token, minus a penalty per token.

    rewards: [S]. mask: [S, T] bool. penalty: [S, T], beta times a KL estimate. Returns [S, T], 0 on padding; a sequence
    without tokens has nowhere to put its reward.
    """
    if mask.shape[1] == 0:
        return rewards.new_zeros(mask.shape)
    tokens_from_here = mask.flip(-1).cumsum(-1).flip(-1)
    last = mask & (tokens_from_here == 1)
    placed = torch.where(last, rewards[:, None], 0.0)
    return placed if penalty is None else torch.where(mask, placed - penalty, 0.0)


def returns_to_go(rewards: Tensor, mask: Tensor) -> Tensor:
    """sum_{i >= t} reward_i at each token (REINFORCE++, 2501.03262, with its KL already in the rewards).

    rewards: [S, T], 0 on padding. Returns [S, T], 0 on padding.
    """
    return rewards.flip(-1).cumsum(-1).flip(-1) * mask


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """A_t = sum_k (gamma lam)^k delta_{t+k}, delta_t = reward_t + gamma V_{t+1} - V_t; V is 0 after the last token.

    GAE, 1506.02438, eq. 16. rewards, values: [S, T]. mask: [S, T] bool; tokens outside it are stepped over.
    Returns (advantages, returns = advantages + values), [S, T], 0 on padding. A response cut at the length limit is
    treated as ended.
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
