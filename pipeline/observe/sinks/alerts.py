"""Rules on metrics: an alert fires when its rule has held for some steps, once, and is resolved when it no longer does.

    alerts:
      rules:
        - {metric: mismatch/k3, above: 0.005, for_steps: 3}
        - {metric: reward/mean, falls_by: 0.8, for_steps: 10, stop: true}
      command: [scripts/page-me, --team, rl]
      webhook: https://hooks.example.com/services/...

The default rules (DEFAULT_RULES, CORRECTION_RULES) hold beside these. An alert is a line on the console and in
alerts.jsonl of the run directory, and goes as one JSON object to the command's standard input and to the webhook as a
POST.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from pipeline import http
from pipeline.config.alerts import CORRECTION_RULES, AlertRule, AlertsConfig
from pipeline.disk.disk_errors import writing
from pipeline.disk.rows import Rows
from pipeline.errors import SamerouteError
from pipeline.observe.sinks.background import Background, DeliveryError


class AlertStop(SamerouteError):
    """A rule with `stop: true` fired."""


@dataclass
class RuleState:
    """A rule through a run."""

    rule: AlertRule
    held: int = 0
    firing: bool = False
    best: float | None = None
    start: float | None = None
    recent: deque[float] = field(init=False)

    def __post_init__(self):
        self.recent = deque(maxlen=self.rule.for_steps)

    def step(self, value: float) -> bool:
        """Take the value of a step; whether `firing` changed."""
        holds = self._holds(value)
        self.held = self.held + 1 if holds else 0
        before, self.firing = self.firing, self.held >= self.rule.for_steps
        return self.firing != before

    def _holds(self, value: float) -> bool:
        rule = self.rule
        if rule.above is not None:
            return value > rule.above
        if rule.below is not None:
            return value < rule.below
        self.recent.append(value)
        if rule.rises_by is not None:
            if self.start is None and len(self.recent) == rule.for_steps:
                self.start = sum(self.recent) / rule.for_steps
            return self.start is not None and value > self.start + rule.rises_by
        assert rule.falls_by is not None
        if len(self.recent) == rule.for_steps:
            mean = sum(self.recent) / rule.for_steps
            self.best = mean if self.best is None else max(self.best, mean)
        return self.best is not None and self.best > 0 and value < (1 - rule.falls_by) * self.best


class Alerts:
    """A sink. failures: deliveries that failed."""

    def __init__(self, config: AlertsConfig, directory: Path, say: Callable[[str], None]):
        """directory: the run's, where alerts.jsonl is appended to. say: takes a line for people."""
        self.config, self.directory, self.say = config, directory.resolve(), say
        self.states = [RuleState(rule) for rule in config.all_rules]
        self._delivery = Background("alerts", say) if config.command or config.webhook else None
        self._first = True

    @property
    def failures(self) -> int:
        return 0 if self._delivery is None else self._delivery.failures

    def firing(self) -> dict[str, bool]:
        """By rule."""
        return {str(state.rule): state.firing for state in self.states}

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Fire and resolve. Raises AlertStop where a rule that fires says so, once all alerts are delivered."""
        if self._first:
            self._first = False
            self._say_unknown(step, metrics)
        stopping = None
        for state in self.states:
            if state.rule.metric in metrics and state.step(metrics[state.rule.metric]):
                event = self._event(state, step, metrics[state.rule.metric])
                self._tell(event)
                if state.firing and state.rule.stop:
                    stopping = stopping or event["text"]
        if stopping is not None:
            if self._delivery is not None:
                self._delivery.wait(4 * self.config.timeout_s)
            raise AlertStop(f"{stopping} alerts.rules asks for the end of the run (stop: true)")

    def close(self, finished: bool) -> None:
        """Wait for deliveries, two time-outs long at most."""
        if self._delivery is not None:
            self._delivery.close(2 * self.config.timeout_s)

    def _say_unknown(self, step: int, metrics: Mapping[str, float]) -> None:
        # A run has the corrections of its own objective; that it lacks the others is no news.
        expected = {state.rule.metric for state in self.states if state.rule not in CORRECTION_RULES}
        unknown = sorted(expected - metrics.keys())
        if unknown:
            self.say(
                f"alerts: step {step} has no metric {', '.join(unknown)}; a rule on it waits for a step that has it; "
                f"there are {', '.join(sorted(metrics))}"
            )

    def _event(self, state: RuleState, step: int, value: float) -> dict[str, Any]:
        rule, name = state.rule, self.directory.name
        what = "fires" if state.firing else "is resolved"
        why = f" ({rule.why})" if rule.why and state.firing else ""
        return {
            "text": f"{name}, step {step}: alert {what}: {rule}{why}. The value is {value:.4g}.",
            "state": "firing" if state.firing else "resolved",
            "rule": str(rule),
            "metric": rule.metric,
            "value": value,
            "step": step,
            "stop": rule.stop,
            "run": name,
            "directory": str(self.directory),
            "host": socket.gethostname(),
        }

    def _tell(self, event: Mapping[str, Any]) -> None:
        self.say(str(event["text"]))
        body = json.dumps(event)
        file = self.directory / "alerts.jsonl"
        with writing(file), contextlib.closing(Rows(file)) as rows:
            rows.append(body)
        if self._delivery is not None:
            command, webhook, timeout_s = self.config.command, self.config.webhook, self.config.timeout_s
            if command:
                self._delivery.submit(lambda: run_command(command, body, timeout_s))
            if webhook:
                self._delivery.submit(lambda: post(webhook, body, timeout_s))


def run_command(command: Sequence[str], body: str, timeout_s: float) -> None:
    """Run it with the body on standard input. Raises DeliveryError: another exit code than 0, or the time is over."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                text=True,
                start_new_session=True,  # so that what a script started ends with it
            )
        except OSError as error:
            raise DeliveryError(f"{command[0]}: {error.strerror}") from error
        try:
            process.communicate(body, timeout_s)
        except subprocess.TimeoutExpired as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise DeliveryError(
                f"{command[0]} took longer than alerts.timeout_s={timeout_s:g}, and was killed"
            ) from error
        if process.returncode:
            output.seek(0)
            raise DeliveryError(f"{command[0]} ended with {process.returncode}: {output.read().strip()[-300:]}")


