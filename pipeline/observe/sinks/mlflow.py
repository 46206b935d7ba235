"""Metrics to an MLflow tracking server. The package is optional: `pip install sameroute[mlflow]`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.config.observe import MlflowConfig
from pipeline.config.secrets import hide_in_text
from pipeline.observe.sinks.background import DeliveryError

_PARAMS_A_CALL = 100  # MLflow's REST API takes no more


class MlflowSink:
    """One run there; every field of the configuration is a parameter of it, named section.field."""

    def __init__(self, settings: MlflowConfig, directory: Path, config: Mapping[str, Any]):
        """directory: the run's. config: plain values. Raises DeliveryError where the server cannot be reached."""
        from mlflow import MlflowClient
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        self._errors = (MlflowException, OSError)
        try:
            self._client = MlflowClient(tracking_uri=settings.tracking_uri)
            experiment = self._client.get_experiment_by_name(settings.experiment)
            number = experiment.experiment_id if experiment else self._client.create_experiment(settings.experiment)
            run = self._client.create_run(number, run_name=settings.name or directory.resolve().name)
            self._run = run.info.run_id
            params = [Param(key, str(value)) for key, value in flat(config)]
            for start in range(0, len(params), _PARAMS_A_CALL):
                self._client.log_batch(self._run, params=params[start : start + _PARAMS_A_CALL])
        except self._errors as error:
            raise DeliveryError(f"observe.mlflow: {hide_in_text(f'{settings.tracking_uri}: {error}')}") from error

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Blocks until the server has them. Raises DeliveryError where it does not take them."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        try:
            self._client.log_batch(self._run, metrics=[Metric(named(k), v, now, step) for k, v in metrics.items()])
        except self._errors as error:
            raise DeliveryError(f"step {step}: {error}") from error

    def close(self, finished: bool) -> None:
        """The run there is finished, or failed."""
        try:
            self._client.set_terminated(self._run, "FINISHED" if finished else "FAILED")
        except self._errors as error:
            raise DeliveryError(f"at the end: {error}") from error


def named(metric: str) -> str:
    """As MLflow takes it, whose names have no @: pass@4 is pass_at_4 there."""
    return metric.replace("@", "_at_")


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(section.field, value) of nested settings."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + str(key), value
