"""What the trainer differentiates: an RL objective, or the likelihood of given answers.

Both are `megatron_ext.trainer.LossFunction`s: they see whole sequences of one micro-batch and return their share of a
loss whose denominators are the whole mini-batch's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from pipeline.objectives import Denominators, LossInputs, Objective

if TYPE_CHECKING:
    from megatron_ext.parts import Metrics
    from megatron_ext.trainer import LossBatch, LossFunction


def objective_loss(objective: Objective, denominators: Denominators) -> LossFunction:
    """An objective on samples with the values rollout_logprobs [N], advantage (a number or [N]) and, unless the
    weights are still those of the start of the update, so that current is proximal, proximal_logprobs [N]."""

    def loss(batch: LossBatch) -> tuple[Tensor, Metrics]:
        out = objective.loss(
            LossInputs(
                current_logprobs=batch.current_logprobs,
                proximal_logprobs=batch.values.get("proximal_logprobs", batch.current_logprobs.detach()),
                rollout_logprobs=batch.values["rollout_logprobs"],
                advantages=batch.values["advantage"],
                mask=batch.mask,
                entropy=batch.entropy,
            ),
            denominators,
        )
        return out.loss, {name: (float(m.total), float(m.count), m.kind) for name, m in out.metrics.items()}

    return loss


def supervised_loss(tokens: int) -> LossFunction:
    """Mean negative log-likelihood of the response tokens; `tokens`: response tokens of the whole batch."""

    def loss(batch: LossBatch) -> tuple[Tensor, Metrics]:
        nll = -(batch.current_logprobs * batch.mask).sum()
        return nll / tokens, {"loss/nll": (float(nll.detach()), float(batch.mask.sum()), "mean")}

    return loss
