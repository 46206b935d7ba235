"""What the trainer differentiates: an RL objective, a critic's error, or the likelihood of given answers.

All are `megatron_ext.trainer.LossFunction`s: they see whole sequences of one micro-batch and return their share of a
loss whose denominators are the whole mini-batch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from pipeline.objectives import Denominators, LossInputs, LossOutputs, Objective

if TYPE_CHECKING:
    from megatron_ext.parts import Metrics
    from megatron_ext.trainer import LossBatch, LossFunction


def policy_loss(objective: Objective, denominators: Denominators, samples: Sequence[int] | None = None) -> LossFunction:
    """An objective on samples with the values rollout_logprobs [N], advantage (a number or [N]), reference_logprobs [N]
    where the objective has a KL in the loss, prompt_tokens (a number) where its reduction reads them, and
    proximal_logprobs [N] unless the weights are still those of the start of the update, so that current is proximal.
    samples: the step's number of each sample of the call, for errors; by default their positions in the call."""

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
            prompt_tokens=batch.values.get("prompt_tokens"),
            sample_ids=_numbers(batch, samples),
        )
        return _share(objective.policy_loss(inputs, denominators))

    return loss


def critic_loss(objective: Objective, denominators: Denominators, samples: Sequence[int] | None = None) -> LossFunction:
    """The critic's error on samples with the values returns [N] and proximal_values [N]; the rest as in policy_loss."""

    def loss(batch: LossBatch) -> tuple[Tensor, Metrics]:
        (values,) = batch.quantities
        returns, proximal = batch.values["returns"], batch.values["proximal_values"]
        out = objective.value_loss(
            values,
            returns,
            proximal,
            batch.mask,
            denominators,
            prompt_tokens=batch.values.get("prompt_tokens"),
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


def _numbers(batch: LossBatch, samples: Sequence[int] | None) -> tuple[int, ...]:
    return batch.indices if samples is None else tuple(samples[i] for i in batch.indices)


def _share(out: LossOutputs) -> tuple[Tensor, Metrics]:
    return out.loss, {name: (float(m.total), float(m.count), m.kind) for name, m in out.metrics.items()}
