"""The last step, for a Prometheus server to scrape.

sameroute_<metric>                    gauge    every number of the last step; reward/mean is sameroute_reward_mean
sameroute_steps_total                 counter  steps of this process
sameroute_last_step_timestamp_seconds gauge    when the last step ended: its age tells of a run that stalls
sameroute_delivery_failures_total     counter  by receiver (wandb, mlflow, alerts): what did not arrive there
sameroute_alert_firing                gauge    by rule: 1 while it fires
sameroute_run_info                    1, with what the run is in its labels
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

PREFIX = "sameroute_"
_OURS = frozenset({"steps", "last_step_timestamp_seconds", "delivery_failures", "alert_firing", "run"})


def gauge_name(metric: str) -> str:
    """The legal name of a metric: all but letters, digits and _ become _."""
    return PREFIX + re.sub(r"[^a-zA-Z0-9_]", "_", metric)


def port_error(host: str, port: int) -> str | None:
    """Why the endpoint cannot listen there; None where it can."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return f"cannot listen on {host}:{port}: {error.strerror}"
    return None


class PrometheusEndpoint(Collector):
    """A sink: http://host:port/metrics, from its making until `close`."""

    def __init__(
        self,
        host: str,
        port: int,
        info: Mapping[str, str],
        *,
        failures: Callable[[], Mapping[str, int]] = dict,
        firing: Callable[[], Mapping[str, bool]] = dict,
    ):
        """info: labels of sameroute_run_info. failures, firing: asked at every scrape. Raises OSError for the port."""
        self._info, self._failures, self._firing = dict(info), failures, firing
        self._lock = threading.Lock()
        self._last: dict[str, float] = {}
        self._steps, self._time = 0, None
        registry = CollectorRegistry()
        registry.register(self)
        self._server, self._thread = start_http_server(port, host, registry)

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """The numbers of a step take the place of the last one's.

        Raises ValueError for two metrics that would have one name.
        """
        named: dict[str, str] = {}
        for metric in ("step", *metrics):
            name = gauge_name(metric)
            if name.removeprefix(PREFIX) in _OURS or named.setdefault(name, metric) != metric:
                raise ValueError(f"the metric {metric!r} has the Prometheus name {name} of another; rename it")
        with self._lock:
            self._last = {"step": float(step)} | {key: float(value) for key, value in metrics.items()}
            self._steps, self._time = self._steps + 1, time.time()

    def collect(self) -> Iterator[Metric]:
        """What a scrape sees."""
        with self._lock:
            last, steps, at = self._last, self._steps, self._time
        run = InfoMetricFamily(f"{PREFIX}run", "what the run is")
        run.add_metric([], self._info)
        yield run
        yield CounterMetricFamily(f"{PREFIX}steps", "steps of this process", value=steps)
        if at is not None:
            yield GaugeMetricFamily(f"{PREFIX}last_step_timestamp_seconds", "when the last step ended", value=at)
        failures = CounterMetricFamily(f"{PREFIX}delivery_failures", "what did not arrive", labels=["receiver"])
        for receiver, count in self._failures().items():
            failures.add_metric([receiver], count)
        yield failures
        firing = GaugeMetricFamily(f"{PREFIX}alert_firing", "1 while the rule fires", labels=["rule"])
        for rule, fires in self._firing().items():
            firing.add_metric([rule], float(fires))
        yield firing
        for metric, value in last.items():
            yield GaugeMetricFamily(gauge_name(metric), metric, value=value)

    def close(self, finished: bool) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
