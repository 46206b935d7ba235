"""Where the numbers of a step go beside the run directory: Prometheus, W&B, MLflow, alerts.

A sink records steps and is closed once. What runs on this machine is called at once; what sends over a network, in the
background. A receiver that cannot be had stops a run before it starts, and costs it nothing but a counted line later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from pipeline.config.observe import ObserveConfig
from pipeline.config.secrets import shown
from pipeline.errors import NOT_STARTED, SamerouteError
from pipeline.observe.sinks.alerts import Alerts, wrong_alerts
from pipeline.observe.sinks.background import Background, DeliveryError
from pipeline.observe.sinks.mlflow import MlflowSink
from pipeline.observe.sinks.prometheus import PrometheusEndpoint, port_error
from pipeline.observe.sinks.wandb import WandbSink

if TYPE_CHECKING:
    from pipeline.config import Config

CLOSE_S = 60.0  # that a run's end waits for a network, a sink


class ObserveError(SamerouteError):
    """A sink cannot be had; the message says what to write instead."""

    exit_code = NOT_STARTED


class Sink(Protocol):
    """Takes the numbers of every step."""

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """metrics: those of the step, without "step"."""
        ...

    def close(self, finished: bool) -> None:
        """Send what is left and let go. finished: whether the run came to its end."""
        ...


class Distant:
    """A sink over a network, called in the background: what it refuses is counted and said."""

    def __init__(self, name: str, sink: Sink, say: Callable[[str], None]):
        self._sink, self._calls = sink, Background(name, say)

    @property
    def failures(self) -> int:
        return self._calls.failures

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        self._calls.submit(lambda: self._sink.record(step, metrics))

    def close(self, finished: bool) -> None:
        self._calls.submit(lambda: self._sink.close(finished))
        self._calls.close(CLOSE_S)


def wrong_sinks(config: ObserveConfig) -> str | None:
    """What can be known to be wrong before a run starts."""
    for package in ("wandb", "mlflow"):
        if getattr(config, package) is not None and find_spec(package) is None:
            return (
                f"observe.{package} needs a package that is not installed: pip install 'sameroute[{package}]', or "
                f"set observe.{package}=null"
            )
    if config.prometheus_port is not None and (why := port_error(config.prometheus_host, config.prometheus_port)):
        return f"observe.prometheus_port: {why}; set another port, or null for none"
    return None


def check_sinks(config: Config) -> None:
    """Raises ObserveError for what can be known to be wrong before anything starts."""
    if why := wrong_sinks(config.observe) or wrong_alerts(
        config.alerts, {f"reward/{reward.metric}" for reward in config.rewards}
    ):
        raise ObserveError(why)


class Sinks:
    """All sinks of a run. A context: they take steps from its beginning, and are closed on leaving."""

    def __init__(self, config: Config, directory: Path, say: Callable[[str], None]):
        """directory: the run's. say: takes a line for people. Raises ObserveError where a sink cannot be had."""
        self._stack, self._finished, self._sinks = ExitStack(), False, list[Sink]()
        # A webhook's address is often a secret.
        observe, plain = config.observe, shown(config.model_dump(mode="json", exclude={"alerts": {"webhook"}}))
        alerts = Alerts(config.alerts, directory, say)
        failing: dict[str, Callable[[], int]] = {}
        with ExitStack() as undo:
            undo.callback(self._stack.close)
            self._add(alerts)
            failing["alerts"] = lambda: alerts.failures
            try:
                if observe.wandb is not None:
                    failing["wandb"] = self._add_distant("wandb", WandbSink(observe.wandb, directory, plain), say)
                if observe.mlflow is not None:
                    failing["mlflow"] = self._add_distant("mlflow", MlflowSink(observe.mlflow, directory, plain), say)
                if observe.prometheus_port is not None:
                    endpoint = PrometheusEndpoint(
                        observe.prometheus_host,
                        observe.prometheus_port,
                        run_info(config),
                        failures=lambda: {name: count() for name, count in failing.items()},
                        firing=alerts.firing,
                    )
                    self._add(endpoint)
            except (DeliveryError, OSError) as error:
                raise ObserveError(f"{error}; correct it, or set that sink to null") from error
            undo.pop_all()
        self._sinks = [*self._sinks[1:], alerts]  # the last, because it may end the run

    def _add(self, sink: Sink) -> None:
        self._sinks.append(sink)
        self._stack.callback(lambda: sink.close(self._finished))

    def _add_distant(self, name: str, sink: Sink, say: Callable[[str], None]) -> Callable[[], int]:
        distant = Distant(name, sink, say)
        self._add(distant)
        return lambda: distant.failures

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finished = kind is None
        self._stack.close()

    def record_beginning(self, step: int, metrics: Mapping[str, float]) -> None:
        """What was evaluated before the first step of this process; for receivers that keep a row a step."""
        for sink in self._sinks:
            if isinstance(sink, Distant):
                sink.record(step, metrics)

    def record(self, metrics: Mapping[str, float]) -> None:
        """A step's metrics, "step" among them. Raises AlertStop where an alert is to end the run."""
        step = int(metrics["step"])
        values = {key: float(value) for key, value in metrics.items() if key != "step"}
        for sink in self._sinks:
            sink.record(step, values)


def run_info(config: Config) -> dict[str, str]:
    """What a run is, in words."""
    facts: dict[str, Any] = {
        "run": config.run.directory.resolve().name,
        "model": config.model.path.name if config.model.path is not None else "tiny",
        "objective": config.objective.preset,
        "replay": config.replay.value,
        "ranks": config.parallel.ranks,
        "dtype": config.precision.weights,
        "seed": config.run.seed,
        "steps": config.train.steps,
    }
    return {key: str(value) for key, value in facts.items()}
