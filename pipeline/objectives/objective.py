"""One objective: from rewards to advantages, and from log-probs to a loss.

    L = - sum over tokens or sequences of  weight * correction * A * surrogate(ratio)  + KL + critic - entropy

Pure tensor functions: any device, float32 or float64, no process group. A call may hold any subset of the mini-batch's
sequences; with the mini-batch's denominators the losses of the subsets add up to the loss of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.objectives.composition import MASKS_ONLY, Composition
from pipeline.objectives.terms import advantages as adv
from pipeline.objectives.terms import ratios, surrogates
from pipeline.objectives.terms.corrections import correction_weight
from pipeline.objectives.terms.critic import value_loss
from pipeline.objectives.terms.kl import kl_estimate
from pipeline.objectives.terms.reduce import reduce, token_weights
from pipeline.objectives.terms.surrogates import Term
from pipeline.objectives.types import Denominators, LossInputs, LossOutputs, Metric


@dataclass(frozen=True)
class AdvantageOutputs:
    """advantages: [S] or [S, T], constant. returns: [S, T], what the critic regresses on; None without a critic."""

    advantages: Tensor
    returns: Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """A filled composition under a name; `resolve(config)` makes one."""

    name: str
    composition: Composition

    @property
    def needs_rollout_logprobs(self) -> bool:
        """Whether the loss reads log mu."""
        kl = self.composition.kl
        return bool(self.composition.corrections) or (kl is not None and kl.estimator == "unbiased_k3")

    @property
    def needs_reference(self) -> bool:
        """Whether a reference model's log-probs are read, by the advantages or by the loss."""
        return self.composition.kl is not None

    @property
    def needs_group(self) -> bool:
        """Whether a rollout is compared with others of its prompt, so that one alone teaches nothing."""
        return self.composition.advantage in ("group_mean", "group_std", "leave_one_out")

    @property
    def kl_in_reward(self) -> bool:
        """Whether the advantages read proximal and reference log-probs."""
        return self.composition.kl is not None and self.composition.kl.place == "reward"

    @property
    def needs_critic(self) -> bool:
        """Whether a value model is trained beside the policy."""
        return self.composition.advantage == "gae"

    def advantages(
        self,
        rewards: Tensor,
        group_ids: Tensor,
        mask: Tensor,
        *,
        proximal_logprobs: Tensor | None = None,
        reference_logprobs: Tensor | None = None,
        values: Tensor | None = None,
    ) -> AdvantageOutputs:
        """Advantages of a whole batch; call it once, before the batch is split.

        rewards: [S] floating. group_ids: [S] integer, equal for the samples of one prompt. mask: [S, T] bool.
        proximal_logprobs, reference_logprobs: [S, T], for a KL in the reward. values: [S, T], for GAE.
        Raises ValueError for a missing input, or a reward that is not finite (it names the sequence).
        """
        if not rewards.isfinite().all():
            row = int((~rewards.isfinite()).nonzero()[0])
            raise ValueError(f"the reward of sequence {row} is {rewards[row].item()}")
        cells = self.composition
        penalty = None
        if self.kl_in_reward:
            assert cells.kl is not None
            if proximal_logprobs is None or reference_logprobs is None:
                raise ValueError("a KL in the reward needs proximal_logprobs and reference_logprobs")
            weights = mask.to(rewards.dtype)
            log_ratio, _ = ratios.token_log_ratio(
                reference_logprobs.detach(), proximal_logprobs.detach(), mask, weights, "reference/proximal"
            )
            penalty = cells.kl.beta * kl_estimate(log_ratio, cells.kl.estimator)
        returns = None
        if cells.advantage == "gae":
            if values is None:
                raise ValueError(f"{self.name} estimates advantages with a critic: pass values")
            dense = adv.token_rewards(rewards, mask, penalty)
            advantages, returns = adv.gae(dense, values, mask, cells.gae_gamma, cells.gae_lambda)
        elif cells.advantage == "batch_std":
            if penalty is not None:
                rewards = adv.returns_to_go(adv.token_rewards(rewards, mask, penalty), mask)
            advantages = adv.whiten(rewards, mask, cells.std_epsilon)
        else:
            if penalty is not None:
                rewards = rewards - penalty.sum(-1)
            if cells.advantage == "group_mean":
                advantages = adv.group_mean(rewards, group_ids)
            elif cells.advantage == "group_std":
                advantages = adv.group_std(rewards, group_ids, cells.std_epsilon)
            else:
                advantages = adv.leave_one_out(rewards, group_ids)
        if cells.whiten:
            advantages = adv.whiten(advantages, mask, cells.std_epsilon)
        return AdvantageOutputs(advantages, returns)

    def loss(self, inputs: LossInputs, denominators: Denominators) -> LossOutputs:
        """This subset's share of the mini-batch's loss, and metrics that reduce exactly: `policy_loss`, and
        `value_loss` where there is a critic.

        Gradient flows through current_logprobs, values and entropy only. N = 0: the sequence contributes 0, with
        gradient 0. Raises NonFiniteRatio with the rows where a ratio that the objective reads is not finite.
        """
        policy = self.policy_loss(inputs, denominators)
        if not self.needs_critic:
            return policy
        if inputs.values is None or inputs.returns is None:
            raise ValueError(f"{self.name} trains a critic: pass values and returns")
        value = self.value_loss(inputs.values, inputs.returns, inputs.proximal_values, inputs.mask, denominators)
        return LossOutputs(policy.loss + value.loss, policy.metrics | value.metrics)

    def policy_loss(self, inputs: LossInputs, denominators: Denominators) -> LossOutputs:
        """The policy's share: surrogate, KL in the loss and entropy bonus. For a policy and a critic that are two
        models; the critic's fields of `inputs` are not read. Errors as in `loss`."""
        cells, mask = self.composition, inputs.mask
        weights = mask.view(torch.uint8).to(inputs.current_logprobs.dtype)
        lengths = weights.sum(-1, keepdim=True)
        metrics: dict[str, Metric] = {}
        value, slope = self._policy(inputs, weights, lengths, denominators, metrics)
        loss = _with_gradient(inputs.current_logprobs, value, slope)
        metrics["loss/policy"] = _sum(loss)
        if cells.kl is not None and cells.kl.place == "loss":
            estimate = self._kl(inputs, weights)
            metrics["kl/reference"] = _mean(estimate, lengths)
            loss = loss + cells.kl.beta * reduce(estimate, lengths, cells.reduction, denominators)
        if cells.entropy_coefficient != 0.0:
            if inputs.entropy is None:
                raise ValueError("entropy_coefficient needs inputs.entropy")
            entropy = ratios.masked(inputs.entropy, mask, weights)
            metrics["entropy"] = _mean(entropy, lengths)
            loss = loss - cells.entropy_coefficient * reduce(entropy, lengths, cells.reduction, denominators)
        return LossOutputs(loss, metrics)

    def value_loss(
        self, values: Tensor, returns: Tensor, proximal_values: Tensor | None, mask: Tensor, denominators: Denominators
    ) -> LossOutputs:
        """The critic's share, value_coefficient times its reduced loss; differentiable in values.

        values, returns, proximal_values: [S, T] of one dtype (the last is read where value_clip is set). mask: [S, T]
        bool; what stands elsewhere is never read.
        """
        cells = self.composition
        weights = mask.view(torch.uint8).to(values.dtype)
        lengths = weights.sum(-1, keepdim=True)
        squared, slope = value_loss(values, returns, proximal_values, cells.value_clip)
        value = reduce(ratios.masked(squared, mask, weights), lengths, cells.reduction, denominators)
        slope = ratios.masked(slope, mask, weights).mul_(token_weights(cells.reduction, lengths, denominators))
        loss = cells.value_coefficient * _with_gradient(values, value, slope)
        error = ratios.masked((values - returns).detach().square(), mask, weights)
        return LossOutputs(loss, {"loss/value": _sum(value), "critic/squared_error": _mean(error, lengths)})

    @torch.no_grad()
    def _policy(
        self,
        inputs: LossInputs,
        weights: Tensor,
        lengths: Tensor,
        denominators: Denominators,
        metrics: dict[str, Metric],
    ) -> tuple[Tensor, Tensor]:
        """The policy's loss, a scalar, and its gradient by current_logprobs, [S, T]."""
        cells, mask = self.composition, inputs.mask
        advantages = inputs.advantages.to(weights.dtype)
        if advantages.dim() == 1:
            advantages = advantages[:, None]
        elif cells.ratio == "sequence":
            raise ValueError(
                f"{self.name} has one term per sequence and got advantages per token; pass [sequences], or write "
                "ratio: sequence_token"
            )
        else:
            advantages = ratios.masked(advantages, mask, weights)
        term = self._surrogate(inputs, weights, lengths, advantages, metrics)
        metrics["loss/clip_fraction"] = Metric(term.cut.sum(), _count(term.slope, weights, lengths))
        factor = -advantages * token_weights(cells.reduction, lengths, denominators)
        for correction in cells.corrections:
            numerator = inputs.current_logprobs if correction.numerator == "current" else inputs.proximal_logprobs
            name = f"{correction.numerator}/rollout"
            log_weight, _ = ratios.token_log_ratio(numerator, inputs.rollout_logprobs, mask, weights, name)
            weight, cut = correction_weight(correction, log_weight, weights, advantages)
            del log_weight
            metrics[f"correction/{correction.kind}_mean"] = _weighted_mean(weight, weights, lengths)
            metrics[f"correction/{correction.kind}_cut"] = Metric(cut.sum(), _count(weight, weights, lengths))
            factor = _times(weight, factor)
        value = None if term.value is None else _dot(term.value.mul_(factor), weights)
        larger, smaller = (term.slope, factor) if _fits(factor, term.slope) else (factor, term.slope)
        slope = _times(_times(larger, smaller), weights)
        if value is None:
            value = _dot(slope, inputs.current_logprobs)
            if not value.isfinite():
                value = _dot(slope, ratios.masked(inputs.current_logprobs, mask, weights))
        return value, slope

    def _surrogate(
        self,
        inputs: LossInputs,
        weights: Tensor,
        lengths: Tensor,
        advantages: Tensor,
        metrics: dict[str, Metric],
    ) -> Term:
        """The term per unit of advantage, before corrections."""
        cells = self.composition
        kind, number = cells.surrogate, cells.number
        # A correction by current/rollout is the whole weight already.
        whole = any(c.numerator == "current" and c.kind not in MASKS_ONLY for c in cells.corrections)
        if kind == "reinforce" and whole:
            return surrogates.reinforce(torch.ones_like(lengths))
        log_ratio, largest = ratios.token_log_ratio(
            inputs.current_logprobs, inputs.proximal_logprobs, inputs.mask, weights, "current/proximal"
        )
        if cells.ratio == "token":
            ratio = log_ratio.exp_()
        else:
            # s_t has the value of s and, by its own log pi, the slope of s; it differs in letting A vary by token.
            log_level = ratios.sequence_log_ratio(log_ratio, lengths)
            ratio, largest = log_level.exp(), ratios.largest(log_level)
        metrics["ratio/mean"] = _weighted_mean(ratio, weights, lengths)
        metrics["ratio/max_abs_log"] = Metric(largest, torch.ones_like(largest), "max")
        if kind == "log_space_clip":
            return surrogates.log_space_clip(log_ratio, lengths, advantages, number("clip_low"), number("clip_high"))
        if kind == "soft_gate":
            return surrogates.soft_gate(ratio, advantages, number("tau_positive"), number("tau_negative"))
        if kind == "reinforce":
            return surrogates.reinforce(ratio)
        if kind == "stop_gradient_clip":
            return surrogates.stop_gradient_clip(ratio, cells.clip_low, number("clip_high"))
        if kind == "mask":
            weight = torch.ones_like(lengths) if whole else ratio
            return surrogates.mask(ratio, advantages, weight, number("clip_low"), number("clip_high"))
        dual_clip = cells.dual_clip if kind == "dual_clip" else None
        return surrogates.clip(ratio, advantages, number("clip_low"), number("clip_high"), dual_clip)

    def _kl(self, inputs: LossInputs, weights: Tensor) -> Tensor:
        """The KL estimate at each token, [S, T], 0 on padding; differentiable. No correction weighs it."""
        kl, mask = self.composition.kl, inputs.mask
        assert kl is not None
        if inputs.reference_logprobs is None:
            raise ValueError("a KL in the loss needs inputs.reference_logprobs")
        current = inputs.current_logprobs
        log_ratio, _ = ratios.token_log_ratio(
            inputs.reference_logprobs.detach(), current, mask, weights, "reference/current"
        )
        importance = None
        if kl.estimator == "unbiased_k3":
            rollout = inputs.rollout_logprobs.detach()
            importance = ratios.token_log_ratio(current, rollout, mask, weights, "current/rollout")[0].exp()
        return kl_estimate(log_ratio, kl.estimator, importance)


