"""Rules on metrics, and who hears of them."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from megatron_ext.config import Frozen
from pipeline.objectives.correction_config import DROPS


class AlertRule(Frozen):
    """When a metric means trouble: one of above, below, falls_by and rises_by, for so many steps in a row."""

    metric: str = Field(description="as in metrics.jsonl")
    above: float | None = Field(default=None, description="fires above this value")
    below: float | None = Field(default=None, description="fires below this value")
    falls_by: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="fires below (1 - falls_by) of the metric's best so far, the mean of for_steps steps; not while "
        "that is 0 or less",
    )
    rises_by: float | None = Field(
        default=None,
        gt=0,
        description="fires above the metric's start plus rises_by; the start is the mean of the first for_steps steps",
    )
    for_steps: int = Field(default=1, ge=1, description="steps in a row; a step without the metric counts neither way")
    stop: bool = Field(default=False, description="end the run when it fires")
    why: str = Field(default="", description="said with the alert")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(bound is not None for bound in (self.above, self.below, self.falls_by, self.rises_by)) != 1:
            raise ValueError(f"give exactly one of above, below, falls_by and rises_by of {self.metric}")
        return self

    def __str__(self) -> str:
        """What it says, and its name in JSON and in Prometheus."""
        if self.falls_by is not None:
            condition = f"falls by {self.falls_by:.0%}"
        elif self.rises_by is not None:
            condition = f"rises by {self.rises_by:g}"
        else:
            condition = f"above {self.above:g}" if self.above is not None else f"below {self.below:g}"
        return f"{self.metric} {condition}" + (f" for {self.for_steps} steps" if self.for_steps > 1 else "")


DEFAULT_RULES = (
    AlertRule(
        metric="mismatch/k3",
        above=1e-2,
        for_steps=3,
        why="trainer and rollout engine drift apart; `sameroute diagnose` says in which part",
    ),
    AlertRule(metric="policy/entropy", below=1e-3, for_steps=5, why="the policy samples one answer only"),
    AlertRule(metric="policy/entropy", rises_by=1.0, for_steps=3, why="the policy goes over to noise"),
    AlertRule(metric="response/length_mean", below=1.5, for_steps=5, why="answers are empty"),
    AlertRule(metric="response/truncated_fraction", above=0.5, for_steps=5, why="answers do not come to an end"),
    AlertRule(
        metric="response/repeating_fraction",
        above=0.2,
        for_steps=3,
        why="answers go in circles; look at rollouts/ of the run directory",
    ),
    AlertRule(
        metric="response/garbage_fraction",
        above=0.05,
        for_steps=3,
        why="answers hold characters that nobody can read; look at rollouts/ of the run directory",
    ),
    AlertRule(metric="reward/mean", falls_by=0.5, for_steps=5, why="the policy has lost half of its best reward"),
    AlertRule(metric="reward/std", below=1e-6, for_steps=5, why="all rewards are equal, so nothing is learnt"),
)
"""Signs of a collapse that mean the same in every run. None stops a run."""

CORRECTION_RULES = tuple(
    AlertRule(
        metric=f"correction/{kind}_cut",
        above=0.5,
        why=f"the correction {kind} drops more than half of what it judges: widen its bounds, or find out why the "
        "engines disagree",
    )
    for kind in DROPS
)
"""Default rules too, each for runs whose objective has the correction. A correction that drops most of a batch is
training on what is left, in silence."""


class AlertsConfig(Frozen):
    """What is watched while a run goes on, and who hears of it."""

    defaults: bool = Field(True, description="watch the signs of a collapse of docs/operate.md too")
    rules: tuple[AlertRule, ...] = Field((), description="your own, beside the default ones")
    command: tuple[str, ...] = Field(
        (),
        description="program and arguments; gets the alert as JSON on standard input",
        json_schema_extra={"secret": True},
    )
    webhook: str | None = Field(
        None,
        pattern=r"^https?://",
        description="URL that gets the alert as a JSON POST",
        json_schema_extra={"secret": True},
    )
    timeout_s: float = Field(10.0, gt=0, description="of one command or POST")

    @property
    def all_rules(self) -> tuple[AlertRule, ...]:
        """Each once."""
        return tuple(dict.fromkeys((*self.rules, *((*DEFAULT_RULES, *CORRECTION_RULES) if self.defaults else ()))))