def post(url: str, body: str, timeout_s: float) -> None:
    """POST the body as JSON. Raises DeliveryError for any answer that is no success. The URL may hold a secret, so only
    its host is said."""
    host = urlparse(url).hostname
    try:
        answer = http.request("POST", url, body=body.encode(), timeout_s=timeout_s, proxies=True)
    except (http.HttpError, TimeoutError) as error:
        raise DeliveryError(f"webhook at {host}: {type(error).__name__}") from error
    if answer.status >= 400:
        raise DeliveryError(f"webhook at {host} answered {answer.status}")


def wrong_alerts(config: AlertsConfig, of_verifiers: Collection[str] = ()) -> str | None:
    """What can be known to be wrong before a run starts. of_verifiers: the metrics of this run's verifiers."""
    if config.command and shutil.which(config.command[0]) is None:
        return f"alerts.command: there is no program {config.command[0]!r}"
    families = known_metrics()
    for rule in config.rules:
        known = families.get(rule.metric.partition("/")[0])
        if known is not None and rule.metric not in known and rule.metric not in of_verifiers:
            there = sorted({*known, *of_verifiers} if rule.metric.startswith("reward/") else known)
            return f"alerts.rules: there is no metric {rule.metric!r}; there are {', '.join(there)}"
    return None


def known_metrics() -> dict[str, set[str]]:
    """Every metric of the families whose metrics do not depend on the configuration, by the part before the /."""
    import numpy as np
    import torch

    from pipeline.objectives import mismatch_metrics
    from pipeline.observe.garbled import answer_metrics
    from pipeline.observe.metrics import batch_metrics
    from pipeline.rewards import Failures
    from pipeline.step import Batch
    from pipeline.types import Episode, Group, Prompt, Rollout

    one = torch.zeros(1, 2)
    ids, zeros = np.zeros(2, np.int32), np.zeros(2, np.float32)
    rollout = Rollout(ids, ids, zeros, None, ids, "stop")
    group = Group(Prompt(ids, "", index=0), (Episode((rollout,), 0.0),))
    names = [
        *mismatch_metrics(one, one, torch.ones(1, 2, dtype=torch.bool)),
        *batch_metrics(Batch(1, 0, (group,))),
        *Failures().metrics(),
        *answer_metrics([], None),
    ]
    families: dict[str, set[str]] = {}
    for name in names:
        families.setdefault(name.partition("/")[0], set()).add(name)
    families.pop("rollout", None)  # dynamic sampling adds to it
    return families
