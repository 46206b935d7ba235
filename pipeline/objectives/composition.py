"""The cells an objective is composed of, and which of them go together. Nothing here imports torch.

advantage x ratio level x surrogate x corrections x reduction (+ KL, critic, entropy)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.objectives.cells import (
    Advantage,
    Credit,
    Divergence,
    KLEstimator,
    RatioLevel,
    Reduction,
    Std,
    Surrogate,
)
from pipeline.objectives.correction_config import CorrectionConfig
from pipeline.objectives.distillation_config import DistillationConfig
from pipeline.objectives.rules import problem_of


class KLConfig(BaseModel):
    """A penalty on KL(pi || pi_ref), estimated on the sampled tokens; l = log pi_ref - log pi, or log mu - log pi."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    estimator: KLEstimator = Field(
        default="k3",
        description="k1 = -l; k2 = l^2/2; k3 = e^l - 1 - l; unbiased_k3 = (pi/mu) k3, gradient through pi/mu",
    )
    beta: float = Field(default=1e-3, ge=0, description="coefficient, reward units per nat")
    place: Literal["loss", "reward"] = Field(
        default="loss", description="loss: + beta * reduced estimator; reward: subtracted from the reward, no gradient"
    )
    to: Literal["reference", "rollout"] = Field(
        default="reference",
        description="what pi is held near: the frozen policy of the start of RL, or mu, which sampled the tokens",
    )

    @model_validator(mode="after")
    def _check(self) -> KLConfig:
        if self.place == "reward" and self.estimator == "unbiased_k3":
            raise ValueError(
                "kl.estimator unbiased_k3 weighs k3 by pi/mu and is made for its gradient through pi; a KL in the "
                "reward is a number of the proximal policy, without a gradient and without mu; write kl.place: loss, "
                "or kl.estimator: k1 or k3"
            )
        if self.place == "reward" and self.to == "rollout":
            raise ValueError(
                "kl.to: rollout holds pi near mu by a gradient; in the reward it would be the engines' disagreement, "
                "which no answer can help; write kl.place: loss, or kl.to: reference"
            )
        return self