class _WithGradient(torch.autograd.Function):
    """A scalar whose gradient by a tensor is given."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return grad_outputs[0] * ctx.saved_tensors[0], None, None


def _with_gradient(inputs: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    return _WithGradient.apply(inputs, value, gradient)  # pyright: ignore[reportReturnType]


def _fits(a: Tensor, b: Tensor) -> bool:
    """Whether a broadcasts into b."""
    return a.shape[1] in (1, b.shape[1])


def _times(a: Tensor, b: Tensor) -> Tensor:
    """a * b, in a's memory where it fits."""
    return a.mul_(b) if _fits(b, a) else a * b


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """sum a b of [S, T] with [S, T], summed pairwise along rows, and of [S, 1] with either."""
    if a.shape == b.shape:
        return torch.linalg.vecdot(a, b).sum()
    return (a * b.sum(-1, keepdim=True)).sum() if a.shape[1] == 1 else (a.sum(-1, keepdim=True) * b).sum()


def _count(matrix: Tensor, weights: Tensor, lengths: Tensor) -> Tensor:
    """What a mean of the matrix is over: tokens for [S, T], sequences that have tokens for [S, 1]."""
    return lengths.sum() if matrix.shape == weights.shape else (lengths > 0).sum().to(lengths.dtype)


def _weighted_mean(values: Tensor, weights: Tensor, lengths: Tensor) -> Metric:
    """Mean over tokens of [S, T], or over the sequences that have tokens of [S, 1]; allocates nothing of their size."""
    count = _count(values, weights, lengths)
    if values.shape == weights.shape:
        return Metric(torch.dot(values.reshape(-1), weights.reshape(-1)), count)
    return Metric((values * (lengths > 0)).sum(), count)


def _mean(values: Tensor, lengths: Tensor) -> Metric:
    """Mean over tokens of [S, T] that is 0 on padding."""
    return Metric(values.detach().sum(), lengths.sum())


def _sum(share: Tensor) -> Metric:
    share = share.detach()
    return Metric(share, torch.ones_like(share), "sum")
