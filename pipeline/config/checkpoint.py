"""When a run saves."""

from __future__ import annotations

from pydantic import Field

from megatron_ext.config import Frozen
from pipeline.config.sources.evaluation import BestConfig


class CheckpointConfig(Frozen):
    """When a run saves what it needs to be resumed."""

    every_steps: int | None = Field(
        None,
        ge=1,
        description="RL steps from one checkpoint to the next; the last step has one too, and SIGTERM and SIGUSR1 save "
        "one. null: no checkpoints",
    )
    keep_last: int = Field(
        2, ge=1, description="complete checkpoints that are kept; an older one goes after a newer is"
    )
    asynchronous: bool = Field(True, description="train on while the files are written; false: wait for them")
    grace_s: float = Field(
        600.0,
        gt=0,
        description="seconds that a signal leaves for the step in progress and its checkpoint",
    )
    best: BestConfig | None = Field(
        None, description="keep the checkpoint that an evaluation finds best, beside the last ones; null: none"
    )
