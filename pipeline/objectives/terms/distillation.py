"""Reverse KL to a teacher on tokens that the policy sampled: l_t = log pi(y_t) - log pi_T(y_t), prefixes as sampled.

    advantage    A_t += - coefficient sum_{s >= t} gamma^(s-t) l_s                 l of pi_o, constant
    sampled      sg[min(pi/mu, max_weight)] l_t^2 / 2
    top k        sum_{v in K} pi(v) log(pi(v)/pi_T(v)) + (1-P) log((1-P)/(1-Q))    P, Q: mass of K under pi, pi_T

On policy, and where s != t is left out (gamma = 0), the mean of grad l_t^2 / 2 and of l_t grad log pi(y_t) is the
gradient of KL(pi || pi_T) at the sampled prefixes (Agarwal et al., "On-policy distillation", 2306.13649, eq. 3-4, with
the reverse KL; the weight makes that true of tokens from mu, up to its bound). With gamma = 1 the advantage follows the
gradient of the KL of whole answers, which also leads the policy away from prefixes where it cannot match (Gu et al.,
2306.08543, eq. 4).

The top-k form sums over tokens in place of sampling one, so it has less variance. Its value is the KL of the two
policies with all tokens outside K = the teacher's k likeliest taken as one: never more than the whole KL, by what is
between the two inside that rest, and equal to it where k is the vocabulary, or one less. Its gradient is that value's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.objectives.distillation_config import DistillationConfig
from pipeline.objectives.measures import mean_of, sum_of
from pipeline.objectives.terms import log_ratios
from pipeline.objectives.terms.advantages import gae
from pipeline.objectives.terms.reduce import reduce
from pipeline.objectives.types import LossInputs, Metric

LEAST_REST = 1e-6
"""Mass that the rest has at least: log-probs in float32 do not add up to 1 closer."""


def taught(
    config: DistillationConfig, advantages: Tensor, mask: Tensor, proximal: Tensor | None, teacher: Tensor | None
) -> Tensor:
    """The advantages of rewards by their factor, and a teacher's beside them where its place is there.

    advantages: [S] or [S, T]. mask: [S, T] bool. proximal, teacher: [S, T] log-probs. Returns [S, T], or advantages'
    shape where the teacher's place is the loss. Raises ValueError for a missing input and one that is not finite.
    """
    advantages = config.reward * advantages
    if config.place != "advantage":
        return advantages
    if proximal is None or teacher is None:
        raise ValueError("a teacher's advantages need proximal_logprobs and teacher_logprobs")
    mine = log_ratios.finite(proximal.detach(), mask, "proximal_logprobs")
    theirs = log_ratios.finite(teacher.detach(), mask, "teacher_logprobs")
    rows = advantages if advantages.dim() == 2 else advantages[:, None]
    return torch.where(mask, rows + config.coefficient * teacher_advantages(mine, theirs, mask, config.gamma), 0.0)


def teacher_loss(
    config: DistillationConfig, inputs: LossInputs, ratio: Tensor | None, per_token: Tensor
) -> tuple[Tensor, dict[str, Metric]]:
    """This subset's share of the teacher's term, and metrics.

    ratio: [S, T], pi/mu, for the sampled form. per_token: [S, 1] of `token_weights`. Gradient flows through the
    current log-probs alone. Raises ValueError for a missing input, BadSamples for one that is not finite.
    """
    if inputs.teacher_logprobs is None:
        raise ValueError("a teacher's term needs inputs.teacher_logprobs")
    mask, samples = inputs.mask, inputs.sample_ids
    teacher = log_ratios.finite(inputs.teacher_logprobs.detach(), mask, "teacher_logprobs", samples)
    log_ratio = log_ratios.trained(inputs.current_logprobs, mask) - teacher
    metrics = {"teacher/kl": mean_of(log_ratio, mask)}
    if config.top_k:
        if inputs.current_top_logprobs is None or inputs.teacher_top_logprobs is None:
            raise ValueError("a teacher's top tokens need inputs.current_top_logprobs and teacher_top_logprobs")
        term = top_term(inputs.current_top_logprobs, inputs.teacher_top_logprobs, mask)
        metrics["teacher/kl_top"] = mean_of(term, mask)
    else:
        assert ratio is not None
        term = sampled_term(log_ratio, ratio.detach().clamp(max=config.max_weight))
    loss = config.coefficient * reduce(log_ratios.finite(term, mask, "the teacher's term", samples), mask, per_token)
    return loss, metrics | {"loss/teacher": sum_of(loss)}


def teacher_advantages(proximal: Tensor, teacher: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """- sum_{s >= t} gamma^(s-t) l_s over trained tokens. proximal, teacher: [S, T] log-probs, 0 on untrained tokens.
    mask: [S, T] bool. Returns [S, T], 0 on untrained tokens."""
    return gae(teacher - proximal, torch.zeros_like(teacher), mask, gamma, 1.0)[0]


def sampled_term(log_ratio: Tensor, weight: Tensor) -> Tensor:
    """weight l^2 / 2. log_ratio: [S, T], l, differentiable, 0 on untrained tokens. weight: [S, T], constant."""
    return 0.5 * weight.detach() * log_ratio.square()


def top_term(current: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """The KL over K and the rest. current, teacher: [S, T, k], log pi and log pi_T of the tokens of K; differentiable
    in current. mask: [S, T] bool. Returns [S, T], nats, 0 on untrained tokens."""
    current = torch.where(mask[..., None], current, -1.0)  # what stands there is not read, and its gradient is 0
    teacher = torch.where(mask[..., None], teacher, -1.0).detach()
    inside = (current.exp() * (current - teacher)).sum(-1)
    mine, theirs = ((1 - p.exp().sum(-1)).clamp(min=LEAST_REST) for p in (current, teacher))
    return torch.where(mask, inside + mine * (mine.log() - theirs.log()), 0.0)
