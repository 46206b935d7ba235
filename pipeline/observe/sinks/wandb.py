"""Metrics to Weights & Biases. The package is optional: `pip install sameroute[wandb]`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config.observe import WandbConfig
from pipeline.observe.sinks.background import DeliveryError


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
