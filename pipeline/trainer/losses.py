"""What the trainer differentiates: an RL objective, a critic's error, or the likelihood of given answers.

All are `megatron_ext.trainer.LossFunction`s: they see whole sequences of one micro-batch and return their share of a
loss whose denominators are the whole mini-batch's. What they know of a sequence beside the model's answer is its row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.arrays import padded
from pipeline.objectives import Denominators, LossInputs, LossOutputs, Objective
from pipeline.teaching.teacher_scores import TeacherScores

if TYPE_CHECKING:
    from megatron_ext.parts import Metrics
    from megatron_ext.trainer import LossBatch, LossFunction

ON_POLICY: Literal["on policy"] = "on policy"
"""Said in the place of pi_o's log-probs: the weights are those of the start of the update, so pi is pi_o."""


@dataclass(frozen=True)
class LossRow:
    """What the loss reads of one rollout of N response tokens. Entries of tokens that were not sampled are not read.

    rollout_logprobs:    [N] float32, log mu.
    proximal_logprobs:   [N] float32, log pi_o, or ON_POLICY.
    advantage:           a number, or [N] float32.
    reference_logprobs:  [N] float32, log pi_ref, where the objective has a KL in the loss.
    teacher:             its scores, where the objective has its term in the loss.
    returns:             [N] float32, what a critic regresses on, where there is one.
    proximal_values:     [N] float32, the critic at the start of the update.
    prompt_tokens:       sampled tokens of all rollouts of its prompt, where the objective's reduction reads them.
    """

    rollout_logprobs: np.ndarray
    proximal_logprobs: np.ndarray | Literal["on policy"]
    advantage: np.ndarray | float
    reference_logprobs: np.ndarray | None = None
    teacher: TeacherScores | None = None
    returns: np.ndarray | None = None
    proximal_values: np.ndarray | None = None
    prompt_tokens: int | None = None


def policy_loss(objective: Objective, denominators: Denominators, samples: Sequence[int] | None = None) -> LossFunction:
    """An objective on samples whose rows are LossRows, all of them on policy or none.

    samples: the step's number of each sample of the call, for errors; by default their positions in the call.
    """

    def loss(batch: LossBatch) -> tuple[Tensor, Metrics]:
        current, entropy, *named = batch.quantities
        rows: Sequence[LossRow] = batch.rows
        rollout = _matrix([r.rollout_logprobs for r in rows], current)
        assert rollout is not None
        inputs = LossInputs(
            current_logprobs=current,
            proximal_logprobs=_proximal(rows, current),
            rollout_logprobs=rollout,
            advantages=_advantages(rows, current),
            mask=batch.mask,
            reference_logprobs=_matrix([r.reference_logprobs for r in rows], current),
            teacher_logprobs=_matrix([None if r.teacher is None else r.teacher.logprobs for r in rows], current),
            current_top_logprobs=named[0] if named else None,
            teacher_top_logprobs=_top_logprobs(rows, named[0]) if named else None,
            entropy=entropy,
            prompt_tokens=_prompt_tokens(rows, current),
            sample_ids=_numbers(batch, samples),
        )
        return _share(objective.policy_loss(inputs, denominators))

    return loss


def critic_loss(objective: Objective, denominators: Denominators, samples: Sequence[int] | None = None) -> LossFunction:
    """The critic's error on samples whose rows are LossRows with returns and proximal_values; samples: as above."""

    def loss(batch: LossBatch) -> tuple[Tensor, Metrics]:
        (values,) = batch.quantities
        rows: Sequence[LossRow] = batch.rows
        returns = _matrix([r.returns for r in rows], values)
        if returns is None:
            raise ValueError("a critic is trained on rows with returns")
        out = objective.value_loss(
            values,
            returns,
            _matrix([r.proximal_values for r in rows], values),
            batch.mask,
            denominators,
            prompt_tokens=_prompt_tokens(rows, values),
            sample_ids=_numbers(batch, samples),
        )
        return _share(out)

    return loss


def supervised_loss(tokens: int) -> LossFunction:
    """Mean negative log-likelihood of the response tokens; `tokens`: response tokens of the whole batch."""

    def loss(batch: LossBatch) -> tuple[Tensor, Metrics]:
        nll = -(batch.quantities[0] * batch.mask).sum()
        return nll / tokens, {"loss/nll": (float(nll.detach()), float(batch.mask.sum()), "mean")}

    return loss


def _proximal(rows: Sequence[LossRow], current: Tensor) -> Tensor:
    """log pi_o [sequences, tokens]."""
    on_policy = [isinstance(r.proximal_logprobs, str) for r in rows]
    if all(on_policy):
        return current.detach()
    if any(on_policy):
        raise ValueError("some rows of a mini-batch are on policy and some are not")
    found = _matrix([None if isinstance(r.proximal_logprobs, str) else r.proximal_logprobs for r in rows], current)
    assert found is not None
    return found


def _advantages(rows: Sequence[LossRow], like: Tensor) -> Tensor:
    """[sequences] float32, or [sequences, tokens] where they differ by token."""
    arrays = [r.advantage for r in rows if isinstance(r.advantage, np.ndarray)]
    if not arrays:
        return torch.tensor([r.advantage for r in rows], dtype=torch.float32, device=like.device)
    found = _matrix([r.advantage if isinstance(r.advantage, np.ndarray) else None for r in rows], like)
    assert found is not None
    return found


def _matrix(rows: Sequence[np.ndarray | None], like: Tensor) -> Tensor | None:
    """[N] arrays as [sequences, tokens] on the device of `like`, zeros behind; None where no row has one.

    Raises ValueError where only some rows have one, or one is not as long as its response.
    """
    present = [row for row in rows if row is not None]
    if not present:
        return None
    if len(present) != len(rows):
        raise ValueError(f"{len(present)} of {len(rows)} rows have what the loss reads")
    out = torch.from_numpy(padded(present))
    if out.shape != like.shape:
        raise ValueError(f"rows of up to {out.shape[1]} tokens for responses of up to {like.shape[1]}")
    return out.to(like.device)


def _top_logprobs(rows: Sequence[LossRow], like: Tensor) -> Tensor | None:
    """The teacher's [sequences, tokens, k], zeros behind; None where it has said nothing of them."""
    out = torch.zeros_like(like, requires_grad=False)
    for row, scores in zip(out, [r.teacher for r in rows], strict=True):
        if scores is None or scores.top_logprobs is None:
            return None
        row[: len(scores)] = torch.from_numpy(scores.top_logprobs)
    return out


def _prompt_tokens(rows: Sequence[LossRow], like: Tensor) -> Tensor | None:
    """[sequences] int64; None where the objective reads none."""
    counts = [row.prompt_tokens for row in rows]
    return None if None in counts else torch.tensor(counts, device=like.device)


def _numbers(batch: LossBatch, samples: Sequence[int] | None) -> tuple[int, ...]:
    return batch.indices if samples is None else tuple(samples[i] for i in batch.indices)


def _share(out: LossOutputs) -> tuple[Tensor, Metrics]:
    return out.loss, {name: (float(m.total), float(m.count), m.kind) for name, m in out.metrics.items()}
