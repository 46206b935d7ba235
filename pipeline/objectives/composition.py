"""The cells an objective is composed of, and which of them go together. Nothing here imports torch.

advantage x ratio level x surrogate x corrections x reduction (+ KL, critic, entropy)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

Advantage = Literal["group_mean", "group_std", "leave_one_out", "batch_std", "gae"]
RatioLevel = Literal["token", "sequence", "sequence_token"]
Surrogate = Literal["reinforce", "clip", "dual_clip", "stop_gradient_clip", "soft_gate", "mask", "log_space_clip"]
CorrectionKind = Literal[
    "token_is",
    "token_tis",
    "token_mis",
    "icepop",
    "mean_mis",
    "sequence_is",
    "sequence_tis",
    "sequence_mis",
    "geometric_is",
    "geometric_tis",
    "geometric_mask",
    "opsm",
]
Policy = Literal["proximal", "current"]
Reduction = Literal[
    "sequence_mean_token_mean",
    "sequence_mean_token_sum",
    "prompt_token_mean",
    "token_mean",
    "token_sum_constant",
    "sequence_mean",
]
Std = Literal["population", "sample"]
Credit = Literal["episode", "turn"]
KLEstimator = Literal["k1", "k2", "k3", "unbiased_k3"]

# Where no bound is written. TIS 2 and MIS 2: "Your efficient RL framework secretly brings you off-policy RL training"
# and its sequels; IcePop [.5, 5]: 2510.18855; mean_mis 5: AReaL's behav_imp_weight_cap.
# geometric_mask and opsm bound a mean over tokens, which has a deviation of sqrt(2 k3 / N) before any update. 1e-2 is
# the smallest round number that keeps 95% of answers of 128 tokens at the published mismatch, k3 = 1.5e-3. The 1e-3 of
# verl's presets and the 1e-4 of slime (OPSM's paper gives no number) drop most of them: docs/objectives.md.
CORRECTION_BOUNDS: dict[str, tuple[float | None, float | None]] = {
    "token_is": (None, None),
    "token_tis": (None, 2.0),
    "token_mis": (None, 2.0),
    "icepop": (0.5, 5.0),
    "mean_mis": (None, 5.0),
    "sequence_is": (None, None),
    "sequence_tis": (None, 2.0),
    "sequence_mis": (None, 2.0),
    "geometric_is": (None, None),
    "geometric_tis": (None, 2.0),
    "geometric_mask": (0.99, 1.01),
    "opsm": (None, 1e-2),
}
MASKS_ONLY = ("geometric_mask", "opsm")
"""Corrections that keep or drop a sequence and weigh nothing."""
DROPS = ("token_mis", "icepop", "mean_mis", "sequence_mis", "geometric_mask", "opsm")
"""Corrections that take tokens or answers out of the gradient; the others only bound their weight."""


class CorrectionConfig(BaseModel):
    """One correction for the discrepancy between trainer and rollout engine; a factor of 1 when there is none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: CorrectionKind = Field(
        description="token_*: w_t per token; sequence_*: W = prod w_t; geometric_*: W^(1/N); *_is: the weight itself; "
        "*_tis: min(weight, high); *_mis, icepop: the weight where low <= weight <= high, else 0; mean_mis: the mean "
        "over tokens of that; geometric_mask: 1 inside the bounds, else 0; opsm: 0 where A < 0 and mean "
        "log(mu / numerator) > high, else 1"
    )
    low: float | None = Field(default=None, ge=0, description="lower bound of the weight; none where not given")
    high: float | None = Field(default=None, gt=0, description="upper bound of the weight (opsm: nats per token)")
    numerator: Policy | None = Field(
        default=None,
        description="the policy over mu: proximal (discrepancy alone; clip on pi/pi_o, correct with pi_o/mu) or "
        "current (discrepancy and staleness in one weight). Default: proximal, and current for opsm",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: object) -> object:
        if not isinstance(data, dict) or data.get("kind") not in CORRECTION_BOUNDS:
            return data
        low, high = CORRECTION_BOUNDS[data["kind"]]
        given = {key: value for key, value in data.items() if value is not None}
        return {"low": low, "high": high, "numerator": "current" if data["kind"] == "opsm" else "proximal"} | given

    @model_validator(mode="after")
    def _check(self) -> CorrectionConfig:
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"correction {self.kind}: low {self.low} is above high {self.high}; swap them")
        if self.kind.endswith("_is") and (self.low is not None or self.high is not None):
            raise ValueError(
                f"correction {self.kind} is the whole weight and has no bounds; "
                f"write kind: {self.kind.replace('_is', '_tis')} to truncate it"
            )
        if (self.kind.endswith("_tis") or self.kind == "opsm") and self.low is not None:
            raise ValueError(f"correction {self.kind} has an upper bound only; leave low out")
        return self

    @property
    def per_token(self) -> bool:
        return self.kind.startswith("token_") or self.kind == "icepop"


