"""Where the numbers of a run go."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_ext.config import Frozen


class WandbConfig(Frozen):
    """A Weights & Biases run. Who sends is known from WANDB_API_KEY or `wandb login`."""

    project: str = Field(description="project, made where it does not exist")
    name: str | None = Field(None, description="of the run; null: the run directory's")
    entity: str | None = Field(None, description="user or team; null: your default")
    mode: Literal["online", "offline"] = Field(
        "online", description="offline: into wandb/ of the run directory, for `wandb sync`"
    )


class MlflowConfig(Frozen):
    """An MLflow run."""

    tracking_uri: str = Field(description="of the tracking server, http://host:5000")
    experiment: str = Field("sameroute", description="experiment, made where it does not exist")
    name: str | None = Field(None, description="of the run; null: the run directory's")


class ObserveConfig(Frozen):
    """Sinks of a run's numbers."""

    prometheus_port: int | None = Field(None, ge=1, le=65535, description="of an endpoint /metrics; null: none")
    prometheus_host: str = Field("127.0.0.1", description="address that it listens on; 0.0.0.0: every one")
    episode_answers: bool = Field(
        True, description="episodes/ of the run directory has prompts and answers too; false: what can be counted"
    )
    wandb: WandbConfig | None = Field(None, description="a Weights & Biases run")
    mlflow: MlflowConfig | None = Field(None, description="an MLflow run")
