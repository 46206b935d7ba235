"""Metrics to Weights & Biases. The package is optional: `pip install sameroute[wandb]`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.observe.background import DeliveryError


class WandbConfig(BaseModel):
    """A Weights & Biases run. Who sends is known from WANDB_API_KEY or `wandb login`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    project: str = Field(description="project, made where it does not exist")
    name: str | None = Field(None, description="of the run; null: the run directory's")
    entity: str | None = Field(None, description="user or team; null: your default")
    mode: Literal["online", "offline"] = Field(
        "online", description="offline: into wandb/ of the run directory, for `wandb sync`"
    )


class WandbSink:
    """One run there, its configuration with it."""

    def __init__(self, settings: WandbConfig, directory: Path, config: Mapping[str, Any]):
        """directory: the run's. config: plain values. Raises DeliveryError where W&B refuses the run."""
        import wandb

        self._errors = wandb.Error
        try:
            self._run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                name=settings.name or directory.resolve().name,
                mode=settings.mode,
                dir=str(directory.resolve()),
                config=dict(config),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            raise DeliveryError(f"observe.wandb: {error}") from error

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """W&B's own process sends; this hands over. Raises DeliveryError where that process is gone."""
        try:
            self._run.log(dict(metrics), step=step)
        except self._errors as error:
            raise DeliveryError(f"step {step}: {error}") from error

    def close(self, finished: bool) -> None:
        """Send what is left; the run there is finished, or failed."""
        try:
            self._run.finish(exit_code=0 if finished else 1)
        except self._errors as error:
            raise DeliveryError(f"at the end: {error}") from error
