"""What the trainer differentiates: an RL objective, a critic's error, or the likelihood of given answers.

All are `megatron_ext.trainer.LossFunction`s: they see whole sequences of one micro-batch and return their share of a
loss whose denominators are the whole mini-batch's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from pipeline.objectives import Denominators, LossInputs, LossOutputs, Objective

if TYPE_CHECKING:
    from megatron_ext.parts import Metrics
    from megatron_ext.trainer import LossBatch, LossFunction


def policy_loss(objective: Objective, denominators: Denominators) -> LossFunction:
    """An objective on samples with the values rollout_logprobs [N], advantage (a number or [N]), reference_logprobs [N]
    where the objective has a KL in the loss, and proximal_logprobs [N] unless the weights are still those of the start
    of the update, so that current is proximal."""

    def loss(batch: LossBatch) -> tuple[Tensor, Metrics]:
        current, entropy = batch.quantities
        inputs = LossInputs(
            current_logprobs=current,
            proximal_logprobs=batch.values.get("proximal_logprobs", current.detach()),
            rollout_logprobs=batch.values["rollout_logprobs"],
            advantages=batch.values["advantage"],
            mask=batch.mask,
            reference_logprobs=batch.values.get("reference_logprobs"),
            entropy=entropy,
        )
        return _share(objective.policy_loss(inputs, denominators))

    return loss


def critic_loss(objective: Objective, denominators: Denominators) -> LossFunction:
    """The critic's error on samples with the values returns [N] and proximal_values [N]."""

    def loss(batch: LossBatch) -> tuple[Tensor, Metrics]:
        (values,) = batch.quantities
        returns, proximal = batch.values["returns"], batch.values["proximal_values"]
        return _share(objective.value_loss(values, returns, proximal, batch.mask, denominators))

    return loss


def supervised_loss(tokens: int) -> LossFunction:
    """Mean negative log-likelihood of the response tokens; `tokens`: response tokens of the whole batch."""

    def loss(batch: LossBatch) -> tuple[Tensor, Metrics]:
        nll = -(batch.quantities[0] * batch.mask).sum()
        return nll / tokens, {"loss/nll": (float(nll.detach()), float(batch.mask.sum()), "mean")}

    return loss


def _share(out: LossOutputs) -> tuple[Tensor, Metrics]:
    return out.loss, {name: (float(m.total), float(m.count), m.kind) for name, m in out.metrics.items()}
