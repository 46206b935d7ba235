"""What the losses read of each rollout: advantages over the whole batch, and the log-probs and values beside them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pipeline.objectives import Objective, overlong_penalty
from pipeline.types import Group


def loss_values(
    objective: Objective,
    groups: Sequence[Group],
    *,
    max_new_tokens: int,
    proximal: Sequence[np.ndarray] | None = None,
    reference: Sequence[np.ndarray] | None = None,
    values: Sequence[np.ndarray] | None = None,
) -> list[dict[str, np.ndarray | float]]:
    """One dictionary a rollout, in the order of the groups; see `pipeline.trainer.losses` for its names.

    groups: graded. max_new_tokens: the limit that the overlong penalty knows. proximal, reference, values: [N] float32
    a rollout, of the trainer at the start of the update, the reference model and the critic, where there are any.
    Raises ValueError where the objective needs one that is missing.
    """
    rollouts = [r for g in groups for r in g.rollouts]
    group_ids = np.repeat(np.arange(len(groups)), [len(g.rollouts) for g in groups])
    mask = torch.from_numpy(padded([np.ones(len(r), bool) for r in rollouts]))
    rewards = torch.from_numpy(np.concatenate([g.rewards for g in groups]).astype(np.float64))
    if ramp := round(objective.composition.overlong_fraction * max_new_tokens):
        rewards = rewards + overlong_penalty(mask.sum(-1), max_new_tokens, ramp)

    def matrix(rows: Sequence[np.ndarray] | None) -> torch.Tensor | None:
        return None if rows is None else torch.from_numpy(padded(rows)).double()

    out = objective.advantages(
        rewards,
        torch.from_numpy(group_ids),
        mask,
        proximal_logprobs=matrix(proximal),
        reference_logprobs=matrix(reference),
        values=matrix(values),
    )
    of_group = mask.new_zeros(len(groups), dtype=torch.int64).index_add(0, torch.from_numpy(group_ids), mask.sum(-1))
    rows = []
    for i, r in enumerate(rollouts):
        advantage = out.advantages[i].numpy()
        row: dict[str, np.ndarray | float] = {
            "rollout_logprobs": r.rollout_logprobs,
            "advantage": float(advantage) if advantage.ndim == 0 else advantage[: len(r)].astype(np.float32),
        }
        if objective.needs_prompt_tokens:
            row["prompt_tokens"] = float(of_group[group_ids[i]])
        if proximal is not None:
            row["proximal_logprobs"] = proximal[i]
        if reference is not None:
            row["reference_logprobs"] = reference[i]
        if values is not None and out.returns is not None:
            row |= {"proximal_values": values[i], "returns": out.returns[i, : len(r)].numpy().astype(np.float32)}
        rows.append(row)
    return rows


def padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of different lengths as one matrix, zeros (False) behind."""
    out = np.zeros((len(rows), max(len(r) for r in rows)), rows[0].dtype)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = row
    return out
