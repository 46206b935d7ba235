"""One objective: from rewards to advantages, and from log-probs to a loss.

    L = - sum over tokens or sequences of  per_token * correction * term(ratio, A)  + KL + teacher + critic - entropy

Pure tensor functions: any device, float32 or float64, no process group. A call may hold any subset of the mini-batch's
sequences; with the mini-batch's denominators the losses of the subsets add up to the loss of the whole.

Only trained tokens count: `mask` may have False between tokens, and every length, mean and product skips these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.objectives.composition import Composition
from pipeline.objectives.config import ObjectiveConfig
from pipeline.objectives.correction_config import MASKS_ONLY
from pipeline.objectives.measures import counted_of, mean_of, of_ratio, share_of, sum_of
from pipeline.objectives.terms import advantages as adv
from pipeline.objectives.terms import log_ratios, surrogates
from pipeline.objectives.terms.corrections import correction_factor
from pipeline.objectives.terms.critic import value_loss
from pipeline.objectives.terms.distillation import taught, teacher_loss
from pipeline.objectives.terms.kl import kl_estimate
from pipeline.objectives.terms.reduce import reduce, token_weights
from pipeline.objectives.terms.second_moment import kept_tokens
from pipeline.objectives.terms.surrogates import Term
from pipeline.objectives.terms.trust_region import trust_region
from pipeline.objectives.terms.turns import Turns, turn_advantages
from pipeline.objectives.types import Denominators, LossInputs, LossOutputs, Metric, check_dtype


@dataclass(frozen=True)
class AdvantageOutputs:
    """advantages: [S] or [S, T], constant. returns: [S, T], what the critic regresses on; None without a critic."""

    advantages: Tensor
    returns: Tensor | None = None


@dataclass(frozen=True)
class _Tokens:
    """The log-probs of a call, 0 on untrained tokens, and what is counted. lengths: [S, 1], trained tokens."""

    current: Tensor
    proximal: Tensor
    rollout: Tensor
    mask: Tensor
    lengths: Tensor
    samples: Sequence[int] | None

    @classmethod
    def of(cls, x: LossInputs) -> _Tokens:
        return cls(
            current=log_ratios.trained(x.current_logprobs, x.mask),
            proximal=log_ratios.trained(x.proximal_logprobs.detach(), x.mask),
            rollout=log_ratios.trained(x.rollout_logprobs.detach(), x.mask),
            mask=x.mask,
            lengths=x.mask.sum(-1, keepdim=True).to(x.current_logprobs.dtype),
            samples=x.sample_ids,
        )

    def log_ratio(self, numerator: str, denominator: str) -> Tensor:
        """[S, T], of two policies by name."""
        a, b = getattr(self, numerator), getattr(self, denominator)
        return log_ratios.token_log_ratio(a, b, f"{numerator}/{denominator}", self.samples)


@dataclass(frozen=True)
class Objective:
    """A filled composition under a name; `resolve(config)` makes one."""

    name: str
    composition: Composition

    @property
    def needs_rollout_logprobs(self) -> bool:
        return self.composition.needs_rollout_logprobs

    @property
    def needs_reference(self) -> bool:
        return self.composition.needs_reference

    @property
    def needs_group(self) -> bool:
        return self.composition.needs_group

    @property
    def needs_prompt_tokens(self) -> bool:
        return self.composition.needs_prompt_tokens

    @property
    def needs_turns(self) -> bool:
        return self.composition.needs_turns

    @property
    def needs_teacher(self) -> bool:
        return self.composition.needs_teacher

    @property
    def kl_in_reward(self) -> bool:
        return self.composition.kl_in_reward

    @property
    def needs_critic(self) -> bool:
        return self.composition.needs_critic

    def advantages(
        self,
        rewards: Tensor,
        group_ids: Tensor,
        mask: Tensor,
        *,
        proximal_logprobs: Tensor | None = None,
        reference_logprobs: Tensor | None = None,
        rollout_logprobs: Tensor | None = None,
        teacher_logprobs: Tensor | None = None,
        values: Tensor | None = None,
        turns: Turns | None = None,
    ) -> AdvantageOutputs:
        """Advantages of a whole batch; call it once, before the batch is split.

        rewards: [S] float32 or float64. group_ids: [S] integer, equal for the samples of one prompt. mask: [S, T] bool,
        trained tokens. proximal_logprobs, reference_logprobs: [S, T], for a KL in the reward. proximal_logprobs,
        rollout_logprobs: [S, T], for a bound on the second moment, which makes A 0 where it drops a token.
        proximal_logprobs, teacher_logprobs: [S, T], for a teacher's part of the advantages. values: [S, T], for GAE.
        turns: for credit by turns, which reads their rewards in place of `rewards`.
        Raises ValueError for a missing input, and with the sequence where a reward, a value or a ratio that is read is
        not finite.
        """
        check_dtype("rewards", rewards)
        cells = self.composition
        if cells.needs_turns:
            if turns is None:
                raise ValueError(f"{self.name} gives credit by turns: pass turns")
            check_dtype("turns.rewards", turns.rewards)
            if not torch.equal(turns.numbers >= 0, mask):
                raise ValueError("turns.numbers has a turn for each trained token, and for no other")
        read = turns.rewards if cells.needs_turns and turns is not None else rewards[:, None]
        log_ratios.finite(read, torch.ones_like(read, dtype=torch.bool), "the reward")
        penalty = self._reward_penalty(mask, proximal_logprobs, reference_logprobs)
        known = None
        if cells.needs_critic:
            if values is None:
                raise ValueError(f"{self.name} estimates advantages with a critic: pass values")
            known = log_ratios.finite(values.detach(), mask, "values")
        if cells.needs_turns and turns is not None:
            advantages, returns = turn_advantages(cells, turns, group_ids, penalty, known)
        else:
            advantages, returns = self._of_episodes(rewards, group_ids, mask, penalty, known)
        if cells.whiten:
            advantages = adv.whiten(advantages, mask, cells.std_epsilon, cells.std)
        if cells.distillation is not None:
            advantages = taught(cells.distillation, advantages, mask, proximal_logprobs, teacher_logprobs)
        if cells.second_moment is not None:
            if proximal_logprobs is None or rollout_logprobs is None:
                raise ValueError(f"{self.name} bounds a second moment: pass proximal_logprobs and rollout_logprobs")
            kept = kept_tokens(proximal_logprobs, rollout_logprobs, mask, cells.second_moment)
            advantages = torch.where(kept, advantages if advantages.dim() == 2 else advantages[:, None], 0.0)
        return AdvantageOutputs(advantages, returns)

    def _of_episodes(
        self, rewards: Tensor, group_ids: Tensor, mask: Tensor, penalty: Tensor | None, values: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """(A [S] or [S, T], R [S, T] or None): one reward for all that a sequence's policy said."""
        cells = self.composition
        if not cells.reads_rewards:
            return torch.zeros_like(rewards), None
        if cells.advantage == "gae":
            assert values is not None
            dense = adv.token_rewards(rewards, mask, penalty)
            return adv.gae(dense, values, mask, cells.gae_gamma, cells.gae_lambda)
        if cells.advantage == "batch_std":
            if penalty is not None:
                rewards = adv.returns_to_go(adv.token_rewards(rewards, mask, penalty), mask)
            return adv.whiten(rewards, mask, cells.std_epsilon, cells.std), None
        if penalty is not None:
            rewards = rewards - penalty.sum(-1)
        if cells.advantage == "group_mean":
            return adv.group_mean(rewards, group_ids), None
        if cells.advantage == "group_std":
            return adv.group_std(rewards, group_ids, cells.std_epsilon, cells.std), None
        if cells.advantage == "mean_relative":
            return adv.mean_relative(rewards, group_ids), None
        if cells.advantage == "batch_scaled":
            return adv.batch_scaled(rewards, group_ids, cells.std_epsilon, cells.std), None
        return adv.leave_one_out(rewards, group_ids), None

    def _reward_penalty(self, mask: Tensor, proximal: Tensor | None, reference: Tensor | None) -> Tensor | None:
        """beta times the KL estimate at each trained token, where it belongs in the reward."""
        kl = self.composition.kl
        if kl is None or kl.place != "reward":
            return None
        if proximal is None or reference is None:
            raise ValueError("a KL in the reward needs proximal_logprobs and reference_logprobs")
        known, other = (log_ratios.trained(p.detach(), mask) for p in (reference, proximal))
        log_ratio = log_ratios.token_log_ratio(known, other, "reference/proximal")
        return kl.beta * kl_estimate(log_ratio, kl.estimator)

    def loss(self, inputs: LossInputs, denominators: Denominators) -> LossOutputs:
        """This subset's share of the mini-batch's loss, and metrics that reduce exactly: `policy_loss`, and
        `value_loss` where there is a critic.

        Gradient flows through current_logprobs, values and entropy only, and is 0 on untrained tokens. N = 0: the
        sequence contributes 0, with gradient 0. Raises BadSamples, which names them, where a number that is read is
        not finite or a ratio runs away (bad_samples.py).
        """
        policy = self.policy_loss(inputs, denominators)
        if not self.needs_critic:
            return policy
        if inputs.values is None or inputs.returns is None:
            raise ValueError(f"{self.name} trains a critic: pass values and returns")
        value = self.value_loss(
            inputs.values,
            inputs.returns,
            inputs.proximal_values,
            inputs.mask,
            denominators,
            prompt_tokens=inputs.prompt_tokens,
            sample_ids=inputs.sample_ids,
        )
        return LossOutputs(policy.loss + value.loss, policy.metrics | value.metrics)

    def policy_loss(self, inputs: LossInputs, denominators: Denominators) -> LossOutputs:
        """The policy's share: surrogate, KL in the loss and entropy bonus. For a policy and a critic that are two
        models; the critic's fields of `inputs` are not read. Errors as in `loss`."""
        cells, x = self.composition, _Tokens.of(inputs)
        per_token = token_weights(cells.reduction, x.lengths, denominators, inputs.prompt_tokens)
        advantages = self._advantages(inputs)
        metrics: dict[str, Metric] = {}
        term = self._surrogate(x, advantages, metrics)
        metrics["loss/clip_fraction"] = share_of(term.cut, counted_of(term.cut, x.mask))
        factor = self._corrections(x, advantages, metrics)
        log_ratios.check_weight(term.weight * factor * (advantages != 0), "the weight of a gradient", x.samples)
        loss = -reduce(factor * term.value, x.mask, per_token)
        metrics["loss/policy"] = sum_of(loss)
        if cells.kl is not None and cells.kl.place == "loss":
            estimate = self._kl(inputs, x)
            metrics[f"kl/{cells.kl.to}"] = mean_of(estimate, x.mask)
            loss = loss + cells.kl.beta * reduce(estimate, x.mask, per_token)
        if cells.distillation is not None and cells.teacher_term:
            weight = None if cells.teacher_top else x.log_ratio("current", "rollout").exp()
            weights = token_weights(cells.distillation.reduction, x.lengths, denominators, inputs.prompt_tokens)
            more, told = teacher_loss(cells.distillation, inputs, weight, weights)
            loss, metrics = loss + more, metrics | told
        if cells.entropy_coefficient != 0.0:
            if inputs.entropy is None:
                raise ValueError("entropy_coefficient needs inputs.entropy")
            entropy = log_ratios.finite(inputs.entropy, x.mask, "entropy", x.samples)
            metrics["entropy"] = mean_of(entropy, x.mask)
            loss = loss - cells.entropy_coefficient * reduce(entropy, x.mask, per_token)
        return LossOutputs(loss, metrics)

    def value_loss(
        self,
        values: Tensor,
        returns: Tensor,
        proximal_values: Tensor | None,
        mask: Tensor,
        denominators: Denominators,
        *,
        prompt_tokens: Tensor | None = None,
        sample_ids: Sequence[int] | None = None,
    ) -> LossOutputs:
        """The critic's share, value_coefficient times its reduced loss; differentiable in values.

        values, returns, proximal_values: [S, T] of one dtype, float32 or float64 (the last is read where value_clip is
        set). mask: [S, T] bool; what stands elsewhere is never read. prompt_tokens, sample_ids: as in LossInputs.
        """
        cells = self.composition
        check_dtype("values", values)
        given = {"values": values, "returns": returns.detach()}
        if cells.value_clip is not None and proximal_values is not None:
            given["proximal_values"] = proximal_values.detach()
        known = {name: log_ratios.finite(tensor, mask, name, sample_ids) for name, tensor in given.items()}
        halves = value_loss(known["values"], known["returns"], known.get("proximal_values"), cells.value_clip)
        lengths = mask.sum(-1, keepdim=True).to(values.dtype)
        value = reduce(halves, mask, token_weights(cells.reduction, lengths, denominators, prompt_tokens))
        error = (known["values"] - known["returns"]).square()
        return LossOutputs(
            cells.value_coefficient * value, {"loss/value": sum_of(value), "critic/squared_error": mean_of(error, mask)}
        )

    def _advantages(self, inputs: LossInputs) -> Tensor:
        """[S, 1] or [S, T] in the log-probs' dtype, constant, 0 where nothing is trained."""
        if inputs.advantages.dim() == 2 and self.composition.ratio == "sequence":
            raise ValueError(
                f"{self.name} has one term per sequence and got advantages per token; pass [sequences], or write "
                "ratio: sequence_token"
            )
        advantages = inputs.advantages.detach().to(inputs.current_logprobs.dtype)
        return log_ratios.finite(advantages, inputs.mask, "advantages", inputs.sample_ids)

    def _surrogate(self, x: _Tokens, advantages: Tensor, metrics: dict[str, Metric]) -> Term:
        """The term before corrections."""
        cells = self.composition
        kind, number = cells.surrogate, cells.number
        # A correction by current/rollout is the whole weight already.
        whole = any(c.numerator == "current" and c.kind not in MASKS_ONLY for c in cells.corrections)
        if kind == "reinforce" and whole:
            return surrogates.reinforce(torch.ones_like(x.lengths), advantages, x.current)
        log_ratio = x.log_ratio("current", cells.ratio_to)
        if kind == "trust_region":
            assert cells.divergence is not None
            metrics |= of_ratio(log_ratio, x.mask)
            other = getattr(x, cells.ratio_to)
            bounds = (number("trust_low"), number("trust_high"))
            return trust_region(
                advantages, x.current, other, cells.divergence, bounds,
                both=cells.trust_both, largest_weight=cells.trust_weight,
            )  # fmt: skip
        if kind == "gamma_gate":
            metrics |= of_ratio(log_ratios.sequence_log_ratio(log_ratio, x.lengths), x.mask)
            powers = (number("power_positive"), number("power_negative"))
            decays = (number("decay_positive"), number("decay_negative"))
            return surrogates.gamma_gate(log_ratio.sum(-1, keepdim=True), advantages, x.current, powers, decays)
        log_level = log_ratio if cells.ratio == "token" else log_ratios.sequence_log_ratio(log_ratio, x.lengths)
        metrics |= of_ratio(log_level, x.mask)
        if cells.ratio == "sequence_token":
            # s_t has the value of s and, by its own log pi, the slope of s; it differs in letting A vary by token.
            log_level = log_level.detach() + x.current - x.current.detach()
        ratio = log_level.exp()
        if kind == "log_space_clip":
            return surrogates.log_space_clip(log_ratio, x.lengths, advantages, number("clip_low"), number("clip_high"))
        if kind == "soft_gate":
            return surrogates.soft_gate(ratio, advantages, number("tau_positive"), number("tau_negative"))
        if kind == "reinforce":
            return surrogates.reinforce(ratio, advantages, x.current)
        if kind == "stop_gradient_clip":
            return surrogates.stop_gradient_clip(ratio, advantages, x.current, cells.clip_low, number("clip_high"))
        if kind == "mask":
            weight = torch.ones_like(ratio) if whole else ratio
            return surrogates.mask(ratio, advantages, x.current, weight, number("clip_low"), number("clip_high"))
        dual_clip = cells.dual_clip if kind == "dual_clip" else None
        return surrogates.clip(ratio, advantages, number("clip_low"), number("clip_high"), dual_clip)

    def _corrections(self, x: _Tokens, advantages: Tensor, metrics: dict[str, Metric]) -> Tensor:
        """The product of all factors, [S, T] or [S, 1]; constant."""
        product = torch.ones_like(x.lengths)
        for correction in self.composition.corrections:
            assert correction.numerator is not None
            log_weight = x.log_ratio(correction.numerator, "rollout").detach()
            factor = correction_factor(correction, log_weight, x.mask, advantages, x.samples)
            metrics[f"correction/{correction.label}_mean"] = mean_of(factor.weight, x.mask)
            metrics[f"correction/{correction.label}_cut"] = share_of(factor.cut, factor.counted)
            product = product * factor.weight
        return product

    def _kl(self, inputs: LossInputs, x: _Tokens) -> Tensor:
        """The KL estimate at each token, [S, T], 0 on untrained ones; differentiable. No correction weighs it."""
        kl = self.composition.kl
        assert kl is not None
        reference = x.rollout
        if kl.to == "reference":
            if inputs.reference_logprobs is None:
                raise ValueError("a KL in the loss needs inputs.reference_logprobs")
            reference = log_ratios.trained(inputs.reference_logprobs.detach(), x.mask)
        log_ratio = log_ratios.token_log_ratio(reference, x.current, f"{kl.to}/current", x.samples)
        importance = None
        if kl.estimator == "unbiased_k3":
            importance = x.log_ratio("current", "rollout").exp()
            log_ratios.check_weight(importance.detach(), "current/rollout", x.samples)
        if kl.estimator in ("k3", "unbiased_k3"):
            log_ratios.check_weight(log_ratio.detach().exp(), f"{kl.to}/current", x.samples)
        return kl_estimate(log_ratio, kl.estimator, importance)


def resolve(config: ObjectiveConfig) -> Objective:
    """The objective a config means. Its name is the preset's, with "*" where a cell was written over."""
    return Objective(config.name, config.composition())
