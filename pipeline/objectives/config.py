"""What a person writes under `objective:`, and the objective it means.

objective: {preset: gspo}
objective: {preset: grpo, reduction: token_mean, correction: {kind: token_tis, high: 2}}

Nothing here imports torch; `pipeline.objectives.objective.resolve` makes the functions.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pipeline.objectives.cells import NEEDS, Advantage, Credit, Divergence, RatioLevel, Reduction, Std, Surrogate
from pipeline.objectives.composition import Composition, KLConfig
from pipeline.objectives.correction_config import CorrectionConfig
from pipeline.objectives.distillation_config import DistillationConfig
from pipeline.objectives.presets import PRESETS


class ObjectiveConfig(BaseModel):
    """A preset, and any of its cells written over. A cell that is left out is the preset's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: str = Field(default="gspo", description="row of the table; `sameroute objectives` prints it")
    advantage: Advantage | None = Field(default=None, description="how rewards become advantages")
    ratio: RatioLevel | None = Field(
        default=None, description="token, sequence, sequence_token (GSPO-token), or product of all tokens' (VESPO)"
    )
    ratio_to: Literal["proximal", "rollout"] | None = Field(
        default=None, description="what pi is divided by in the ratio: proximal, or rollout for pi/mu"
    )
    surrogate: Surrogate | None = Field(default=None, description="the term whose gradient is taken")
    reduction: Reduction | None = Field(default=None, description="how terms become a scalar")
    clip_low: float | None = Field(default=None, ge=0, description="1 - clip_low is the lower bound of the ratio")
    clip_high: float | None = Field(default=None, ge=0, description="1 + clip_high is the upper bound of the ratio")
    dual_clip: float | None = Field(default=None, description="upper bound of the ratio where A < 0, above 1")
    tau_positive: float | None = Field(default=None, gt=0, description="soft gate's temperature where A > 0")
    tau_negative: float | None = Field(default=None, gt=0, description="soft gate's temperature where A <= 0")
    divergence: Divergence | None = Field(
        default=None,
        description="trust region's distance of one token, p and q its probabilities: binary_tv |p - q|; binary_kl "
        "q log(q/p) + (1-q) log((1-q)/(1-p))",
    )
    trust_low: float | None = Field(default=None, gt=0, description="largest distance below; probability, or nats")
    trust_high: float | None = Field(default=None, gt=0, description="largest distance above; probability, or nats")
    trust_both: bool | None = Field(
        default=None, description="drop a token that is too far on either side, whatever the sign of A"
    )
    trust_weight: float | None = Field(
        default=None, gt=0, description="upper bound of the ratio that weighs a token inside the trust region"
    )
    power_positive: float | None = Field(default=None, gt=0, description="gamma gate's k where A > 0")
    decay_positive: float | None = Field(default=None, gt=0, description="gamma gate's lambda where A > 0")
    power_negative: float | None = Field(default=None, gt=0, description="gamma gate's k where A <= 0")
    decay_negative: float | None = Field(default=None, gt=0, description="gamma gate's lambda where A <= 0")
    second_moment: float | None = Field(
        default=None,
        ge=0,
        description="largest mean of log(pi_o/mu)^2 over the batch's tokens; those where it is largest are dropped "
        "until it holds; 0 drops none",
    )
    correction: tuple[CorrectionConfig, ...] | None = Field(
        default=None,
        description="for the discrepancy between engines, and for stale rollouts: one, several (multiplied), or none",
    )
    kl: KLConfig | None = Field(
        default=None, description="penalty on the distance from a reference model; beta: 0 removes it"
    )
    distillation: DistillationConfig | None = Field(
        default=None, description="learn from a teacher, which the section `teacher` names (docs/distillation.md)"
    )
    whiten: bool | None = Field(
        default=None, description="whiten the advantages over the batch's tokens, as a last step"
    )
    std: Std | None = Field(
        default=None,
        description="of a group or a batch: population divides by the count (every row's default but AReaL's), sample "
        "by the count less one",
    )
    std_epsilon: float | None = Field(default=None, ge=0, description="added to a standard deviation, reward units")
    credit: Credit | None = Field(
        default=None,
        description="of conversations. episode: one reward for all that the policy said (every row's default); turn: "
        "what each turn and those after it earned",
    )
    turn_gamma: float | None = Field(
        default=None, ge=0, le=1, description="discount of what the next turns earn, per turn; for credit: turn"
    )
    gae_gamma: float | None = Field(
        default=None, ge=0, le=1, description="discount per token; per turn with credit: turn"
    )
    gae_lambda: float | None = Field(
        default=None, ge=0, le=1, description="lambda of GAE, per token; per turn with credit: turn"
    )
    value_coefficient: float | None = Field(default=None, ge=0, description="factor of the critic's loss")
    value_clip: float | None = Field(
        default=None, ge=0, description="largest move of a value in one update, reward units; 0 is no clip"
    )
    entropy_coefficient: float | None = Field(default=None, description="bonus, reward units per nat")
    dynamic_sampling: bool | None = Field(default=None, description="replace groups whose rewards are all equal")
    overlong_fraction: float | None = Field(
        default=None, ge=0, le=1, description="ramp of the overlong penalty, fraction of the maximum length; 0 is none"
    )

    @field_validator("preset")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
        return name

    @field_validator("correction", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        if value == "none":
            return ()
        return (value,) if isinstance(value, dict | CorrectionConfig) else value

    @model_validator(mode="after")
    def _check(self) -> ObjectiveConfig:
        self.composition()
        return self

    def composition(self) -> Composition:
        """The preset's cells with the written ones over them. Raises ValueError where they do not go together."""
        cells = PRESETS[self.preset].cells
        written = {name: getattr(self, name) for name in self.model_fields_set if name != "preset"}
        written = {name: value for name, value in written.items() if value is not None}
        if "correction" in written:
            written["corrections"] = written.pop("correction")
        if "kl" in written and written["kl"].beta == 0:
            written["kl"] = None
        for cell in ("value_clip", "second_moment"):
            if written.get(cell) == 0:
                written[cell] = None
        _check_clip(self, cells)
        return dataclasses.replace(cells, **written)

    @property
    def guards_staleness(self) -> bool:
        """Whether the objective weighs a token by what mu was when it was sampled, or is told by name not to.

        With one mini-batch pi/pi_o is 1 and its clip does nothing, so only a correction, or a ratio to mu, knows that
        rollouts are stale.
        """
        cells = self.composition()
        knows = bool(cells.corrections) or cells.ratio_to == "rollout" or cells.second_moment is not None
        return knows or self.correction == ()

    @property
    def name(self) -> str:
        """The preset's, with "*" where a cell was written over."""
        return self.preset + ("*" if self.composition() != PRESETS[self.preset].cells else "")


def _check_clip(config: ObjectiveConfig, cells: Composition) -> None:
    """A clip belongs to its ratio: 3e-4 around a token's, or 0.2 around a mean of thousands, clips all or nothing."""
    ratio = config.ratio or cells.ratio
    surrogate = config.surrogate or cells.surrogate
    moved = (ratio == "token") != (cells.ratio == "token") or (surrogate == "log_space_clip") != (
        cells.surrogate == "log_space_clip"
    )
    missing = [name for name in ("clip_low", "clip_high") if getattr(config, name) is None]
    if moved and missing and "clip_high" in NEEDS[surrogate]:
        size = "0.2" if ratio == "token" else "3e-4"
        raise ValueError(
            f"ratio: {ratio} with surrogate: {surrogate} under preset {config.preset} would keep the clip of "
            f"another kind of ratio ({cells.clip_low}, {cells.clip_high}); write {' and '.join(missing)} too, "
            f"for example {size}"
        )