@dataclass(frozen=True)
class Composition:
    """Every cell of an objective, filled.

    advantage:     group_mean R - mean; group_std (R - mean)/(std + std_epsilon); leave_one_out; mean_relative
                   (R - mean)/mean; batch_scaled (R - mean)/(the std of that over the batch + std_epsilon); batch_std
                   (the reward, whitened over the batch's tokens); gae.
    std:           of a group or a batch: population divides by the count, sample by the count less one.
    credit:        episode, one reward for all trained tokens; turn, what a turn and those after it earned (turns.py).
    turn_gamma:    discount of the next turn's return; gae has gae_gamma, which is per turn there.
    ratio:         token r_t; sequence s; sequence_token s_t; product prod_t r_t, as a constant.
    ratio_to:      what the ratio's pi stands over: proximal, or rollout (pi/mu: staleness and discrepancy in one).
    surrogate:     see surrogates.py. log_space_clip takes token ratios and gives one term per sequence: ratio sequence.
    reduction:     see reduce.py.
    clip_low/high: ratio bounds 1 - clip_low, 1 + clip_high; of the log-ratio for log_space_clip.
    dual_clip:     upper bound of r where A < 0.
    divergence, trust_low/high, trust_both: how far pi of the token may be from the other policy: below it, above it;
                   both: whatever the sign of A, in place of where A pushes only. trust_weight: the largest ratio.
    power/decay_positive/negative: k and lambda of the gamma gate, where A > 0 and elsewhere.
    second_moment: the largest mean of (log w)^2 over the batch's tokens; those with the largest are dropped.
    tau_positive/negative: temperature of the soft gate where A > 0 and elsewhere.
    corrections:   factors on the term, multiplied.
    kl:            penalty on the distance from a reference model.
    distillation:  the distance from a teacher, beside the rewards or alone.
    whiten:        whiten the advantages over the batch's tokens as a last step.
    gae_gamma/lambda, value_coefficient, value_clip: critic; value_clip is the largest move of a value in one update.
    entropy_coefficient: bonus per nat of reduced token entropy.
    dynamic_sampling: groups whose rewards are all equal are replaced before the update (DAPO).
    overlong_fraction: length of the soft penalty's ramp as a fraction of the maximum length; 0 is no penalty (DAPO).
    """

    advantage: Advantage
    ratio: RatioLevel
    surrogate: Surrogate
    reduction: Reduction
    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = None
    tau_positive: float | None = None
    tau_negative: float | None = None
    divergence: Divergence | None = None
    trust_low: float | None = None
    trust_high: float | None = None
    trust_both: bool = False
    trust_weight: float | None = None
    power_positive: float | None = None
    decay_positive: float | None = None
    power_negative: float | None = None
    decay_negative: float | None = None
    second_moment: float | None = None
    corrections: tuple[CorrectionConfig, ...] = ()
    kl: KLConfig | None = None
    distillation: DistillationConfig | None = None
    whiten: bool = False
    std: Std = "population"
    credit: Credit = "episode"
    turn_gamma: float = 1.0
    ratio_to: Literal["proximal", "rollout"] = "proximal"
    std_epsilon: float = 1e-6
    gae_gamma: float = 1.0
    gae_lambda: float = 0.95
    value_coefficient: float = 0.5
    value_clip: float | None = 0.2
    entropy_coefficient: float = 0.0
    dynamic_sampling: bool = False
    overlong_fraction: float = 0.0

    def __post_init__(self) -> None:
        problem = problem_of(self)
        if problem is not None:
            raise ValueError(problem)

    def number(self, cell: str) -> float:
        """A number that the surrogate needs; construction has checked that it is there."""
        value = getattr(self, cell)
        assert value is not None, cell
        return value

    @property
    def needs_rollout_logprobs(self) -> bool:
        """Whether the loss reads log mu."""
        kl = self.kl is not None and (self.kl.estimator == "unbiased_k3" or self.kl.to == "rollout")
        sampled = self.teacher_term and not self.teacher_top
        return bool(self.corrections) or kl or sampled or self.ratio_to == "rollout" or self.second_moment is not None

    @property
    def needs_reference(self) -> bool:
        """Whether a reference model's log-probs are read, by the advantages or by the loss."""
        return self.kl is not None and self.kl.to == "reference"

    @property
    def needs_group(self) -> bool:
        """Whether a rollout is compared with others of its prompt, so that one alone teaches nothing."""
        return self.advantage not in ("batch_std", "gae") and self.reads_rewards

    @property
    def reads_rewards(self) -> bool:
        """Whether rewards are learnt from."""
        return self.distillation is None or self.distillation.reward > 0

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher's log-probs are read, by the advantages or by the loss."""
        return self.distillation is not None

    @property
    def teacher_term(self) -> bool:
        """Whether the loss reads them."""
        return self.distillation is not None and self.distillation.place == "loss"

    @property
    def teacher_advantage(self) -> bool:
        """Whether the advantages do."""
        return self.distillation is not None and self.distillation.place == "advantage"

    @property
    def teacher_top(self) -> int:
        """How many of the teacher's likeliest tokens the loss reads at each place; 0: the sampled one."""
        return 0 if self.distillation is None else self.distillation.top_k

    @property
    def needs_turns(self) -> bool:
        """Whether the advantages read turns and their rewards."""
        return self.credit == "turn"

    @property
    def needs_prompt_tokens(self) -> bool:
        """Whether the loss reads how many trained tokens each sequence's prompt has."""
        own = self.distillation.reduction if self.distillation is not None and self.teacher_term else None
        return "prompt_token_mean" in (self.reduction, own)

    @property
    def kl_in_reward(self) -> bool:
        """Whether the advantages read proximal and reference log-probs."""
        return self.kl is not None and self.kl.place == "reward"

    @property
    def needs_proximal(self) -> bool:
        """Whether the advantages, before the first optimizer step, read log pi_o."""
        return self.kl_in_reward or self.second_moment is not None or self.teacher_advantage

    @property
    def needs_critic(self) -> bool:
        """Whether a value model is trained beside the policy."""
        return self.advantage == "gae"