class KLConfig(BaseModel):
    """A penalty on KL(pi || pi_ref), estimated on the sampled tokens; l = log pi_ref - log pi."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    estimator: KLEstimator = Field(
        default="k3",
        description="k1 = -l; k2 = l^2/2; k3 = e^l - 1 - l; unbiased_k3 = (pi/mu) k3, gradient through pi/mu",
    )
    beta: float = Field(default=1e-3, ge=0, description="coefficient, reward units per nat")
    place: Literal["loss", "reward"] = Field(
        default="loss", description="loss: + beta * reduced estimator; reward: subtracted from the reward, no gradient"
    )

    @model_validator(mode="after")
    def _check(self) -> KLConfig:
        if self.place == "reward" and self.estimator == "unbiased_k3":
            raise ValueError(
                "kl.estimator unbiased_k3 weighs k3 by pi/mu and is made for its gradient through pi; a KL in the "
                "reward is a number of the proximal policy, without a gradient and without mu; write kl.place: loss, "
                "or kl.estimator: k1 or k3"
            )
        return self


@dataclass(frozen=True)
class Composition:
    """Every cell of an objective, filled.

    advantage:     group_mean R - mean; group_std (R - mean)/(std + std_epsilon); leave_one_out; batch_std (the reward,
                   whitened over the batch's tokens); gae.
    std:           of a group or a batch: population divides by the count, sample by the count less one.
    credit:        episode, one reward for all trained tokens; turn, what a turn and those after it earned (turns.py).
    turn_gamma:    discount of the next turn's return; gae has gae_gamma, which is per turn there.
    ratio:         token r_t; sequence s; sequence_token s_t.
    ratio_to:      what the ratio's pi stands over: proximal, or rollout (pi/mu: staleness and discrepancy in one).
    surrogate:     see surrogates.py. log_space_clip takes token ratios and gives one term per sequence: ratio sequence.
    reduction:     see reduce.py.
    clip_low/high: ratio bounds 1 - clip_low, 1 + clip_high; of the log-ratio for log_space_clip.
    dual_clip:     upper bound of r where A < 0.
    tau_positive/negative: temperature of the soft gate where A > 0 and elsewhere.
    corrections:   factors on the term, multiplied.
    kl:            penalty on the distance from a reference model.
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
    corrections: tuple[CorrectionConfig, ...] = ()
    kl: KLConfig | None = None
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
        problem = _problem(self)
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
        unbiased = self.kl is not None and self.kl.estimator == "unbiased_k3"
        return bool(self.corrections) or unbiased or self.ratio_to == "rollout"

    @property
    def needs_reference(self) -> bool:
        """Whether a reference model's log-probs are read, by the advantages or by the loss."""
        return self.kl is not None

    @property
    def needs_group(self) -> bool:
        """Whether a rollout is compared with others of its prompt, so that one alone teaches nothing."""
        return self.advantage in ("group_mean", "group_std", "leave_one_out")

    @property
    def needs_turns(self) -> bool:
        """Whether the advantages read turns and their rewards."""
        return self.credit == "turn"

    @property
    def needs_prompt_tokens(self) -> bool:
        """Whether the loss reads how many trained tokens each sequence's prompt has."""
        return self.reduction == "prompt_token_mean"

    @property
    def kl_in_reward(self) -> bool:
        """Whether the advantages read proximal and reference log-probs."""
        return self.kl is not None and self.kl.place == "reward"

    @property
    def needs_critic(self) -> bool:
        """Whether a value model is trained beside the policy."""
        return self.advantage == "gae"


NEEDS: dict[str, tuple[str, ...]] = {
    "reinforce": (),
    "clip": ("clip_low", "clip_high"),
    "dual_clip": ("clip_low", "clip_high", "dual_clip"),
    "stop_gradient_clip": ("clip_high",),
    "soft_gate": ("tau_positive", "tau_negative"),
    "mask": ("clip_low", "clip_high"),
    "log_space_clip": ("clip_low", "clip_high"),
}
"""Which numbers a surrogate reads. stop_gradient_clip reads clip_low too where there is one."""


def _problem(cells: Composition) -> str | None:
    """The sentence that says what does not go together and what to write instead, or None."""
    for cell, allowed in (
        ("advantage", Advantage),
        ("ratio", RatioLevel),
        ("surrogate", Surrogate),
        ("reduction", Reduction),
        ("std", Std),
        ("credit", Credit),
    ):
        if getattr(cells, cell) not in get_args(allowed):
            return f"{cell}: {getattr(cells, cell)!r} is unknown; write one of {', '.join(get_args(allowed))}"
    for name in NEEDS[cells.surrogate]:
        if getattr(cells, name) is None:
            return f"surrogate: {cells.surrogate} needs {name}, and the preset has none; write {name} too"
    if cells.clip_low is not None and cells.clip_low > 1 and cells.surrogate != "log_space_clip":
        return f"clip_low: {cells.clip_low} puts the lower bound 1 - clip_low below 0; write at most 1"
    if cells.dual_clip is not None and cells.dual_clip <= 1:
        return f"dual_clip: {cells.dual_clip} bounds a ratio where A < 0; write a number above 1 (3 in its paper)"
    if cells.surrogate == "log_space_clip" and cells.ratio != "sequence":
        return (
            "surrogate: log_space_clip makes one term per sequence from clipped token ratios; write ratio: sequence "
            "with it, or surrogate: clip to clip each token's ratio on its own"
        )
    if cells.reduction == "sequence_mean" and cells.ratio != "sequence":
        return (
            "reduction: sequence_mean takes one term per sequence, and ratio: "
            f"{cells.ratio} gives one per token; write reduction: sequence_mean_token_mean"
        )
    if cells.ratio == "sequence" and cells.advantage == "gae":
        return (
            "advantage: gae gives one advantage per token, and ratio: sequence has one term per sequence; write ratio: "
            "sequence_token (the same ratio, token by token), or advantage: group_mean"
        )
    if cells.ratio == "sequence" and cells.advantage == "batch_std" and cells.kl_in_reward:
        return (
            "advantage: batch_std with a KL in the reward gives one advantage per token, and ratio: sequence has one "
            "term per sequence; write ratio: sequence_token, or kl.place: loss"
        )
    return _turn_problem(cells) or _correction_problem(cells)


def _turn_problem(cells: Composition) -> str | None:
    if cells.credit == "turn" and cells.ratio == "sequence":
        return (
            "credit: turn gives each turn its own advantage, and ratio: sequence has one term per sequence; write "
            "ratio: sequence_token (the same ratio, token by token), ratio: token, or credit: episode"
        )
    if cells.turn_gamma != 1.0 and cells.credit == "episode":
        return (
            f"turn_gamma: {cells.turn_gamma} discounts the rewards of later turns, which credit: episode does not "
            "tell apart; write credit: turn too"
        )
    if cells.turn_gamma != 1.0 and cells.advantage == "gae":
        return f"advantage: gae discounts turns by gae_gamma; write gae_gamma: {cells.turn_gamma}, and no turn_gamma"
    return None


def _correction_problem(cells: Composition) -> str | None:
    for correction in cells.corrections:
        if cells.ratio != "token" and correction.per_token:
            return (
                f"correction: {correction.kind} weighs tokens, and ratio: {cells.ratio} weighs whole sequences; write "
                "correction: {kind: geometric_tis} (the same mean over tokens as the ratio), a sequence_* kind, or "
                "ratio: token"
            )
        if (
            correction.numerator == "current"
            and correction.kind not in MASKS_ONLY
            and cells.surrogate not in ("reinforce", "mask")
        ):
            return (
                f"correction: {correction.kind} with numerator: current puts pi/mu in front of a term that already "
                "holds pi/pi_o; write numerator: proximal, or surrogate: reinforce or mask"
            )
    weighing = [c.kind for c in cells.corrections if c.kind not in MASKS_ONLY]
    if cells.ratio_to == "rollout" and weighing:
        return (
            f"correction: {weighing[0]} weighs by a ratio to mu, which the surrogate's ratio holds already with "
            "ratio_to: rollout; write correction: [], or ratio_to: proximal"
        )
    if len(weighing) > 1:
        return (
            "correction: more than one of them weighs the same pi_o/mu; keep one weight, and add only "
            f"{' or '.join(MASKS_ONLY)} beside it"
        )
    return None
