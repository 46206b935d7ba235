"""One correction for the discrepancy between trainer and rollout engine, as a person writes it."""

from __future__ import annotations

from typing import get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.objectives.cells import CorrectionKind, Policy, RejectBy, RejectOver

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
    "reject": (None, 1e-2),
}
MASKS_ONLY = ("geometric_mask", "opsm", "reject")
"""Corrections that keep or drop and weigh nothing."""
REJECT_DEFAULT = ("k3", "mean")
"""The one statistic of `reject` whose bound has a default: the mean of k3 over an answer, whatever its length."""
DROPS = (
    "token_mis",
    "icepop",
    "mean_mis",
    "sequence_mis",
    "geometric_mask",
    "opsm",
    *(f"reject_{by}_{over}" for by in get_args(RejectBy) for over in get_args(RejectOver)),
    "second_moment",
)
"""What takes tokens or answers out of the gradient, by the name of its metric; the others only bound their weight."""


class CorrectionConfig(BaseModel):
    """One correction for the discrepancy between trainer and rollout engine; a factor of 1 when there is none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: CorrectionKind = Field(
        description="token_*: w_t per token; sequence_*: W = prod w_t; geometric_*: W^(1/N); *_is: the weight itself; "
        "*_tis: min(weight, high); *_mis, icepop: the weight where low <= weight <= high, else 0; mean_mis: the mean "
        "over tokens of that; geometric_mask: 1 inside the bounds, else 0; opsm: 0 where A < 0 and mean "
        "log(mu / numerator) > high, else 1; reject: 1 where low <= statistic <= high, else 0, of an estimate of the KL"
    )
    low: float | None = Field(
        default=None, description="lower bound of the weight, or of reject's statistic; none where not given"
    )
    high: float | None = Field(
        default=None, gt=0, description="upper bound of the weight (opsm: nats per token; reject: nats)"
    )
    by: RejectBy | None = Field(
        default=None,
        description="for reject, of one token, l = log(numerator / mu): k1 = -l; k2 = l^2/2; k3 = e^l - 1 - l. "
        "Default: k3",
    )
    over: RejectOver | None = Field(
        default=None,
        description="for reject: token judges each token on its own; sum, mean and max judge an answer by that of its "
        "tokens. Default: mean",
    )
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
        if data["kind"] == "reject":
            given = dict(zip(("by", "over"), REJECT_DEFAULT, strict=True)) | given
            if (given["by"], given["over"]) != REJECT_DEFAULT:
                high = None
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
        if self.low is not None and self.low < 0 and self.by != "k1":
            raise ValueError(f"correction {self.kind}: low {self.low} bounds what is never below 0; leave low out")
        return self._check_reject()

    def _check_reject(self) -> CorrectionConfig:
        if self.kind != "reject":
            if self.by is not None or self.over is not None:
                raise ValueError(f"correction {self.kind} has no by and no over; write kind: reject with them")
            return self
        if self.high is None:
            raise ValueError(
                f"correction reject by {self.by} over {self.over} has no bound of its own that fits every length; "
                "write high too, in nats (of k3 over an answer's mean it is 0.01)"
            )
        return self

    @property
    def label(self) -> str:
        """Its name in metrics: of reject with its statistic."""
        return f"reject_{self.by}_{self.over}" if self.kind == "reject" else self.kind

    @property
    def per_token(self) -> bool:
        return self.kind.startswith("token_") or self.kind == "icepop" or self.over == "token"
