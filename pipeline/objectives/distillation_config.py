"""A teacher's part of an objective: the reverse KL of the policy to it, on what the policy sampled."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.objectives.cells import Reduction


class DistillationConfig(BaseModel):
    """On-policy distillation; l = log pi - log pi_T of a sampled token, pi_T the teacher."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    place: Literal["advantage", "loss"] = Field(
        default="advantage",
        description="advantage: - coefficient * l of pi_o is added to a token's advantage; loss: a term of its own",
    )
    coefficient: float = Field(default=1.0, gt=0, description="reward units per nat, or factor of the term")
    reward: float = Field(
        default=1.0, ge=0, description="factor of the advantages of rewards beside it; 0: the teacher alone teaches"
    )
    gamma: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="place: advantage: discount of the l of later tokens; 0: a token answers for its own; 1: the "
        "gradient of the whole answer's KL",
    )
    top_k: int = Field(
        default=0,
        ge=0,
        le=256,
        description="place: loss: the KL over the teacher's so many likeliest tokens and one more outcome, all others; "
        "0: of the sampled token",
    )
    reduction: Reduction = Field(default="token_mean", description="place: loss: the term's own denominator")
    max_weight: float = Field(
        default=5.0, gt=0, description="place: loss, top_k: 0: upper bound of pi/mu, which weighs a sampled token"
    )

    @model_validator(mode="after")
    def _check(self) -> DistillationConfig:
        if self.top_k and self.place == "advantage":
            raise ValueError(
                f"distillation.top_k: {self.top_k} has a gradient through each of these tokens, and an advantage "
                "belongs to the one that was sampled; write place: loss, or top_k: 0"
            )
        if self.gamma and self.place == "loss":
            raise ValueError(
                f"distillation.gamma: {self.gamma:g} lets a token answer for later ones, which a term of each token "
                "cannot; write place: advantage, or gamma: 0"
            )
        return self
